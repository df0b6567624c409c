"""What a person may get wrong with CSMPQ on the command line: one message that names it, and exit code 1."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_apps.csmpq import APP
from tests.data_layouts import write_class_folders
from tests.lightning_apps.complaints import command, complainer

pytestmark = pytest.mark.slow

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
CELLS = ["--data.layout", "folder", "--data.root", "cells", "--data.image_size", "16", "--data.batch_size", "4"]
QUICK = [
    *("--model.encoder_options", "{channels: [8, 8, 8, 8], stem_width: 8}", "--data.num_workers", "0"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
    *QUIET,
]
NOW = ["--callbacks.allocation.begin_epoch", "0"]
CHECKPOINT = "runs/csmpq/csmpq/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with a run that has not chosen bits yet."""
    folder = tmp_path_factory.mktemp("work")
    write_class_folders(folder / "cells")
    with contextlib.chdir(folder):
        assert command(APP, "fit", *QUICK, *CELLS) == 0
    (folder / "other_app.yaml").write_text("app: emo\nmodel: {}\n")
    (folder / "list.yaml").write_text("- 1\n")
    return folder


@pytest.fixture
def complains(work, monkeypatch, capsys) -> Callable[..., str]:
    """Run a command that must fail as a person should see it, and return its message."""
    monkeypatch.chdir(work)
    monkeypatch.delenv("LIGHTNING_APPS_DEBUG", raising=False)
    return complainer(APP, (work / CHECKPOINT).parent, capsys)


@pytest.mark.parametrize("name", ["allocate", "sweep"])
def test_commands_on_a_trained_network_without_one(complains, name):
    assert complains(name, *QUIET).startswith("this command needs trained weights: give --ckpt_path FILE")
    message = complains(name, "--ckpt_path", CHECKPOINT, "--callbacks.allocation", "null", *QUIET)
    assert message.startswith("this command needs callbacks.allocation: give a configuration with a callbacks.BitAll")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--budgets", "[1]"], "mean_bits: 1 is out of reach: from the fewest to the most bits of all layers it is 2."),
        (
            ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
            "this command runs in one process",
        ),
    ],
)
def test_a_sweep_that_cannot_be(complains, options, expected):
    assert expected in complains("sweep", "--ckpt_path", CHECKPOINT, *QUIET, *options)


def test_formats_before_there_are_bits(complains):
    message = complains("export", "--ckpt_path", CHECKPOINT, "--formats", "[packed]", *QUIET)
    assert message.startswith("--formats packed: no layer has bits yet; allocate bits first, with fit or allocate")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--config", "other_app.yaml"], "emo"),
        ([*NOW, "--callbacks.allocation.mean_bits", "null"], "give a budget (size_budget, mean_bits, bops_budget)"),
        (["--callbacks.allocation.mean_bits", "2"], "mean_bits: 2 is out of reach"),
        (["--callbacks.allocation.bits", "[4,9]"], "candidate bits of bits: 9 is outside 2..8"),
        (["--callbacks.allocation.exclude", "[layer9.*]"], "exclude: 'layer9.*' matches none of the"),
        (["--callbacks.allocation.network", "encoder"], "network: QuantizedClassifier has no module 'encoder'"),
        (["--callbacks.allocation.allocation", "list.yaml"], "list.yaml: no allocation: 'layers' must have a row"),
        (["--callbacks.allocation.weight_scale", "min"], "weight_scale"),
        (["--model.quantization", "both"], "quantization"),
        (
            ["--callbacks.reconstruction", "callbacks.BlockReconstruction"],
            "weight_scale of the allocation to fixed",
        ),
        (
            ["--callbacks.reconstruction", "callbacks.BlockReconstruction", "--callbacks.allocation", "null"],
            "there are no quantizers on 'network' to fill: put a BitAllocation before this",
        ),
        (["--model.init_from", "no.ckpt"], "no.ckpt"),
    ],
)
def test_a_wrong_value_is_told_before_training(complains, options, expected):
    assert expected in complains("fit", *QUICK, *CELLS, *options, "--run.name", "wrong")
