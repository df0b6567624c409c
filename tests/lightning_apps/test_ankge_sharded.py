"""Entities spread over two gloo processes, through the command line."""

import pandas as pd
import pytest
import torch

from tests.lightning_apps.commands import last, run, run_python

pytestmark = pytest.mark.slow

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
QUIET += ["--trainer.logger", "csv"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", *QUIET]
ONE = ["--trainer.devices", "1", "--trainer.accelerator", "cpu", *QUIET]
SMALL = ["--config", "ankge/transe_world.yaml", "--data.world_cities", "40", "--data.batch_size", "128"]
SMALL += ["--trainer.check_val_every_n_epoch", "1"]
QUERIES = [("Belgium", "continent", ""), ("", "country", "France"), ("Germany", "neighbour", "")]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two epochs on two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    run_python(folder, "fit", *SMALL, *TWO, "--model.sharded", "true", "--trainer.max_epochs", "2", app="ankge")
    pd.DataFrame(QUERIES, columns=["head", "relation", "tail"]).to_csv(folder / "queries.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def finished(work):
    return work / "runs/ankge/transe_world"


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["tables.entities"]


def test_weights_and_scores_are_those_of_replicated_tables(work, finished):
    run_python(work, "fit", *SMALL, *TWO, "--trainer.max_epochs", "2", "--run.name", "whole", app="ankge")
    expected = weights(work / "runs/ankge/whole")
    assert torch.allclose(weights(finished), expected, atol=2e-3)
    metrics = (folder / "metrics.csv" for folder in (finished, work / "runs/ankge/whole"))
    found, expected = (last(path, "val/main") for path in metrics)
    assert found == pytest.approx(expected, abs=2e-3)


def test_scores_of_one_process_are_those_of_two(work, finished):
    for command, key in (("validate", "val/main"), ("test", "test/unlinked/mrr")):
        run(work, command, "--ckpt_path", str(finished), *ONE, app="ankge")
        one = last(finished / command / "metrics.csv", key)
        run_python(work, command, "--ckpt_path", str(finished), *TWO, app="ankge")
        assert last(finished / command / "metrics.csv", key) == pytest.approx(one, abs=1e-6)


def test_answers_of_one_process_are_those_of_two(work, finished):
    tables = []
    for options, call in ((ONE, run), (TWO, run_python)):
        call(work, "predict", "--ckpt_path", str(finished), "--data.predict_path", "queries.csv", *options, app="ankge")
        tables.append(pd.read_csv(finished / "predict/predictions.csv"))
    pd.testing.assert_frame_equal(*tables, atol=1e-4)
    assert len(tables[0]) == 10 * len(QUERIES)


def test_it_goes_on_with_one_process_and_is_a_base_for_ankge(work, finished):
    first = weights(finished)
    run(
        work,
        "fit",
        *("--ckpt_path", str(finished), "--model.sharded", "false", "--trainer.max_epochs", "3"),
        *ONE,
        app="ankge",
    )
    assert weights(finished).shape == first.shape
    assert not torch.equal(weights(finished), first)
    fit = ["fit", "--data.world_cities", "40", *ONE, "--trainer.max_epochs", "1", "--model.base", str(finished)]
    done = run(work, *fit, "--run.name", "analogies", app="ankge")
    assert "AnKGE: took the embeddings of" in done.stdout + done.stderr


def test_a_strategy_that_cannot_spread_a_table(work):
    fit = ["fit", *SMALL, *TWO, "--trainer.strategy", "ddp_spawn", "--model.sharded", "true"]
    done = run_python(work, *fit, "--run.name", "spawned", check=False, app="ankge")
    assert done.returncode != 0
    assert "sharded: the strategy is DDPStrategy started by spawn" in done.stdout + done.stderr
