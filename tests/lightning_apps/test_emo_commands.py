"""Every command of the EMO app, each in a fresh process outside the checkout, on what `fit` wrote."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

import modules.emo  # noqa: F401  # registers emo_1m in timm
from datamodules import ImageClassification
from lightning_apps.checkpoints import read_checkpoint
from tests.lightning_apps.commands import last, rows, run, run_python

pytestmark = pytest.mark.slow

SHORT = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "4", "--trainer.enable_progress_bar", "false"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    run_python(folder, "fit", *SHORT, app="emo")
    return folder


@pytest.fixture(scope="module")
def finished(work) -> Path:
    return work / "runs" / "emo" / "emo"


def network_of(checkpoint: Path) -> torch.nn.Module:
    """The network with the averaged weights, put together without the suite's classifier."""
    content = read_checkpoint(checkpoint)
    settings = content["hyper_parameters"]
    network = timm.create_model(
        settings["encoder"],
        in_chans=settings["in_channels"],
        num_classes=settings["num_classes"],
        **settings["encoder_options"],
    )
    prefix = "network."
    network.load_state_dict({k[len(prefix) :]: v for k, v in content["state_dict"].items() if k.startswith(prefix)})
    return network.eval()


def test_fit_logs_both_sets_of_weights_and_leaves_checkpoints_of_plain_values(finished):
    metrics = rows(finished / "metrics.csv")
    assert {"train/loss", "val/acc", "raw/val/acc", "val/main"} <= metrics[0].keys()
    content = read_checkpoint(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["lightning_apps"]["app"] == "emo"
    assert content["state_dict"].keys() == content["current_model_state"].keys()


def test_validate_scores_the_averaged_weights_of_the_checkpoint(work, finished):
    run(work, "validate", "--ckpt_path", "last", app="emo")
    found = last(finished / "validate" / "metrics.csv", "val/main")
    assert found == pytest.approx(last(finished / "metrics.csv", "val/main"), abs=1e-6)


def test_test_and_predict_agree_with_the_plain_network(work, finished):
    run(work, "test", "--ckpt_path", "last", app="emo")
    run(work, "predict", "--ckpt_path", "last", app="emo")
    table = pd.read_csv(finished / "predict" / "predictions.csv")
    config = read_checkpoint(finished / "checkpoints" / "last.ckpt")["lightning_apps"]["config"]["data"]["init_args"]
    data = ImageClassification(**{key: value for key, value in config.items() if value is not None})
    data.setup("test")
    network = network_of(finished / "checkpoints" / "last.ckpt")
    with torch.inference_mode():
        pairs = [(network(batch.images).softmax(1), batch.labels) for batch in data.test_dataloader()]
    expected = torch.cat([probabilities for probabilities, _ in pairs])
    labels = torch.cat([labels for _, labels in pairs])
    np.testing.assert_allclose(table[data.class_names].to_numpy(), expected.numpy(), atol=1e-4)
    accuracy = (expected.argmax(1) == labels).float().mean().item()
    assert last(finished / "test" / "metrics.csv", "test/acc") == pytest.approx(accuracy, abs=1e-6)


def test_export_writes_three_files_that_compute_what_the_network_does(work, finished):
    run(work, "export", "--ckpt_path", "last", "--formats", "[onnx,safetensors,pt2]", app="emo")
    folder = finished / "export"
    facts = json.loads((folder / "export.json").read_text())["facts"]
    images = torch.randn(3, facts["in_channels"], facts["image_size"], facts["image_size"])
    network = network_of(finished / "checkpoints" / "last.ckpt")
    with torch.inference_mode():
        expected = network(images)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(images), expected, rtol=1e-4, atol=1e-4)
    network.load_state_dict(load_file(folder / "model.safetensors"))


def test_two_processes_train_and_score_as_one_checkpoint(work):
    run_python(work, "fit", *TWO, *SHORT, "--run.name", "two", app="emo")
    folder = work / "runs" / "emo" / "two"
    run(work, "validate", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), app="emo")
    found = last(folder / "validate" / "metrics.csv", "val/main")
    assert found == pytest.approx(last(folder / "metrics.csv", "val/main"), abs=1e-6)


def test_bfloat16_trains(work):
    longer = ["--trainer.limit_train_batches", "20", "--trainer.precision", "bf16-mixed", "--run.name", "bf16"]
    run(work, "fit", *SHORT, *longer, app="emo")
    losses = [float(row["train/loss"]) for row in rows(work / "runs/emo/bf16/metrics.csv") if row.get("train/loss")]
    assert len(losses) == 2
    assert losses[1] < 0.85 * losses[0]
