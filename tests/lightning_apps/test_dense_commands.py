"""Segmentation and detection of the EMO app: each command in a fresh process outside the checkout."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from datamodules import ObjectDetection, SemanticSegmentation
from modules.detection import Detector
from modules.segmentation import DenseSegmenter
from tests.data_layouts import write_camvid, write_coco
from tests.lightning_apps.commands import last, restored, run

pytestmark = pytest.mark.slow

SHORT = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
SIDE = 64


@pytest.fixture(scope="module")
def streets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streets")
    write_camvid(folder / "camvid")
    sizes = ["--data.image_size", str(SIDE), "--data.train_shorter_side", "64", "--data.test_shorter_side", "48"]
    options = ["--data.root", str(folder / "camvid"), "--data.batch_size", "2", *sizes]
    run(folder, "fit", "--config", "emo/camvid_deeplabv3_1m.yaml", *options, *SHORT, app="emo")
    return folder


def test_masks_of_a_trained_segmenter_are_written_and_scored(streets):
    folder = streets / "runs/emo/camvid_deeplabv3_1m"
    checkpoint = folder / "checkpoints/last.ckpt"
    run(streets, "predict", "--ckpt_path", str(checkpoint), app="emo")
    run(streets, "test", "--ckpt_path", str(checkpoint), app="emo")
    data = SemanticSegmentation(layout="camvid", root=str(streets / "camvid"), test_shorter_side=48, num_workers=0)
    module, hits, either = restored(DenseSegmenter, checkpoint), np.zeros(11), np.zeros(11)
    data.setup("test")
    for batch, name in zip(data.test_dataloader(), data.sample_ids("test"), strict=True):
        with torch.inference_mode():
            logits = torch.nn.functional.interpolate(module(batch.images), batch.masks.shape[1:], mode="bilinear")
        expected, true = logits.argmax(1)[0].numpy(), batch.masks[0].numpy()
        found = np.asarray(Image.open(folder / f"predict/masks/{name}.png"))
        assert (found == expected).mean() > 0.999, "a tie may fall to either side"
        for label in range(11):
            seen = true != 255
            hits[label] += ((expected == label) & (true == label) & seen).sum()
            either[label] += (((expected == label) | (true == label)) & seen).sum()
        assert Image.open(folder / f"predict/masks/{name}_colour.png").size == found.shape[::-1]
    miou = (hits[either > 0] / either[either > 0]).mean()
    assert last(folder / "test/metrics.csv", "test/miou") == pytest.approx(miou, abs=1e-3)


def test_an_exported_segmenter_computes_the_logits(streets):
    folder = streets / "runs/emo/camvid_deeplabv3_1m"
    run(streets, "export", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), app="emo")
    module = restored(DenseSegmenter, folder / "checkpoints/last.ckpt")
    images = torch.randn(3, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = module(images).numpy()
    session = onnxruntime.InferenceSession(str(folder / "export/model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    write_coco(folder / "coco")
    options = ["--data.root", str(folder / "coco"), "--data.batch_size", "2", "--data.image_size", str(SIDE)]
    options += [
        "--model.norm_eval",
        "false",
        "--model.score_threshold",
        "0.0",
        "--trainer.check_val_every_n_epoch",
        "1",
    ]
    options += ["--model.init_from", "null", "--trainer.precision", "32-true", "--trainer.devices", "1"]
    options += ["--trainer.accelerator", "cpu"]
    run(folder, "fit", "--config", "emo/coco_ssdlite_1m.yaml", *options, *SHORT, app="emo")
    return folder


def test_detections_of_a_trained_detector_are_written_in_pixels_of_the_pictures(objects):
    folder = objects / "runs/emo/coco_ssdlite_1m"
    run(objects, "predict", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), app="emo")
    results = json.loads((folder / "predict/detections.json").read_text())
    data = ObjectDetection(layout="coco", root=str(objects / "coco"), image_size=SIDE, eval_batch_size=1, num_workers=0)
    module = restored(Detector, folder / "checkpoints/last.ckpt")
    data.setup("validate")
    compared = 0
    for batch, name in zip(data.val_dataloader(), data.sample_ids("val"), strict=True):
        written = [entry for entry in results if entry["image_id"] == int(Path(name).stem)]
        with torch.inference_mode():
            found = module(batch.images)[0]
        height, width = batch.targets[0]["size"].tolist()
        left, top, right, bottom = (found["boxes"] * torch.tensor([width, height] * 2) / SIDE).unbind(1)
        expected = torch.stack([left, top, right - left, bottom - top], dim=1).numpy()
        np.testing.assert_allclose([entry["bbox"] for entry in written], expected, atol=0.02)
        np.testing.assert_allclose([entry["score"] for entry in written], found["scores"].numpy(), atol=1e-5)
        assert [entry["category_id"] for entry in written] == [(1, 10, 24)[label - 1] for label in found["labels"]]
        compared += len(written)
    assert compared == len(results) > 0
    assert len(list((folder / "predict/detections").glob("*.png"))) == 4


def test_an_exported_detector_computes_boxes_and_scores(objects):
    folder = objects / "runs/emo/coco_ssdlite_1m"
    run(objects, "export", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--tolerance", "1e-3", app="emo")
    network = restored(Detector, folder / "checkpoints/last.ckpt").deployable_network()
    images = torch.rand(3, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = network(images).numpy()
    session = onnxruntime.InferenceSession(str(folder / "export/model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
