"""Commands of the PRCL app, each in a fresh process outside the checkout, on what a short `fit` wrote."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from safetensors.torch import load_file

from datamodules import SemiSupervisedSegmentation
from modules.prcl import ProbabilisticSegmenter
from tests.callbacks.wandb_files import history
from tests.data_layouts import save_image
from tests.lightning_apps.commands import last, restored, rows, run, run_python

pytestmark = pytest.mark.slow

SHORT = ["--trainer.max_epochs", "2", "--data.images_per_epoch", "24", "--trainer.enable_progress_bar", "false"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
CLASSES = 5
PICTURES = {"street.jpg": ((70, 50), "RGB"), "deep/grey.png": ((48, 64), "L"), "wide.png": ((65, 33), "RGB")}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    run_python(folder, "fit", *SHORT, app="prcl")
    return folder


@pytest.fixture(scope="module")
def finished(work) -> Path:
    return work / "runs/prcl/prcl"


@pytest.fixture(scope="module")
def module(finished) -> ProbabilisticSegmenter:
    return restored(ProbabilisticSegmenter, finished / "checkpoints/last.ckpt")


def normalised(path: Path, module: ProbabilisticSegmenter) -> torch.Tensor:
    """A picture on disk as the network takes it, read without the suite."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    pixels = (pixels - np.float32(module.hparams.mean)) / np.float32(module.hparams.std)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


def test_a_checkpoint_holds_plain_values_and_both_networks(finished):
    for name in ("best", "last"):
        content = torch.load(finished / f"checkpoints/{name}.ckpt", weights_only=True)
        assert content["lightning_apps"]["app"] == "prcl"
        parts = {key.split(".")[0] for key in content["state_dict"]}
        assert {"student", "teacher", "heads"} <= parts
        assert set(content["callbacks"]["MetricHistory"]["values"]) == {"anchors", "precision", "variance"}


def test_the_offline_dashboard_has_pictures_tables_curves_and_histories(finished):
    logged = history(finished)
    last_of = {key: row[key] for row in logged for key in row}
    names = [str(label) for label in range(CLASSES)]
    for key, count in (("val/segmentation", 4), ("train/strong_views", 4)):
        assert (last_of[f"{key}/_type"], last_of[f"{key}/count"]) == ("images/separated", count)
        assert (last_of[f"{key}/height"], last_of[f"{key}/width"]) == (64, 4 * 64), "four parts side by side"
    assert (last_of["val/classes/_type"], last_of["val/classes/nrows"]) == ("table-file", CLASSES)
    (file,) = finished.glob(f"wandb/offline-run-*/files/{last_of['val/classes/path']}")
    content = json.loads(file.read_text())
    assert content["columns"] == ["class", "iou", "accuracy", "precision", "pixels"]
    assert [row[0] for row in content["data"]] == names
    ious = [row[1] for row in content["data"]]
    written = rows(sorted((finished / "media/val/classes").glob("*.csv"))[-1])
    assert [float(row["iou"]) for row in written] == ious
    assert np.mean(ious) == pytest.approx(last_of["val/miou_teacher"], abs=1e-4)
    for prefix in ("anchors", "precision", "variance"):
        curves = {name: [row[f"{prefix}/{name}"] for row in logged if f"{prefix}/{name}" in row] for name in names}
        assert {len(curve) for curve in curves.values()} == {2}, "one value in each epoch"
        numbers = rows(sorted((finished / f"media/history/{prefix}_values").glob("*.csv"))[-1])
        shown = {name: [float(row["value"]) for row in numbers if row["name"] == name] for name in names}
        assert shown == {name: pytest.approx(curve) for name, curve in curves.items()}
        assert last_of[f"history/{prefix}/count"] == 1
    assert all(0 < last_of[f"variance/{name}"] < 1 for name in names)


def test_scores_of_teacher_and_student_are_those_of_their_masks(work, finished, module):
    run(work, "test", "--ckpt_path", "last", app="prcl")
    data = SemiSupervisedSegmentation(layout="mosaic", labeled=10, eval_batch_size=16, num_workers=0)
    data.setup("test")
    hits, either = np.zeros((2, CLASSES)), np.zeros((2, CLASSES))
    for batch in data.test_dataloader():
        true = batch.masks.numpy()
        for row, network in enumerate((module.teacher, module.student)):
            with torch.inference_mode():
                found = network(batch.images).argmax(1).numpy()
            for label in range(CLASSES):
                hits[row, label] += ((found == label) & (true == label)).sum()
                either[row, label] += ((found == label) | (true == label)).sum()
    miou = (hits / either).mean(1)
    for name, expected in zip(("teacher", "student"), miou, strict=True):
        assert last(finished / "test/metrics.csv", f"test/miou_{name}") == pytest.approx(expected, abs=1e-4)
    assert last(finished / "test/metrics.csv", "test/main") == pytest.approx(miou[0], abs=1e-4)
    assert abs(miou[0] - miou[1]) > 1e-3, "otherwise it would not matter whose they are"


def test_masks_and_uncertainty_of_a_folder_have_the_size_of_its_pictures(work, finished, module):
    for seed, (name, (size, mode)) in enumerate(PICTURES.items()):
        save_image(work / "photos" / name, seed, size, mode)
    run(work, "predict", "--ckpt_path", "last", "--data.predict_path", "photos", app="prcl")
    kinds = ("", "_colour", "_uncertainty", "_uncertainty_colour")
    expected = {f"{name.partition('.')[0]}{kind}.png" for name in PICTURES for kind in kinds}
    folder = finished / "predict/masks"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} == expected
    for name, (size, _) in PICTURES.items():
        pictures = {kind: Image.open(folder / f"{name.partition('.')[0]}{kind}.png") for kind in kinds}
        assert {picture.size for picture in pictures.values()} == {size}
        assert [picture.mode for picture in pictures.values()] == ["L", "RGB", "I;16", "RGB"]
        images = normalised(work / "photos" / name, module)
        with torch.inference_mode():
            mask, doubt = module(images).argmax(1)[0].numpy(), module.uncertainty(images)[0, 0].numpy()
        found = {kind: np.asarray(picture) for kind, picture in pictures.items()}
        assert (found[""] == mask).mean() > 0.999, "a tie may fall to either side"
        assert np.array_equal(found["_colour"], np.asarray(module.palette, dtype=np.uint8)[found[""]])
        np.testing.assert_allclose(found["_uncertainty"], doubt * 65535, atol=3)
        assert len(np.unique(found["_uncertainty"])) > 100
        painted = colormaps["inferno"]((doubt - doubt.min()) / (doubt.max() - doubt.min()), bytes=True)[..., :3]
        assert np.abs(found["_uncertainty_colour"].astype(int) - painted.astype(int)).mean() < 0.1


def test_what_is_exported_computes_the_logits_of_the_teacher(work, finished, module):
    run(work, "export", "--ckpt_path", "last", app="prcl")
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected, other = module.teacher(images), module.student(images)
    assert not torch.allclose(expected, other, rtol=1e-2), "otherwise it would not matter whose they are"
    session = onnxruntime.InferenceSession(str(finished / "export/model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * expected.abs().max().item())
    tensors, teacher = load_file(finished / "export/model.safetensors"), module.teacher.state_dict()
    assert tensors.keys() == teacher.keys()
    assert all(torch.equal(tensors[name], value) for name, value in teacher.items())
    facts = json.loads((finished / "export/export.json").read_text())["facts"]
    assert (facts["num_classes"], facts["image_size"], facts["in_channels"]) == (CLASSES, 64, 3)


def test_two_processes_train_and_score_as_one_checkpoint(work):
    options = ["--trainer.max_epochs", "1", "--data.batch_size", "4", "--run.name", "two", "--trainer.logger", "csv"]
    run_python(work, "fit", *TWO, *SHORT, *options, app="prcl")
    folder = work / "runs/prcl/two"
    run(work, "validate", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--trainer.logger", "csv", app="prcl")
    found = last(folder / "validate/metrics.csv", "val/main")
    assert found == pytest.approx(last(folder / "metrics.csv", "val/main"), abs=1e-4)
    assert last(folder / "metrics.csv", "step") == 2, "three steps, 24 // (2 x 4)"
