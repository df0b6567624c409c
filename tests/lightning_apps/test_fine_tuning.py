"""From pre-training to a table of predictions and a deployable network, by the commands that a person types."""

import os
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from datamodules import ImageClassification, ImageDataModule, MedicalImages
from lightning_apps.bolt import APP
from lightning_apps.checkpoints import read_checkpoint
from lightning_apps.cli import main
from lightning_apps.run_folder import ENVIRONMENT
from tests.data_layouts import ISIC_CLASSES, save_image, write_aptos, write_isic, write_medmnist

pytestmark = pytest.mark.slow

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
DIGITS_ENCODER = {"patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}
SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2}
PRETRAINED = Path("runs/bolt/bolt/checkpoints/last.ckpt")


def command(*arguments: str) -> None:
    """Run a command as a process of its own would; it must succeed."""
    os.environ.pop(ENVIRONMENT, None)
    try:
        assert main(APP, list(arguments)) == 0
    finally:
        os.environ.pop(ENVIRONMENT, None)


def state(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    tensors = read_checkpoint(checkpoint)["state_dict"]
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def metric(run: Path, subcommand: str, key: str) -> float:
    values = pd.read_csv(run / subcommand / "metrics.csv")[key].dropna()
    return float(values.iloc[-1])


def plain_classifier(checkpoint: Path) -> nn.Module:
    """The timm network of a fine-tuned digits classifier, put together without the suite."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=8, in_chans=1, **DIGITS_ENCODER)
    network.load_state_dict(state(checkpoint, "network."))
    return network.eval()


def images_of(data: ImageDataModule, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    data.setup(None)
    batches = list(getattr(data, f"{split}_dataloader")())
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A working folder in which the digits were pre-trained on, fine-tuned and probed."""
    folder = tmp_path_factory.mktemp("digits")
    before = Path.cwd()
    os.chdir(folder)
    try:
        command("fit", *QUIET, "--trainer.max_epochs", "1")
        short = [*QUIET, "--trainer.max_epochs", "2"]
        command("fit", "--config", "bolt/finetune.yaml", "--model.init_from", str(PRETRAINED), *short)
        command("fit", "--config", "bolt/linear.yaml", "--model.init_from", str(PRETRAINED), *short)
        for name in ("finetune", "linear"):
            checkpoint = f"runs/bolt/{name}/checkpoints/best.ckpt"
            command("test", "--ckpt_path", checkpoint, *QUIET)
            command("predict", "--ckpt_path", checkpoint, *QUIET)
            command("export", "--ckpt_path", checkpoint)
    finally:
        os.chdir(before)
    return folder


def test_linear_evaluation_leaves_the_pretrained_encoder_as_it_was(digits):
    pretrained = state(digits / PRETRAINED, "online.encoder.")
    probed = state(digits / "runs/bolt/linear/checkpoints/last.ckpt", "network.")
    for name, tensor in pretrained.items():
        torch.testing.assert_close(probed[name], tensor, rtol=0, atol=0, msg=name)
    assert set(probed) - set(pretrained) == {"head.weight", "head.bias"}


def test_fine_tuning_starts_from_the_branch_that_was_asked_for(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for which in ("online", "target"):
        still = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--model.lr", "1e-30"]
        options = ["--model.init_from", str(digits / PRETRAINED), "--model.which", which, "--run.name", which]
        command("fit", "--config", "bolt/finetune.yaml", *options, *QUIET, *still)
        found = state(tmp_path / f"runs/bolt/{which}/checkpoints/last.ckpt", "network.")
        for name, tensor in state(digits / PRETRAINED, f"{which}.encoder.").items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_fine_tuning_trains_the_whole_network_and_learns(digits):
    pretrained = state(digits / PRETRAINED, "online.encoder.")
    tuned = state(digits / "runs/bolt/finetune/checkpoints/last.ckpt", "network.")
    assert all(not torch.equal(tuned[name], tensor) for name, tensor in pretrained.items() if name != "cls_token")
    losses = pd.read_csv(digits / "runs/bolt/finetune/metrics.csv")["val/loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0]


def test_linear_evaluation_learns(digits):
    assert metric(digits / "runs/bolt/linear", "", "val/acc") > 0.3


def test_the_metrics_of_test_are_those_of_the_predictions(digits):
    _, labels = images_of(ImageClassification(layout="digits"), "test")
    for name in ("finetune", "linear"):
        run = digits / "runs/bolt" / name
        table = pd.read_csv(run / "predict/predictions.csv")
        answers = table[[str(digit) for digit in range(10)]].to_numpy().argmax(axis=1)
        assert metric(run, "test", "test/acc") == pytest.approx(np.mean(answers == labels.numpy()), abs=1e-6)
        recalls = [np.mean(answers[labels.numpy() == digit] == digit) for digit in range(10)]
        assert metric(run, "test", "test/balanced_acc") == pytest.approx(np.mean(recalls), abs=1e-6)
        assert metric(run, "test", "test/main") == metric(run, "test", "test/acc")


def test_predictions_have_the_form_of_the_data_set(digits):
    data = ImageClassification(layout="digits")
    data.setup("test")
    table = pd.read_csv(digits / "runs/bolt/finetune/predict/predictions.csv")
    assert table.columns.tolist() == ["id", *data.class_names]
    assert table["id"].tolist() == data.sample_ids("test")
    np.testing.assert_allclose(table[data.class_names].sum(axis=1), 1, atol=1e-5)


def test_the_exported_classifier_gives_the_logits_behind_the_predictions(digits):
    run = digits / "runs/bolt/finetune"
    network = plain_classifier(run / "checkpoints/best.ckpt")
    images, _ = images_of(ImageClassification(layout="digits"), "test")
    with torch.inference_mode():
        logits = network(images)
    session = onnxruntime.InferenceSession(str(run / "export/model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], logits.numpy(), atol=1e-4)
    table = pd.read_csv(run / "predict/predictions.csv")
    np.testing.assert_allclose(table.iloc[:, 1:].to_numpy(), logits.softmax(1).numpy(), atol=1e-5)
    network.load_state_dict(load_file(run / "export/model.safetensors"))
    with torch.inference_mode():
        assert torch.equal(network(images), logits)


def test_the_exported_linear_classifier_needs_no_standardisation_of_its_own(digits):
    run = digits / "runs/bolt/linear"
    network = plain_classifier(run / "checkpoints/best.ckpt")
    kept = state(run / "checkpoints/best.ckpt", "standardise.")
    images, _ = images_of(ImageClassification(layout="digits"), "test")
    with torch.inference_mode():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        features = (features - kept["running_mean"]) / (kept["running_var"] + 1e-5).sqrt()
        expected = network.head(features)
        session = onnxruntime.InferenceSession(str(run / "export/model.onnx"), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected.numpy(), atol=1e-3)
        network.load_state_dict(load_file(run / "export/model.safetensors"))
        np.testing.assert_allclose(network(images).numpy(), expected.numpy(), atol=1e-3)


def test_a_run_that_was_moved_goes_on_without_the_file_it_started_from(digits, tmp_path, monkeypatch):
    shutil.copytree(digits / "runs/bolt/finetune", tmp_path / "runs/bolt/finetune")
    monkeypatch.chdir(tmp_path)
    checkpoint = "runs/bolt/finetune/checkpoints/last.ckpt"
    before = read_checkpoint(tmp_path / checkpoint)
    command("fit", "--ckpt_path", checkpoint, "--trainer.max_epochs", "3", *QUIET)
    after = read_checkpoint(tmp_path / checkpoint)
    assert (before["epoch"], after["epoch"]) == (1, 2)
    assert sorted(path.name for path in (tmp_path / checkpoint).parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    scores = [next(v for k, v in c["callbacks"].items() if "Checkpoint" in k) for c in (before, after)]
    assert scores[1]["best_model_score"] >= scores[0]["best_model_score"]
    assert scores[1]["best_model_path"] == str(tmp_path / "runs/bolt/finetune/checkpoints/best.ckpt")
    assert sorted(path.name for path in (tmp_path / "runs/bolt").iterdir() if path.is_dir()) == ["finetune"]


def test_fewer_labels(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data.labels_per_class", "10", "--data.batch_size", "20", "--trainer.max_epochs", "1"]
    command("fit", "--config", "bolt/finetune.yaml", "--model.init_from", str(digits / PRETRAINED), *options, *QUIET)
    assert read_checkpoint(tmp_path / "runs/bolt/finetune/checkpoints/last.ckpt")["global_step"] == 5


def pretrain_and_fine_tune(folder: Path, pretrain: str, fine_tune: str, options: list[str], encoder: dict) -> Path:
    """One step of each, then test and predict; returns the fine-tuned run."""
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    small = ["--model.encoder_options", str(encoder), "--data.num_workers", "0", "--data.batch_size", "8"]
    command("fit", "--config", pretrain, *small, *few, *options, *QUIET, "--run.name", "first")
    start = ["--model.init_from", "runs/bolt/first/checkpoints/last.ckpt", "--run.name", "second"]
    command("fit", "--config", fine_tune, *small, *few, *start, *options, *QUIET)
    for name in ("first", "second"):
        command("test", "--ckpt_path", f"runs/bolt/{name}", *QUIET)
        command("predict", "--ckpt_path", f"runs/bolt/{name}", *QUIET)
    return folder / "runs/bolt/second"


SPLIT = ["--data.val_fraction", "0.2", "--data.test_fraction", "0.2"]


def test_isic_2019(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data.root", str(write_isic(tmp_path / "isic")), *SPLIT, "--model.encoder", "vit_small_patch16_224"]
    recipes = ("bolt/isic2019_vit_s.yaml", "bolt/finetune_isic2019.yaml")
    run = pretrain_and_fine_tune(tmp_path, *recipes, options, SMALL)
    data = MedicalImages(layout="isic2019", root="isic", val_fraction=0.2, test_fraction=0.2)
    for folder in (run, run.parent / "first"):
        table = pd.read_csv(folder / "predict/predictions.csv")
        assert table.columns.tolist() == ["image", *ISIC_CLASSES]
        assert table["image"].tolist() == data.sample_ids("test")
        np.testing.assert_allclose(table[list(ISIC_CLASSES)].sum(axis=1), 1, atol=1e-5)
        assert (table["UNK"] == 0).all()
    assert metric(run, "test", "test/main") == metric(run, "test", "test/balanced_acc")


def test_aptos_2019(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data.root", str(write_aptos(tmp_path / "aptos")), "--model.encoder", "vit_base_patch16_224"]
    recipes = ("bolt/aptos2019_vit_b.yaml", "bolt/finetune_aptos2019.yaml")
    run = pretrain_and_fine_tune(tmp_path, *recipes, options, SMALL)
    data = MedicalImages(layout="aptos2019", root="aptos")
    for folder in (run, run.parent / "first"):
        text = (folder / "predict/predictions.csv").read_text()
        assert text.splitlines()[0] == "id_code,diagnosis"
        assert [line.split(",")[0] for line in text.splitlines()[1:]] == data.sample_ids("test")
        assert {line.split(",")[1] for line in text.splitlines()[1:]} <= {"0", "1", "2", "3", "4"}
    assert metric(run, "test", "test/main") == metric(run, "test", "test/kappa")

    for name in ("fundus_b", "fundus_a"):
        save_image(tmp_path / f"new/{name}.jpg", seed=1, size=(64, 48))
    command("predict", "--ckpt_path", "runs/bolt/second", "--data.predict_path", "new", *QUIET)
    table = pd.read_csv(run / "predict/predictions.csv")
    assert table["id_code"].tolist() == ["fundus_a", "fundus_b"]


def test_medmnist_with_the_options_that_the_recipe_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_medmnist(tmp_path / "npz", "retinamnist", classes=5)
    options = ["--data", "datamodules.MedicalImages", "--data.name", "retinamnist", "--data.root", "npz"]
    options += ["--data.verify_md5", "false", "--data.download", "false"]
    encoder = {"patch_size": 4, **SMALL}
    run = pretrain_and_fine_tune(tmp_path, "bolt/retinamnist.yaml", "bolt/finetune.yaml", options, encoder)
    table = pd.read_csv(run / "predict/predictions.csv")
    data = MedicalImages(layout="medmnist", root="npz", name="retinamnist", verify_md5=False, download=False)
    assert table.columns.tolist() == ["id", *data.class_names]
    assert len(table) == 12
