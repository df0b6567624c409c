"""Every shipped EMO configuration for classification: composed by the real command line, and one step on its layout."""

import math
from pathlib import Path

import pytest
import timm
import torch

import modules.emo  # noqa: F401  registers the networks in timm
from lightning_apps.cli import AppCLI
from lightning_apps.config_files import SHIPPED
from lightning_apps.emo import APP
from modules.optimization import CosineEnds, timm_cosine
from tests.configs.recipes import arguments, read, recipes
from tests.data_layouts import save_image

CLASSIFIER = "modules.classification.ImageClassifier"
WNIDS = ("n01443537", "n02099601", "n02123045", "n02165456", "n02279972", "n03100240")
BATCH = 4
# Parameters with 1000 classes, counted by the authors' code.
PARAMETERS = {"emo_1m": 1_361_168, "emo_2m": 2_377_472, "emo_5m": 5_108_848, "emo_6m": 6_168_496}
DROP_PATH = {"emo_1m": 0.04036, "emo_2m": 0.05, "emo_5m": 0.05, "emo_6m": 0.05}


NAMES = recipes("emo", CLASSIFIER)
IMAGENET = [name for name in NAMES if "/imagenet_" in name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``{train,val}/<wnid>/*.JPEG`` of six classes: photographs of any size, and pictures of 64 x 64."""
    roots = {}
    for kind, size in (("photographs", (90, 70)), ("small", (64, 64))):
        root = roots[kind] = tmp_path_factory.mktemp(kind)
        for label, wnid in enumerate(WNIDS):
            for part, numbers in (("train", range(4)), ("val", range(4, 6))):
                for number in numbers:
                    save_image(root / part / wnid / f"{wnid}_{number}.JPEG", seed=10 * label + number, size=size)
    return roots


def one_step(name: str, folder: Path, folders: dict[str, Path]) -> AppCLI:
    """`fit` of one training batch and the validation part, at 64 px on one CPU."""
    data = arguments(name, "data")
    options = [
        *("--run.root", str(folder / "runs")),
        *("--data.batch_size", str(BATCH), "--data.eval_batch_size", "64", "--data.num_workers", "0"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"),
        *("--trainer.logger", "csv", "--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_model_summary", "false"),
    ]
    if data["layout"] == "folder":
        root = folders["small" if data["image_size"] == 64 else "photographs"]
        options += ["--data.root", str(root), "--data.image_size", "64"]
    if arguments(name).get("init_from"):
        network = timm.create_model(arguments(name)["encoder"])
        weights = {f"module.{key}": value for key, value in network.state_dict().items()}
        torch.save({"net": {}, "net_E": weights, "iter": 1}, folder / "net.pth")
        options += ["--model.init_from", str(folder / "net.pth")]
    return AppCLI(APP, ["fit", "--config", f"{name}.yaml", *options])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name, tmp_path, folders):
    cli = one_step(name, tmp_path, folders)
    run = tmp_path / "runs/emo" / name.rpartition("/")[2]
    assert cli.trainer.global_step == 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    assert all(math.isfinite(metrics[key]) for key in ("train/loss", "val/main", "val/top5", "raw/val/acc"))
    reference = arguments(name).get("lr_reference_batch")
    peak = arguments(name)["lr"] * (BATCH / reference if reference else 1)
    rates = [group["initial_lr"] for group in cli.trainer.optimizers[0].param_groups]
    assert max(rates) == pytest.approx(peak)
    network = cli.model.network
    assert (type(network).__name__, network.num_classes) == ("EMO", len(WNIDS) if "/" in name else 10)
    decayed = {
        id(p) for group in cli.trainer.optimizers[0].param_groups if group["weight_decay"] for p in group["params"]
    }
    assert decayed == {id(parameter) for parameter in network.parameters() if parameter.ndim > 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_complete_configuration(name):
    recipe = read(name)
    assert list(recipe) == ["app", "seed_everything", "model", "data", "callbacks", "trainer"]
    assert recipe["app"] == "emo"
    assert {"encoder", "encoder_options", "drop_path", "layer_decay"} <= set(recipe["model"]["init_args"])
    assert recipe["model"]["init_args"]["drop_path"] == DROP_PATH[recipe["model"]["init_args"]["encoder"]]
    assert recipe["callbacks"]["averaging"]["class_path"] == "callbacks.WarmupWeightAveraging"
    assert recipe["callbacks"]["checkpoint"] == {
        "class_path": "callbacks.BestAndLastCheckpoint",
        "init_args": {"monitor": "val/main", "mode": "max"},
    }
    assert recipe["trainer"]["gradient_clip_val"] == 5.0
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line says what it is"
    assert "/" not in name or f"--config {name}.yaml" in text


def test_all_four_sizes_have_the_recipe_of_imagenet():
    assert sorted(arguments(name)["encoder"] for name in IMAGENET) == sorted(PARAMETERS)
    shared = []
    for name in IMAGENET:
        recipe = read(name)
        assert name == f"emo/imagenet_{recipe['model']['init_args']['encoder'].removeprefix('emo_')}"
        for key in ("encoder", "drop_path"):
            del recipe["model"]["init_args"][key]
        shared.append(recipe)
    assert all(recipe == shared[0] for recipe in shared)


@pytest.mark.parametrize("name", IMAGENET)
def test_the_network_of_an_imagenet_recipe_is_the_published_one(name):
    with torch.device("meta"):
        network = timm.create_model(arguments(name)["encoder"], num_classes=1000, **arguments(name)["encoder_options"])
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[arguments(name)["encoder"]]


@pytest.mark.parametrize("name", IMAGENET)
def test_the_learning_rates_of_an_imagenet_recipe_are_the_published_ones(name):
    """At the global batch of 2048: 1e-6 to 6e-3 in 12 500 steps, then the cosine of all 187 500."""
    model, data, trainer = arguments(name), arguments(name, "data"), read(name)["trainer"]
    scale = data["batch_size"] * trainer["devices"] / model["lr_reference_batch"]
    per_epoch = 1_281_167 // (data["batch_size"] * trainer["devices"])
    total, warmup = per_epoch * trainer["max_epochs"], per_epoch * model["warmup_epochs"]
    assert (total, warmup) == (187_500, 12_500)
    ends = CosineEnds(model["lr_min"] * scale, model["warmup_lr"] * scale, model["lr_noise"])
    rates = timm_cosine([model["lr"] * scale], warmup, total, ends)
    for step in range(0, total, 2_500):
        cosine = 1e-6 + 0.5 * (6e-3 - 1e-6) * (1 + math.cos(math.pi * step / 187_500))
        expected = 1e-6 + step * (6e-3 - 1e-6) / 12_500 if step < 12_500 else cosine
        assert rates(step)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.realdata
def test_emo_learns_ten_classes_of_tiny_imagenet(shared_data, tmp_path):
    """Two of the recipe's five epochs; a network that guesses has 10 %."""
    root = shared_data / "images" / "tiny-imagenet-10"
    options = [
        *("--run.root", str(tmp_path / "runs"), "--data.root", str(root), "--trainer.max_epochs", "2"),
        *("--trainer.check_val_every_n_epoch", "2", "--callbacks.pictures", "null"),
        *("--trainer.accelerator", "cpu", "--trainer.logger", "csv", "--trainer.enable_progress_bar", "false"),
    ]
    cli = AppCLI(APP, ["fit", "--config", "emo/tiny_imagenet_10.yaml", *options])
    assert cli.trainer.global_step == 2 * math.ceil(4000 / 64)
    assert cli.trainer.callback_metrics["val/acc"] > 0.45
    assert cli.trainer.callback_metrics["raw/val/acc"] > 0.4
