"""What a person may get wrong with PRCL on the command line: one message that names it, and exit code 1."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_apps.config_files import SHIPPED
from lightning_apps.prcl import APP
from tests.lightning_apps.complaints import command, complainer
from tests.modules.street_scenes import TINY_BACKBONE

pytestmark = pytest.mark.slow

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
QUICK = [
    *("--model.backbone", TINY_BACKBONE, "--model.dimensions", "8", "--model.anchors", "4", "--model.negatives", "4"),
    *("--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1"),
    *("--data.images_per_epoch", "2", "--data.batch_size", "2"),
    *QUIET,
]
TEACHER = [
    *("--callbacks.teacher", "callbacks.EMATarget"),
    *("--callbacks.teacher.online", "student", "--callbacks.teacher.target", "teacher"),
]
CHECKPOINT = "runs/prcl/prcl/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with a trained run."""
    folder = tmp_path_factory.mktemp("work")
    with contextlib.chdir(folder):
        assert command(APP, "fit", *QUICK) == 0
    (folder / "wider.yaml").write_text("app: prcl\nmodel: {init_args: {backbone: mobilenetv3_small_075}}\n")
    (folder / "own.yaml").write_text((SHIPPED / "prcl/supervised.yaml").read_text())
    return folder


@pytest.fixture
def complains(work, monkeypatch, capsys) -> Callable[..., str]:
    """Run a command that must fail as a person should see it, and return its message."""
    monkeypatch.chdir(work)
    monkeypatch.delenv("LIGHTNING_APPS_DEBUG", raising=False)
    return complainer(APP, (work / CHECKPOINT).parent, capsys)


def test_a_checkpoint_of_other_classes(complains):
    message = complains("test", "--ckpt_path", CHECKPOINT, "--data.layout", "shapes", *QUIET)
    assert message.startswith(f"--ckpt_path {CHECKPOINT}: does not fit ProbabilisticSegmenter.\n")
    assert "It was trained on other data (num_classes: 5 in the checkpoint, 11 in the data)." in message


def test_a_checkpoint_of_another_backbone(complains):
    message = complains("test", "--ckpt_path", CHECKPOINT, "--config", "wider.yaml", *QUIET)
    assert message.startswith(f"--ckpt_path {CHECKPOINT}: does not fit ProbabilisticSegmenter.\n")
    settings = f"model.init_args.backbone: 'mobilenetv3_small_075' (given) instead of '{TINY_BACKBONE}' (checkpoint)"
    assert f"It was trained with other settings ({settings})." in message
    assert "more lines of this kind" in message
    assert len(message.splitlines()) < 12


def test_a_checkpoint_of_another_method(complains):
    message = complains("test", "--ckpt_path", CHECKPOINT, "--config", "own.yaml", *QUIET)
    assert "model.init_args.method: 'supervised' (given) instead of 'prcl' (checkpoint)" in message


def test_a_shipped_overlay_does_not_change_a_checkpoint(work, monkeypatch, caplog):
    monkeypatch.chdir(work)
    caplog.set_level("INFO")
    options = ["--config", "prcl/supervised.yaml", "--trainer.limit_test_batches", "1"]
    assert command(APP, "test", "--ckpt_path", CHECKPOINT, *options, *QUIET) == 0
    assert "the checkpoint comes before a shipped configuration: model.init_args.method: 'prcl' (used)" in caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--config", "prcl/supervised.yaml", *TEACHER], "EMATarget: target='teacher' is no module of Probabilistic"),
        (["--data.batch_size", "1"], "a training batch holds 1 image, but the head normalises means of whole images"),
        (["--data.unlabeled_batch_size", "1"], "raise data.batch_size and data.unlabeled_batch_size above 1"),
        (["--model.temperature", "0"], "temperature: 0.0 is not positive"),
        (["--model.anchors", "0"], "anchors: 0 is below 1"),
        (["--model.mix", "mixup"], "mixup"),
        (["--model.strong_scale", "[1.5, 0.5]"], "strong_scale"),
        (["--model.weak_threshold", "1.5"], "weak_threshold: 1.5 is outside [0, 1]"),
        (["--callbacks.teacher.momentum", "1.0"], "momentum is 1.0, expected a number in [0, 1)"),
        (["--data.use_unlabeled", "false"], "but the data gives labeled without unlabeled: take datamodules.Semi"),
        (["--model.lr", "1e30"], "not finite: "),
    ],
)
def test_a_wrong_value_is_told(complains, options, expected):
    assert expected in complains("fit", *QUICK, "--data.images_per_epoch", "6", *options, "--run.name", "wrong")


def test_the_samples_of_a_loss_that_is_not_a_number_are_named(complains):
    message = complains("fit", *QUICK, "--data.images_per_epoch", "6", "--model.lr", "1e30", "--run.name", "diverged")
    assert "samples of labeled: train_" in message
    assert "samples of unlabeled: train_" in message


def test_a_teacher_that_nothing_moves_is_warned_of(work, monkeypatch):
    monkeypatch.chdir(work)
    with pytest.warns(UserWarning, match="no callback moves the teacher"):
        assert command(APP, "fit", *QUICK, "--callbacks.teacher", "null", "--run.root", "still") == 0
