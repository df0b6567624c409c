"""Every command of the BOLT app, each in a fresh process outside the checkout, on what `fit` wrote."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from datamodules import ImageClassification
from lightning_apps.checkpoints import read_checkpoint
from tests.lightning_apps.commands import clean_environment, last, rows, run, run_python

pytestmark = pytest.mark.slow

SHORT = [
    "--trainer.max_epochs",
    "2",
    "--callbacks.probes.every_n_epochs",
    "1",
    "--trainer.enable_progress_bar",
    "false",
]
ENCODER = {"patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    run_python(folder, "fit", "--config", "bolt.yaml", *SHORT)
    return folder


@pytest.fixture(scope="module")
def finished(work) -> Path:
    return work / "runs" / "bolt" / "bolt"


def encoder_of(checkpoint: Path) -> torch.nn.Module:
    """The plain timm network with the online encoder's weights, put together without the suite."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=8, in_chans=1, **ENCODER)
    weights = read_checkpoint(checkpoint)["state_dict"]
    prefix = "online.encoder."
    network.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
    return network.eval()


def test_fit_leaves_one_complete_run_folder(work, finished):
    assert [path.name for path in (work / "runs" / "bolt").iterdir() if not path.name.startswith(".")] == ["bolt"]
    assert sorted(path.name for path in work.iterdir()) == ["runs"]
    assert (finished / "checkpoints" / "last.ckpt").is_file()
    assert (finished / "checkpoints" / "best.ckpt").is_file()
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["class_path"] == "modules.bolt.BOLT"
    assert config["trainer"]["max_epochs"] == 2
    assert json.loads((finished / "versions.json").read_text())["torch"] == torch.__version__.split("+")[0]
    assert last(finished / "metrics.csv", "train/loss") < 4
    assert 0.1 < last(finished / "metrics.csv", "val/main") <= 1
    assert list((finished / "wandb").glob("offline-run-*/*.wandb"))
    pictures = {path.relative_to(finished / "media").parts[0] for path in (finished / "media").rglob("*.png")}
    assert {"val", "perturbed"} <= pictures


def test_the_checkpoint_holds_plain_values(finished):
    content = read_checkpoint(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["lightning_apps"]["app"] == "bolt"
    assert content["lightning_apps"]["facts"]["class_names"] == [str(digit) for digit in range(10)]


def test_validate_and_test_report_what_was_learned(work, finished):
    run(work, "validate", "--ckpt_path", "last")
    assert last(finished / "validate/metrics.csv", "val/main") == pytest.approx(
        last(finished / "metrics.csv", "val/main"), abs=1e-6
    )
    run(work, "test", "--ckpt_path", str(finished / "checkpoints/best.ckpt"))
    assert 0.1 < last(finished / "test/metrics.csv", "test/linear_acc") <= 1


def test_predict_writes_probabilities_by_name(work, finished):
    run_python(work, "predict", "--ckpt_path", "last")
    table = pd.read_csv(finished / "predict" / "predictions.csv")
    data = ImageClassification(layout="digits")
    assert table["id"].tolist() == data.sample_ids("test")
    assert table.columns.tolist() == ["id", *data.class_names]
    np.testing.assert_allclose(table[data.class_names].sum(axis=1), 1, atol=1e-5)


def test_features_are_those_of_the_online_encoder(work, finished):
    run(work, "features", "--ckpt_path", "last")
    network = encoder_of(finished / "checkpoints" / "last.ckpt")
    data = ImageClassification(layout="digits")
    data.setup("test")
    with torch.inference_mode():
        expected = torch.cat([network(batch.images) for batch in data.test_dataloader()]).numpy()
    with np.load(finished / "features" / "test.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["features"], expected, atol=1e-5)
        assert file["id"].tolist() == data.sample_ids("test")
    with np.load(finished / "features" / "train.npz", allow_pickle=False) as file:
        assert len(file["label"]) == 1439


def test_export_needs_no_data_and_equals_the_encoder(work, finished):
    run(work, "export", "--ckpt_path", str(finished / "checkpoints/last.ckpt"), "--data.root", "/nowhere")
    network = encoder_of(finished / "checkpoints" / "last.ckpt")
    images = torch.randn(3, 1, 8, 8)
    expected = network(images).detach().numpy()
    session = onnxruntime.InferenceSession(str(finished / "export/model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-4)
    network.load_state_dict(load_file(finished / "export" / "model.safetensors"))
    np.testing.assert_array_equal(network(images).detach().numpy(), expected)


def test_a_run_stopped_by_sigterm_and_resumed_ends_as_the_uninterrupted_one(work, finished):
    command = [sys.executable, "-m", "lightning_apps.bolt", "fit", "--run.name", "stopped", *SHORT]
    process = subprocess.Popen(
        command, cwd=work, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    stopped = work / "runs/bolt/stopped"
    started = time.monotonic()
    while (
        not list(stopped.glob("checkpoints/best.ckpt")) and process.poll() is None and time.monotonic() - started < 200
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0].decode()
    content = read_checkpoint(stopped / "checkpoints/last.ckpt")
    assert 11 <= content["global_step"] < 22, output
    run(work, "fit", "--ckpt_path", str(stopped / "checkpoints/last.ckpt"))
    ours = read_checkpoint(stopped / "checkpoints/last.ckpt")["state_dict"]
    whole = read_checkpoint(finished / "checkpoints/last.ckpt")["state_dict"]
    for name, tensor in whole.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)
    steps = [int(row["step"]) for row in rows(finished / "metrics.csv")]
    assert [int(row["step"]) for row in rows(stopped / "metrics.csv")] == steps


def test_an_error_is_one_message_without_a_traceback(work):
    done = run(work, "fit", "--data", "datamodules.MedicalImages", "--data.root", "/nowhere/at/all", check=False)
    assert done.returncode == 1
    assert "/nowhere/at/all" in done.stderr
    assert "Traceback" not in done.stderr
    debug = run(work, "fit", "--data.layout", "folder", "--data.root", "/no", check=False, LIGHTNING_APPS_DEBUG="1")
    assert "Traceback" in debug.stderr


def test_help_and_print_config_are_clean(work):
    done = run(work, "fit", "--print_config")
    assert done.stderr == ""
    assert yaml.safe_load(done.stdout)["app"] == "bolt"
    for start, arguments in ((run_python, ["--help"]), (run, ["fit", "--help"]), (run, ["export", "--help"])):
        done = start(work, *arguments)
        assert done.stderr == ""
        assert done.stdout.startswith("usage: python -m lightning_apps.bolt")
