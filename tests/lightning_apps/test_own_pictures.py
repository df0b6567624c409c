"""A person's own folder of pictures and masks: what a trained run does without it, and what may be wrong with it."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import SemiSupervisedSegmentation
from lightning_apps.errors import message_of
from lightning_apps.prcl import APP
from lightning_apps.run_folder import CHECKPOINT_KEY
from tests.data_layouts import halves, save_image, save_mask, write_mask_folder
from tests.lightning_apps.complaints import command, complainer
from tests.modules.street_scenes import TINY_BACKBONE

pytestmark = pytest.mark.slow

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
QUICK = [
    *("--data.layout", "folder", "--data.image_size", "33", "--data.labeled", "4", "--data.batch_size", "2"),
    *("--data.images_per_epoch", "2", "--data.eval_batch_size", "1", "--data.labeled_scale", "[2,2]"),
    *("--model.backbone", TINY_BACKBONE, "--model.dimensions", "8", "--model.anchors", "4", "--model.negatives", "4"),
    *("--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1"),
    *QUIET,
]
UNCERTAINTY = ("_uncertainty", "_uncertainty_colour")
CHECKPOINT = "runs/prcl/prcl/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with a run that was trained on a folder of pictures."""
    folder = tmp_path_factory.mktemp("work")
    write_mask_folder(folder / "own", [f"p{number:02}" for number in range(12)])
    (folder / "own/classes.txt").write_text("01\nnull\n3\n")  # names that are no text to YAML
    for seed, size in enumerate(((40, 32), (32, 48))):
        save_image(folder / f"new/{size[0]}.png", seed, size)
    with contextlib.chdir(folder):
        assert command(APP, "fit", "--data.root", "own", *QUICK) == 0
    return folder


@pytest.fixture
def complains(work, monkeypatch, capsys) -> Callable[..., str]:
    """Run a command that must fail as a person should see it, and return its message."""
    monkeypatch.chdir(work)
    monkeypatch.delenv("LIGHTNING_APPS_DEBUG", raising=False)
    return complainer(APP, (work / CHECKPOINT).parent, capsys)


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_pictures_are_predicted_where_the_training_data_is_not(work, tmp_path, monkeypatch):
    """Just as where it is, by a checkpoint that does not describe it."""
    monkeypatch.chdir(work)
    predict = ["predict", "--data.predict_path", str(work / "new"), *QUIET]
    content = torch.load(CHECKPOINT, weights_only=True)
    assert content[CHECKPOINT_KEY].pop("data_description")
    torch.save(content, tmp_path / "bare.ckpt")
    assert command(APP, *predict, "--ckpt_path", str(tmp_path / "bare.ckpt"), "--run.name", "reference") == 0
    expected = masks(work / "runs/prcl/reference/predict/masks")
    assert set(expected) == {f"{name}{kind}.png" for name in (32, 40) for kind in ("", "_colour", *UNCERTAINTY)}

    ignore = shutil.ignore_patterns("predict")
    shutil.copytree(work / "runs/prcl/prcl", tmp_path / "runs/prcl/prcl", ignore=ignore)
    monkeypatch.chdir(tmp_path)
    assert command(APP, *predict, "--ckpt_path", "bare.ckpt") == 1, "which is not read from the data that is not here"
    assert command(APP, *predict, "--ckpt_path", CHECKPOINT) == 0
    found = masks(tmp_path / "runs/prcl/prcl/predict/masks")
    assert set(found) == set(expected)
    for name, mask in expected.items():
        assert np.array_equal(found[name], mask), name


def test_a_part_of_the_training_data_that_is_not_there(complains, tmp_path, monkeypatch):
    checkpoint = str(Path(CHECKPOINT).absolute())
    monkeypatch.chdir(tmp_path)
    assert complains("test", "--ckpt_path", checkpoint, *QUIET).startswith("--data.root 'own' does not exist")


def test_errors_of_loading_processes_are_one_message(complains, tmp_path):
    root = write_mask_folder(tmp_path / "own", [f"p{number:02}" for number in range(12)])
    labelled = SemiSupervisedSegmentation(layout="folder", root=str(root), labeled=4).sample_ids("labeled")
    for path in (root / "masks").iterdir():
        if path.stem not in labelled:  # whose masks are looked at before any process is started
            save_mask(path, halves(7, 1, (32, 24), void=255))
    message = complains("fit", "--data.root", str(root), *QUICK, "--data.num_workers", "1")
    assert "has the value 7, expected 0..2 for a class" in message
    assert "DataLoader" not in message
    assert message.startswith(str(tmp_path))


def test_a_picture_to_predict_that_cannot_be_read(complains, tmp_path):
    save_image(tmp_path / "a.png", 1)
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    message = complains("predict", "--ckpt_path", CHECKPOINT, "--data.predict_path", str(tmp_path), *QUIET)
    assert message.startswith(f"{tmp_path / 'b.jpg'}: cannot be decoded (")
    assert "DataLoader" not in message


def test_pictures_whose_files_would_overwrite_each_other(complains, tmp_path):
    for name in ("a", "a_colour"):
        save_image(tmp_path / f"{name}.png", 1)
    message = complains("predict", "--ckpt_path", CHECKPOINT, "--data.predict_path", str(tmp_path), *QUIET)
    assert message.startswith(
        "MaskWriter: the file a_colour.png would be that of 'a' and that of 'a_colour'; rename one of the two pictures"
    )


def test_the_message_of_an_error_out_of_a_loading_process():
    chained = (
        "Caught ValueError in DataLoader worker process 1.\n"
        "Original Traceback (most recent call last):\n"
        '  File "a.py", line 1, in read\n'
        "KeyError: 3\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n"
        '  File "b.py", line 2, in fetch\n'
        "ValueError: mask.png: has the value 7\nin row 3\n"
    )
    assert message_of(ValueError(chained)) == "mask.png: has the value 7\nin row 3"
    assert message_of(ValueError("Caught ValueError")) == "Caught ValueError"
