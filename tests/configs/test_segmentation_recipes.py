"""Every shipped recipe of segmentation: composed by the real command line, and one step on data in its layout."""

import math
import re

import pytest
import timm
import torch

import modules.emo  # noqa: F401  registers its models in timm
from lightning_apps.cli import AppCLI
from lightning_apps.config_files import SHIPPED
from lightning_apps.emo import APP
from modules.segmentation import DenseSegmenter, build_network
from tests.configs.recipes import arguments, read, recipes
from tests.data_layouts import write_ade20k, write_camvid

SEGMENTER = "modules.segmentation.DenseSegmenter"
BATCH = 2
# Parameters with the auxiliary head and 150 classes (EMO, section 6).
PUBLISHED = {
    "emo/ade20k_deeplabv3_1m": 5_653_188,
    "emo/ade20k_deeplabv3_2m": 6_967_156,
    "emo/ade20k_deeplabv3_5m": 10_355_828,
    "emo/ade20k_pspnet_1m": 4_374_724,
    "emo/ade20k_pspnet_2m": 5_557_620,
    "emo/ade20k_pspnet_5m": 8_585_844,
}
NEEDS_PACKAGE = {"semantic_fpn", "segformer", "upernet"}


NAMES = recipes("emo", SEGMENTER)
ADE20K = [name for name in NAMES if "ade20k" in name]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"ade20k": write_ade20k(folder / "ade20k"), "camvid": write_camvid(folder / "camvid")}


def one_step(name: str, folder, root) -> AppCLI:
    """`fit` of one small training batch and one validation picture."""
    backbone = arguments(name)["backbone"]
    torch.save(timm.create_model(backbone).state_dict(), folder / "weights.pth")
    options = [
        *("--run.root", str(folder / "runs")),
        *("--model.init_from", str(folder / "weights.pth"), "--model.backbone_options", "{window_size: 0}"),
        *("--data.root", str(root), "--data.batch_size", str(BATCH), "--data.num_workers", "0"),
        *("--data.image_size", "64", "--data.train_shorter_side", "64", "--data.test_shorter_side", "48"),
        *("--trainer.max_steps", "1", "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1"),
        *("--trainer.val_check_interval", "1", "--trainer.check_val_every_n_epoch", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "csv"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]
    return AppCLI(APP, ["fit", "--config", f"{name}.yaml", *options])


def check_one_step(name: str, folder, root) -> None:
    cli = one_step(name, folder, root)
    run = folder / "runs/emo" / name.rpartition("/")[2]
    assert cli.trainer.global_step == 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    assert math.isfinite(metrics["train/loss"])
    assert metrics["val/main"] == metrics["val/miou"]
    assert ("train/auxiliary_loss" in metrics) == (arguments(name)["auxiliary_weight"] > 0)
    assert list((run / "media/val/classes").iterdir())
    assert list((run / "media/val/segmentation").iterdir())
    facts = cli.model.hparams
    assert facts.num_classes == {"ade20k": 150, "camvid": 11}[arguments(name, "data")["layout"]]
    assert len(facts.palette) == len(facts.class_names) == facts.num_classes
    reference = arguments(name)["lr_reference_batch"]
    peak = arguments(name)["lr"] * (BATCH / reference if reference else 1)
    rates = [group["initial_lr"] for group in cli.trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([peak] * len(rates))


def test_a_recipe_trains_quickly(tmp_path, roots):
    check_one_step("emo/ade20k_pspnet_1m", tmp_path, roots["ade20k"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "emo/ade20k_pspnet_1m"])
def test_a_recipe_trains(name, tmp_path, roots):
    check_one_step(name, tmp_path, roots[arguments(name, "data")["layout"]])


def test_all_recipes_are_there():
    assert set(PUBLISHED) < set(NAMES)
    others = {"emo/ade20k_semfpn_1m", "emo/ade20k_semfpn_5m", "emo/ade20k_segformer_5m", "emo/ade20k_upernet_5m"}
    assert set(NAMES) - set(PUBLISHED) == {*others, "emo/camvid_deeplabv3_1m"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_complete_configuration(name):
    recipe = read(name)
    assert list(recipe) == ["app", "seed_everything", "model", "data", "callbacks", "trainer"]
    assert recipe["app"] == "emo"
    assert recipe["callbacks"]["checkpoint"] == {
        "class_path": "callbacks.BestAndLastCheckpoint",
        "init_args": {"monitor": "val/main", "mode": "max"},
    }
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line says what it is"
    assert re.findall(r"--config (\S+)", text) == [f"{name}.yaml"]
    told = "no official number" in text
    assert told == (name in ADE20K and name not in PUBLISHED)
    assert ("lightning-apps[dense]" in text) == (arguments(name)["head"] in NEEDS_PACKAGE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_is_the_published_one(name):
    settings = arguments(name)
    with torch.device("meta"):
        network = build_network(settings["backbone"], settings["head"], 150, options=settings["backbone_options"])
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ADE20K)
def test_the_schedule_is_the_published_one(name):
    """Section 6: crop 512, scale 0.5 to 2 of (2048, 512), batch 8 x 4, 80 000 steps, AdamW 1.2e-4, poly, no warm-up."""
    settings, pictures, trainer = arguments(name), arguments(name, "data"), read(name)["trainer"]
    assert (pictures["image_size"], pictures["train_shorter_side"], pictures["test_shorter_side"]) == (512, 512, 512)
    assert (pictures["scale_range"], pictures["max_class_ratio"]) == ([0.5, 2.0], 0.75)
    assert pictures["batch_size"] * trainer["devices"] == settings["lr_reference_batch"] == 32
    assert (trainer["max_steps"], trainer["max_steps"] % trainer["val_check_interval"]) == (80_000, 0)
    assert (settings["optimizer"], settings["lr"], settings["weight_decay"]) == ("adamw", 1.2e-4, 0.01)
    assert (settings["schedule"], settings["warmup_epochs"], settings["output_stride"]) == ("poly", 0, 32)
    window = settings["backbone_options"].get("window_size", 7)
    assert window == (16 if settings["backbone"] == "emo_5m" else 7)
    assert "gradient_clip_val" not in trainer
    assert not trainer.get("sync_batchnorm"), "the module shares statistics by itself, on GPUs only"


def test_the_defaults_of_the_module_are_those_of_the_recipe():
    module = DenseSegmenter("mobilenetv3_small_050").hparams
    settings = arguments("emo/ade20k_deeplabv3_1m")
    same = ("head", "output_stride", "dropout", "auxiliary_weight", "optimizer", "lr", "weight_decay", "schedule")
    assert {key: module[key] for key in same} == {key: settings[key] for key in same}
