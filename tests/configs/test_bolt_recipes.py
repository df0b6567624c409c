"""Every shipped BOLT configuration: composed by the real command line, and one step on a data set in its layout."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from lightning_apps.bolt import APP
from lightning_apps.cli import AppCLI
from lightning_apps.config_files import SHIPPED
from tests.configs.recipes import arguments, read, recipes
from tests.data_layouts import write_aptos, write_isic, write_medmnist

NAMES = recipes("bolt")
ROWS = [name for name in NAMES if "/ablation_" in name]
BASE_ROW = "bolt/ablation_1view"
BRANCHED = "modules.bolt.BOLT"
SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2}
NO_RANKING = {"init_args": {"weight": 0.0}}
BATCH = 4

# What a row of the ablation changes in the first one, and nothing else.
CHANGES: dict[str, dict[str, Any]] = {
    "bolt/ablation_1view": {},
    "bolt/ablation_2views": {"data.init_args.views": 2},
    "bolt/ablation_lambda_0": {"callbacks.ranking.init_args.weight": 0.0},
    "bolt/ablation_lambda_0.1": {"callbacks.ranking.init_args.weight": 0.1},
    "bolt/ablation_g_1": {"model.init_args.mix": 1.0},
    "bolt/ablation_concat_ranker": {"callbacks.ranking.init_args.head": "concat"},
    "bolt/ablation_learned_positions": {"model.init_args.pos_embed": "learned"},
}
# Trainable and fixed parameters of the encoders without classifier, as timm counts them.
ENCODERS = {
    "bolt/isic2019_vit_b": 85_798_656,
    "bolt/isic2019_vit_s": 21_665_664,
    "bolt/aptos2019_vit_b": 85_798_656,
    "bolt/aptos2019_vit_s": 21_665_664,
    "bolt/finetune_isic2019": 85_798_656,
    "bolt/finetune_aptos2019": 85_798_656,
    "bolt/imagenet": 85_798_656,
    "bolt/bloodmnist": 5_357_952,
    "bolt/retinamnist": 5_357_952,
}
SIDES = {"medmnist": 28}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


@pytest.fixture(scope="module")
def data_options(tmp_path_factory):
    """Where the data set of a layout is, for the command line."""
    root = tmp_path_factory.mktemp("data")
    for name, classes in (("bloodmnist", 8), ("retinamnist", 5)):
        write_medmnist(root / "medmnist", name, classes=classes)
    write_isic(root / "isic2019")
    write_aptos(root / "aptos2019")
    options = {layout: ["--data.root", str(root / layout)] for layout in ("medmnist", "isic2019", "aptos2019")}
    options["isic2019"] += ["--data.val_fraction", "0.2", "--data.test_fraction", "0.2"]  # for classes of seven images
    options["medmnist"] += ["--data.verify_md5", "false", "--data.download", "false"]
    return {**options, "digits": []}


def small_encoder(name: str) -> dict[str, Any]:
    options = arguments(name)["encoder_options"]
    return {**({"patch_size": options["patch_size"]} if "patch_size" in options else {}), **SMALL}


def weights_file(name: str, folder: Path) -> Path:
    """A timm state dictionary of the recipe's encoder, made small."""
    layout = arguments(name, "data")["layout"]
    side, channels = (8, 1) if layout == "digits" else (arguments(name, "data").get("image_size", 28), 3)
    options = {"img_size": side, "in_chans": channels, "num_classes": 0, **small_encoder(name)}
    network = timm.create_model(arguments(name)["encoder"], **options)
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def one_step(name: str, folder: Path, data: list[str]) -> AppCLI:
    """`fit` of one training batch and one validation batch, with a small encoder and few images."""
    options = [
        *("--run.root", str(folder / "runs")),
        *("--model.encoder_options", str(small_encoder(name))),
        *("--data.batch_size", str(BATCH), "--data.eval_batch_size", "64", "--data.num_workers", "0"),
        *("--data.labels_per_class", "2"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]
    if arguments(name).get("init_from"):
        options += ["--model.init_from", str(weights_file(name, folder))]
    return AppCLI(APP, ["fit", "--config", f"{name}.yaml", *options, *data])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name, tmp_path, data_options):
    cli = one_step(name, tmp_path, data_options[arguments(name, "data")["layout"]])
    run = tmp_path / "runs/bolt" / name.rpartition("/")[2]
    assert cli.trainer.global_step == 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    assert math.isfinite(metrics["train/loss"])
    assert math.isfinite(metrics["val/main"])
    assert ("train/rank_acc" in metrics) == ("ranking" in read(name)["callbacks"] and name[-8:] != "lambda_0")
    assert ("train/tau" in metrics) == (read(name)["model"]["class_path"] == BRANCHED)
    reference = arguments(name).get("lr_reference_batch")
    peak = arguments(name)["lr"] * (BATCH / reference if reference else 1)
    rates = [group["initial_lr"] for group in cli.trainer.optimizers[0].param_groups]
    assert max(rates) == pytest.approx(peak)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_complete_configuration(name):
    recipe = read(name)
    assert list(recipe) == ["app", "seed_everything", "model", "data", "callbacks", "trainer"]
    assert recipe["app"] == "bolt"
    assert "encoder_options" in recipe["model"]["init_args"]
    assert recipe["callbacks"]["checkpoint"] == {
        "class_path": "callbacks.BestAndLastCheckpoint",
        "init_args": {"monitor": "val/main", "mode": "max"},
    }
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line says what it is"
    named = re.findall(r"--config (\S+)", text)
    assert all(f"{name}.yaml" == other for other in named)


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_a_gpu_is_in_its_recipes_only(name):
    trainer = read(name)["trainer"]
    large = ENCODERS.get(name, 0) > 6_000_000
    assert trainer["accelerator"] == "auto"
    assert (trainer.get("precision") == "bf16-mixed") == large
    assert not trainer.get("sync_batchnorm") or large
    assert bool(trainer.get("sync_batchnorm")) == (large and read(name)["model"]["class_path"] == BRANCHED)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoder_is_the_published_one(name):
    data, model = arguments(name, "data"), arguments(name)
    side = data.get("image_size") or SIDES[data["layout"]]
    with torch.device("meta"):
        network = timm.create_model(model["encoder"], num_classes=0, img_size=side, **model["encoder_options"])
    assert sum(parameter.numel() for parameter in network.parameters()) == ENCODERS[name]


def test_all_ablation_rows_are_described_here():
    assert sorted(CHANGES) == sorted(ROWS)


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_row_changes_one_setting(name):
    base, row = flatten(read(BASE_ROW)), flatten(read(name))
    assert base.keys() == row.keys()
    assert {key: row[key] for key in row if row[key] != base[key]} == CHANGES[name]


@pytest.mark.parametrize("name", ["bolt/byol", "bolt/simsiam", "bolt/mocov3", "bolt/jigsaw"])
def test_a_baseline_has_encoder_data_and_protocol_of_the_ablation(name):
    ours, base = flatten(read(name)), flatten(read(BASE_ROW))
    same = [f"model.init_args.{key}" for key in ("encoder", "pos_embed", "optimizer", "lr", "weight_decay", "schedule")]
    same += [f"model.init_args.encoder_options.{key}" for key in ("patch_size", "embed_dim", "depth", "num_heads")]
    same += [key for key in base if key.startswith(("trainer.", "callbacks.probes.", "callbacks.checkpoint."))]
    same += [f"data.init_args.{key}" for key in ("layout", "batch_size", "augment")]
    assert {key: ours.get(key) for key in same} == {key: base[key] for key in same}


def test_scratch_is_fine_tuning_without_weights():
    ours, base = flatten(read("bolt/scratch")), flatten(read("bolt/finetune"))
    changed = {key for key in base.keys() | ours.keys() if base.get(key) != ours.get(key)}
    assert changed == {"model.init_args.init_from", "model.init_args.which"}


def test_the_runs_that_fine_tuning_starts_from_are_those_of_shipped_recipes():
    names = {name.rpartition("/")[2] for name in NAMES}
    for name in ("bolt/finetune", "bolt/linear", "bolt/finetune_isic2019", "bolt/finetune_aptos2019"):
        path = Path(arguments(name)["init_from"])
        assert path.parts[:2] == ("runs", "bolt")
        assert path.parts[2] in names
        assert path.parts[3:] == ("checkpoints", "last.ckpt")


@pytest.mark.parametrize("name", ["bolt/finetune_isic2019", "bolt/finetune_aptos2019"])
def test_fine_tuning_sees_the_images_that_pre_training_saw(name):
    """The same split: no image of the test part was seen before."""
    ours, before = arguments(name, "data"), arguments(f"bolt/{Path(arguments(name)['init_from']).parts[2]}", "data")
    for key in ("layout", "image_size", "split", "split_seed", "crop_border", "val_fraction", "test_fraction"):
        assert ours.get(key) == before.get(key), key
