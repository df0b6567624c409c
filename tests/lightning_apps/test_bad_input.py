"""What a person may get wrong on the command line: one message that names it, exit code 1, nothing lost."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_apps.bolt import APP
from tests.data_layouts import write_aptos, write_class_folders, write_isic
from tests.lightning_apps.complaints import command, complainer

pytestmark = pytest.mark.slow

QUICK = [
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--data.labels_per_class", "5"),
]
FOLDER = ["--data", "datamodules.MedicalImages", "--data.layout", "folder"]
FINETUNE = ["--config", "bolt/finetune.yaml"]
LINEAR = ["--config", "bolt/linear.yaml"]
DIGITS_ENCODER = "{{patch_size: {}, embed_dim: 64, depth: 3, num_heads: 4}}"
PRETRAINED = "runs/bolt/bolt/checkpoints/last.ckpt"
CLASSIFIER = "runs/bolt/finetune/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with a pre-trained run, a fine-tuned one, and data in several layouts."""
    folder = tmp_path_factory.mktemp("work")
    with contextlib.chdir(folder):
        assert command(APP, "fit", *QUICK) == 0
        assert command(APP, "fit", *FINETUNE, *QUICK) == 0
    write_class_folders(folder / "cells")
    shutil.copytree(folder / "cells", folder / "cut")
    picture = sorted((folder / "cut/platelet").glob("*.jpg"))[0]
    picture.write_bytes(picture.read_bytes()[:200])
    (folder / "empty").mkdir()
    write_isic(folder / "isic")
    (folder / "isic/ISIC_2019_Training_Input/ISIC_0000007.jpg").unlink()
    table = write_aptos(folder / "aptos") / "train.csv"
    table.write_text(table.read_text() + "ffff,7\n")
    (folder / "other_app.yaml").write_text("app: prcl\nmodel: {}\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    content = torch.load(folder / PRETRAINED, weights_only=True)
    content["lightning_apps"]["app"] = "prcl"
    torch.save(content, folder / "prcl.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / PRETRAINED).read_bytes()[:5000])
    return folder


@pytest.fixture
def complains(work, monkeypatch, capsys) -> Callable[..., str]:
    """Run a command that must fail as a person should see it, and return its message."""
    monkeypatch.chdir(work)
    monkeypatch.delenv("LIGHTNING_APPS_DEBUG", raising=False)
    return complainer(APP, work / "runs", capsys)


@pytest.mark.parametrize("option", ["--model.num_classes", "--model.init_args.num_classes"])
def test_an_argument_of_the_model_that_the_data_decides(complains, option):
    message = complains("fit", *FINETUNE, *QUICK, option, "3")
    assert message.startswith(f"{option}: follows from the data and cannot be set; see the settings of --data")


def test_a_configuration_that_does_not_exist(complains):
    message = complains("fit", "--config", "bolt/finetun.yaml")
    assert message.startswith("--config bolt/finetun.yaml: no such file in ")
    assert "Did you mean bolt/finetune.yaml?" in message
    assert "bolt/isic2019_vit_b.yaml" in message


def test_a_configuration_of_another_app(complains):
    message = complains("fit", "--config", "other_app.yaml")
    assert "other_app.yaml: is a configuration of the app 'prcl', not of 'bolt'" in message
    assert "python -m lightning_apps.prcl fit --config other_app.yaml" in message


def test_a_configuration_that_is_none(complains):
    assert "list.yaml: expected a mapping of settings, found list" in complains("fit", "--config", "list.yaml")


def test_a_checkpoint_of_another_app(complains):
    message = complains("test", "--ckpt_path", "prcl.ckpt")
    assert "--ckpt_path prcl.ckpt: was written by the app 'prcl', not by 'bolt'" in message


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict", "export", "features"])
def test_a_checkpoint_that_is_cut_short_or_missing(complains, subcommand):
    message = complains(subcommand, "--ckpt_path", "cut.ckpt")
    assert "--ckpt_path cut.ckpt: not a readable checkpoint" in message
    assert "take another checkpoint of the same folder" in message
    assert "--ckpt_path nowhere.ckpt: no such file: " in complains(subcommand, "--ckpt_path", "nowhere.ckpt")


@pytest.mark.parametrize("subcommand", ["predict", "export", "features"])
def test_commands_that_need_weights(complains, subcommand):
    assert complains(subcommand).startswith(f"{subcommand} needs trained weights: give --ckpt_path FILE, last or best")


def test_resuming_one_model_from_another(complains):
    message = complains("fit", "--config", "bolt.yaml", "--ckpt_path", CLASSIFIER)
    assert "holds a modules.classification.ImageClassifier, but" in message
    assert "init_from" not in message, "BOLT has no such argument"
    message = complains("fit", *FINETUNE, "--ckpt_path", PRETRAINED)
    assert "To start ImageClassifier from its weights use --model.init_from instead." in message


@pytest.mark.parametrize("subcommand", ["test", "predict"])
def test_a_checkpoint_with_other_data(complains, subcommand):
    options = ["--ckpt_path", CLASSIFIER, "--trainer.logger", "csv", *FOLDER, "--data.root", "cells"]
    message = complains(subcommand, *options, "--data.image_size", "16")
    assert f"--ckpt_path {CLASSIFIER}: does not fit ImageClassifier." in message
    assert "num_classes: 10 in the checkpoint, 3 in the data" in message
    assert "in_channels: 1 in the checkpoint, 3 in the data" in message


def test_a_root_that_does_not_exist(complains):
    message = complains("fit", *FOLDER, "--data.root", "nowhere")
    assert message.startswith("--data.root 'nowhere' does not exist (looked for /")


def test_no_root(complains):
    message = complains("fit", "--config", "bolt/isic2019_vit_s.yaml")
    assert message.startswith("layout 'isic2019' reads a folder: set --data.root to it")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("bolt.yaml", "empty: no image found; expected <class>/*"),
        ("bolt/isic2019_vit_s.yaml", "empty/ISIC_2019_Training_Metadata.csv does not exist"),
        ("bolt/aptos2019_vit_s.yaml", "empty/train.csv"),
    ],
)
def test_an_empty_folder(complains, recipe, expected):
    layout = FOLDER if recipe == "bolt.yaml" else []
    assert expected in complains("fit", "--config", recipe, *layout, "--data.root", "empty")


def test_an_image_that_is_missing(complains):
    options = ["--model.encoder_options", "{embed_dim: 16, depth: 1, num_heads: 2}", "--data.root", "isic"]
    message = complains("fit", "--config", "bolt/isic2019_vit_s.yaml", *options, *QUICK)
    assert "1 of 60" in message
    assert "ISIC_0000007" in message
    assert "ISIC_2019_Training_Input" in message


def test_a_label_out_of_range(complains):
    message = complains("fit", "--config", "bolt/aptos2019_vit_s.yaml", "--data.root", "aptos", *QUICK)
    assert "aptos/train.csv: column 'diagnosis' has '7', expected a whole number 0..4 (row 61, line 62)" in message


def test_an_image_that_is_cut_short(complains, work, monkeypatch):
    options = [*FOLDER, "--data.root", "cut", "--data.image_size", "16", "--data.batch_size", "8", *QUICK]
    message = complains("fit", *options)
    assert message.startswith("cut/platelet/PL_0.jpg: cannot be decoded (")
    assert "leave such files out with --data.on_error skip" in message
    with pytest.warns(UserWarning, match=r"1 of \d+ images skipped: cut/platelet/PL_0.jpg"):
        assert command(APP, "fit", *options, "--data.on_error", "skip", "--run.root", "skipped") == 0


@pytest.mark.parametrize("recipe", [[], ["--config", "bolt/byol.yaml"], LINEAR])
def test_a_batch_of_one(complains, recipe):
    message = complains("fit", *recipe, *QUICK, "--data.batch_size", "1")
    assert message.startswith("a training batch holds 1 image, but ")
    assert "data.batch_size above 1" in message
    assert "drop_last" in message


def test_fine_tuning_takes_a_batch_of_one(work, monkeypatch):
    """Nothing in a ViT counts over the batch."""
    monkeypatch.chdir(work)
    assert command(APP, "fit", *FINETUNE, *QUICK, "--data.batch_size", "1", "--run.root", "one") == 0


def test_weights_with_another_patch_size(complains):
    message = complains("fit", *FINETUNE, *QUICK, "--model.encoder_options", DIGITS_ENCODER.format(4))
    assert f"init_from: {PRETRAINED} does not fit VisionTransformer" in message
    assert "patch_embed.proj.weight: (64, 1, 2, 2) in the file, (64, 1, 4, 4) in the network" in message
    assert "use the same encoder and options" in message


def test_weights_for_another_image_size_are_interpolated(work, monkeypatch, caplog):
    monkeypatch.chdir(work)
    caplog.set_level("INFO")
    assert command(APP, "fit", *FINETUNE, *QUICK, "--data.image_size", "16", "--run.root", "larger") == 0
    assert f"position embedding of {PRETRAINED} interpolated from 4x4 to 8x8 patches" in caplog.text


def test_weights_that_cannot_be_read(complains):
    message = complains("fit", *FINETUNE, *QUICK, "--model.init_from", "nowhere.ckpt")
    assert "nowhere.ckpt; pre-train first, or give the weights with --model.init_from FILE" in message
    message = complains("fit", *FINETUNE, *QUICK, "--model.init_from", "cut.ckpt")
    assert message.startswith("init_from: cut.ckpt cannot be read as a weights file")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.r_min", "0.5", "--model.r_max", "0.5"], "r_min = r_max = 0.5"),
        (["--model.r_min", "0.8", "--model.r_max", "0.5"], "r_min: 0.8 is above r_max: 0.5"),
        (["--model.mix", "0"], "mix: 0.0 is outside (0, 1]"),
        (["--model.lr", "-1"], "lr: -1.0 is not positive"),
        (["--callbacks.ema.momentum", "1.0"], "momentum is 1.0, expected a number in [0, 1)"),
        (["--callbacks.ranking.weight", "-1"], "weight is -1.0, expected a number >= 0"),
        (["--data.batch_size", "0"], "batch_size is 0, expected 1 or more"),
        (["--data.label_fraction", "2"], "label_fraction is 2.0, expected a share in (0, 1]"),
        (["--model.encoder_options", DIGITS_ENCODER.format(3)], "8 is not divisible by the patch size 3; nearest"),
        (["--model.encoder", "resnet18", "--model.encoder_options", "{}"], "no sequence of patch tokens to perturb"),
        (["--model.encoder", "vit_tiny_patch16_244"], "is not a timm model; nearest: vit_tiny_patch16_224"),
        (["--trainer.logger", "wandbb"], "--trainer.logger wandbb: expected one of"),
    ],
)
def test_a_value_out_of_its_range(complains, options, expected):
    quick = QUICK if "--trainer.logger" not in options else []
    assert expected in complains("fit", *quick, *options)


def test_ranking_without_anything_to_rank_is_off_with_weight_zero(work, monkeypatch):
    monkeypatch.chdir(work)
    options = ["--model.r_min", "0.5", "--model.r_max", "0.5", "--callbacks.ranking.weight", "0"]
    assert command(APP, "fit", *QUICK, *options, "--run.root", "unranked") == 0


def test_a_loss_that_is_not_a_number(complains, work):
    options = [*QUICK, "--trainer.limit_train_batches", "3", "--model.lr", "1e30", "--model.warmup_epochs", "0"]
    message = complains("fit", *options, "--run.name", "diverged")
    assert "the loss is nan at step " in message
    assert "No checkpoint has been written yet" in message


def test_debugging_shows_where_an_error_comes_from(work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.setenv("LIGHTNING_APPS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"^mix: 0.0 is outside \(0, 1\]$") as caught:
        command(APP, "fit", "--model.mix", "0")
    assert any(entry.name == "__init__" and "perturbation" in str(entry.path) for entry in caught.traceback)
