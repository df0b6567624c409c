"""Every shipped EMO configuration for detection: composed by the real command line, and one step on its layout."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import modules.emo  # noqa: F401  registers the networks in timm
from lightning_apps.cli import AppCLI
from lightning_apps.config_files import SHIPPED
from lightning_apps.emo import APP
from lightning_apps.run_folder import ENVIRONMENT
from tests.configs.recipes import arguments, read, recipes
from tests.data_layouts import write_camvid, write_coco

DETECTOR = "modules.detection.Detector"
SIDE, BATCH = 64, 2


NAMES = recipes("emo", DETECTOR)
COCO = [name for name in NAMES if "/coco_" in name]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    masks = write_camvid(folder / "camvid")
    return {"coco": write_coco(folder / "coco"), "camvid": with_objects(masks)}


def with_objects(root: Path) -> Path:
    """A car of 150 pixels or more in every mask of a CamVid folder."""
    for file in root.glob("*annot/*.png"):
        mask = np.array(Image.open(file))
        mask[2 : 2 + mask.shape[0] // 2, 2 : 2 + mask.shape[1] // 2] = 8
        Image.fromarray(mask).save(file)
    return root


def small(folder: Path, root: Path) -> list[str]:
    """Options that make a recipe small."""
    return [
        *("--run.root", str(folder / "runs"), "--data.root", str(root)),
        *("--data.image_size", str(SIDE), "--data.batch_size", str(BATCH), "--data.eval_batch_size", "4"),
        *("--data.num_workers", "0", "--trainer.devices", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.logger", "csv", "--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_model_summary", "false"),
    ]


def one_step(name: str, folder: Path, root: Path) -> AppCLI:
    """`fit` of one training batch and one validation batch, from weights as they come for a recipe."""
    torch.manual_seed(3)
    network = timm.create_model(arguments(name)["backbone"], **arguments(name)["backbone_options"])
    torch.save(network.state_dict(), folder / "weights.pth")
    options = [
        *small(folder, root),
        *("--model.init_from", str(folder / "weights.pth"), "--model.warmup_steps", "0"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
        *("--trainer.check_val_every_n_epoch", "1"),
    ]
    if arguments(name, "data")["layout"] == "camvid":
        options += ["--data.min_pixels", "10"]
    return AppCLI(APP, ["fit", "--config", f"{name}.yaml", *options])


@pytest.mark.filterwarnings("ignore:window_size")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name, tmp_path, roots):
    cli = one_step(name, tmp_path, roots[arguments(name, "data")["layout"]])
    assert cli.trainer.global_step == 1
    values = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    assert all(math.isfinite(values[f"train/{part}"]) for part in ("loss", "classification", "regression"))
    assert values["val/main"] == values["val/map"]
    settings = cli.model.hparams
    assert settings.num_classes == len(settings.class_names) == 3
    reference = arguments(name)["lr_reference_batch"]
    rates = [group["initial_lr"] for group in cli.trainer.optimizers[0].param_groups]
    assert max(rates) == pytest.approx(arguments(name)["lr"] * (BATCH / reference if reference else 1))
    before = torch.load(tmp_path / "weights.pth")
    after = cli.model.features.body.state_dict()
    moved = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    frozen = {f"stage{stage}" for stage in range(arguments(name)["frozen_stages"])}
    assert moved == {f"stage{stage}" for stage in range(5)} - frozen
    statistics = [key for key in after if "running" in key]
    same = all(torch.equal(after[key], before[key]) for key in statistics)
    assert statistics
    assert same == arguments(name)["norm_eval"]


@pytest.mark.filterwarnings("ignore:window_size")
def test_predictions_of_a_run_are_a_file_of_coco_results(tmp_path, roots):
    name = "emo/coco_ssdlite_1m"
    one_step(name, tmp_path, roots["coco"])
    os.environ.pop(ENVIRONMENT, None)
    checkpoint = tmp_path / "runs/emo/coco_ssdlite_1m/checkpoints/last.ckpt"
    cli = AppCLI(
        APP, ["predict", "--config", f"{name}.yaml", "--ckpt_path", str(checkpoint), *small(tmp_path, roots["coco"])]
    )
    written = Path(cli.trainer.default_root_dir) / "detections.json"
    results = json.loads(written.read_text())
    content = json.loads((roots["coco"] / "annotations/instances_val2017.json").read_text())
    assert {entry["category_id"] for entry in results} <= {1, 10, 24}
    assert {entry["image_id"] for entry in results} <= {image["id"] for image in content["images"]}
    assert results
    assert len(list(written.with_suffix("").iterdir())) == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_complete_configuration(name):
    recipe = read(name)
    assert list(recipe) == ["app", "seed_everything", "model", "data", "callbacks", "trainer"]
    assert recipe["callbacks"]["checkpoint"] == {
        "class_path": "callbacks.BestAndLastCheckpoint",
        "init_args": {"monitor": "val/main", "mode": "max"},
    }
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"--config {name}.yaml" in text


@pytest.mark.parametrize("name", COCO)
def test_the_recipes_of_coco_are_the_published_ones(name):
    model, data, trainer = arguments(name), arguments(name, "data"), read(name)["trainer"]
    size = name[-2:]
    assert model["backbone"] == f"emo_{size}"
    assert model["backbone_options"] == ({"window_size": 10} if size == "5m" else {})
    assert model["norm_eval"] is True
    assert (model["weight_decay"], model["schedule"], model["warmup_steps"]) == (0.05, "epoch_cosine", 500)
    assert trainer["devices"] * data["batch_size"] == model["lr_reference_batch"]
    assert "gradient_clip_val" not in trainer
    own = {key: model[key] for key in ("detector", "lr", "lr_reference_batch", "frozen_stages")}
    own |= {key: data.get(key) for key in ("image_size", "resize", "repeat_factor")}
    own["max_epochs"] = trainer["max_epochs"]
    if "ssdlite" in name:
        assert own == {
            "detector": "ssdlite", "lr": 1.2e-3, "lr_reference_batch": 192, "frozen_stages": 0,
            "image_size": 320, "resize": "fixed", "repeat_factor": 5, "max_epochs": 120,
        }  # fmt: skip
    else:
        assert own == {
            "detector": "retinanet", "lr": 2e-4, "lr_reference_batch": 32, "frozen_stages": 2,
            "image_size": 800, "resize": "shorter_side", "repeat_factor": None, "max_epochs": 12,
        }  # fmt: skip


def test_there_is_a_recipe_for_each_size_of_each_detector():
    expected = {f"emo/coco_{kind}_{size}" for kind in ("ssdlite", "retinanet") for size in ("1m", "2m", "5m")}
    assert set(NAMES) == expected | {"emo/camvid_boxes_ssdlite_1m"}
