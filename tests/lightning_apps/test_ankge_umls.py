"""AnKGE on UMLS from the files to the test, beside its base and the control that learns nothing."""

from pathlib import Path

import pytest

from tests.lightning_apps.commands import last, run

pytestmark = [pytest.mark.slow, pytest.mark.realdata, pytest.mark.timeout(900)]

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]


def trained(folder: Path, name: str, config: str, *options: str) -> None:
    """A run of that name, seed 0."""
    given = ["--config", config, "--run.name", name, "--callbacks.ranks", "null"]
    run(folder, "fit", *given, *QUIET, *options, app="ankge")


def scores_of(folder: Path, name: str, *options: str) -> dict[str, float]:
    """MRR of test triples by the checkpoint that is best on validation."""
    trained(folder, name, "ankge/ankge_small.yaml", "--model.base", "runs/ankge/base", *options)
    found = folder / "runs/ankge" / name
    run(folder, "test", "--ckpt_path", str(found / "checkpoints/best.ckpt"), *QUIET, app="ankge")
    keys = {"ankge": "test/mrr", "base": "test/base/mrr", "identity": "test/identity/mrr"}
    return {key: last(found / "test/metrics.csv", metric) for key, metric in keys.items()}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("umls")


@pytest.fixture(scope="module")
def data(shared_data) -> list[str]:
    return ["--data.root", str(shared_data / "kg/umls")]


@pytest.fixture(scope="module")
def margin(work, data) -> dict[str, float]:
    trained(work, "base", "ankge/transe_small.yaml", *data)
    return scores_of(work, "margin", *data)


def test_what_analogies_add_to_scores_with_a_margin(margin):
    assert margin["base"] >= 0.73
    assert margin["ankge"] >= margin["base"] + 0.03
    assert margin["ankge"] >= margin["identity"] + 0.03


def test_what_they_add_to_negative_distances_without_weights_of_counts(work, data, margin):
    options = ["--model.score_offset", "none", "--model.adaptive_weights", "false", "--trainer.max_epochs", "30"]
    none = scores_of(work, "none", *data, *options)
    assert none["base"] == margin["base"]
    assert none["ankge"] >= none["base"] + 0.005
