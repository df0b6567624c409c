"""Every shipped configuration of PRCL: composed by the real command line, and one step on data in its layout."""

import math
import re

import pytest
import torch

from callbacks import EMATarget, MetricHistory
from lightning_apps.cli import AppCLI
from lightning_apps.config_files import SHIPPED
from lightning_apps.prcl import APP
from modules.prcl import ProbabilisticSegmenter
from modules.prcl.network import RepresentationHeads
from modules.segmentation.deeplabv3plus import DeepLabV3Plus
from tests.configs.recipes import arguments, read, recipes
from tests.data_layouts import write_camvid, write_cityscapes, write_label_split, write_voc
from tests.modules.street_scenes import TINY_BACKBONE

SEGMENTER = "modules.prcl.ProbabilisticSegmenter"
RECIPES = ["prcl/camvid_46", "prcl/cityscapes_150", "prcl/voc_662"]
OVERLAYS = ["prcl/journal", "prcl/mean_teacher", "prcl/official_code", "prcl/point_contrast", "prcl/supervised"]
QUICK = ("prcl/camvid_46", "prcl/supervised")
COMBINATIONS = [(name, overlay) for name in ("prcl/camvid_46", "prcl/voc_662") for overlay in OVERLAYS]
COMBINATIONS.remove(QUICK)
PUBLISHED = ["prcl/cityscapes_150", "prcl/voc_662"]
NAMES = [name for name in recipes("prcl") if name != "prcl"]
BATCH = 2
# Genuine layouts, of pictures of 48 x 36, 48 x 40 and 80 x 40 pixels.
SIZES = {
    "camvid": ["--data.image_size", "[33, 40]", *("--data.train_shorter_side", "36", "--data.test_shorter_side", "36")],
    "voc": ["--data.image_size", "40"],
    "cityscapes": ["--data.image_size", "36"],
}
CLASSES = {"camvid": 11, "voc": 21, "cityscapes": 19, "mosaic": 5}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Root and lists of four labelled and two unlabelled pictures for each layout."""
    folder = tmp_path_factory.mktemp("data")
    places = {
        "camvid": write_camvid(folder / "camvid"),
        "voc": write_voc(folder / "voc") / "VOCdevkit/VOC2012",
        "cityscapes": write_cityscapes(folder / "cityscapes"),
    }
    towns = ["aachen", "aachen", "ulm", "ulm", "ulm", "zurich"]
    names = {
        "camvid": [f"0001TP_{row:06d}" for row in range(6)],
        "voc": [f"2007_{row:06d}" for row in (0, 1, 2, 5, 6, 7)],
        "cityscapes": [f"{town}_{row:06d}_000019_leftImg8bit" for row, town in enumerate(towns)],
    }
    splits = {
        kind: write_label_split(folder / "splits" / kind / "4/0", names[kind][:4], names[kind][4:]) for kind in names
    }
    return {kind: (places[kind], splits[kind]) for kind in places}


def one_step(folder, roots, *names: str) -> AppCLI:
    """`fit` of one small training step and one validation picture with these configurations on top of each other."""
    layout = arguments(names[0], "data")["layout"]
    options = ["--data.images_per_epoch", str(BATCH)]
    if layout in roots:
        root, split = roots[layout]
        options += ["--data.root", str(root), "--data.split_path", str(split), *SIZES[layout]]
    options += [
        *("--run.root", str(folder / "runs"), "--model.backbone", TINY_BACKBONE, "--model.init_from", "null"),
        *("--model.backbone_options", "{}", "--model.dimensions", "16"),
        *("--data.batch_size", str(BATCH), "--data.eval_batch_size", "1", "--data.num_workers", "0"),
        *("--trainer.max_steps", "1", "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
        *("--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
        *("--trainer.strategy", "auto", "--trainer.precision", "32-true", "--trainer.logger", "csv"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]
    given = [part for name in names for part in ("--config", f"{name}.yaml")]
    return AppCLI(APP, ["fit", *given, *options])


def expected_settings(*names: str) -> dict[str, object]:
    """Arguments of the model that the configurations ask for, without those that :func:`one_step` replaces."""
    settings = {}
    for name in names:
        settings |= arguments(name)
    replaced = {"backbone", "backbone_options", "init_from", "dimensions"}
    return {key: value for key, value in settings.items() if key not in replaced}


def check_one_step(folder, roots, *names: str) -> AppCLI:
    cli = one_step(folder, roots, *names)
    layout = arguments(names[0], "data")["layout"]
    settings = expected_settings(*names)
    hparams, method = cli.model.hparams, settings["method"]
    assert {key: hparams[key] for key in settings} == settings
    assert hparams.num_classes == CLASSES[layout] == len(hparams.class_names) == len(hparams.palette)
    assert cli.trainer.global_step == 1
    run = folder / "runs/prcl" / names[0].rpartition("/")[2]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    check_method(cli, method)
    check_metrics(cli, method)
    rates = [group["initial_lr"] for group in cli.trainer.optimizers[0].param_groups]
    lr = settings["lr"]
    slow = [settings["probability_lr"]] if method == "prcl" else []
    assert rates == pytest.approx([lr, lr * settings.get("head_lr_multiplier", 1), *slow])
    for media in ("val/segmentation", "val/classes", *(["train/strong_views"] if method != "supervised" else [])):
        assert list((run / "media" / media).iterdir()), media
    assert (run / "media/history/variance").exists() == (method == "prcl")
    return cli


def check_method(cli: AppCLI, method: str) -> None:
    """The parts of the module, its data and its callbacks are those of the method."""
    module, taught = cli.model, method != "supervised"
    assert (module.teacher is not None) == cli.datamodule.hparams.use_unlabeled == taught
    streams = {"labeled", "unlabeled"} if taught else {"labeled"}
    assert set(cli.trainer.train_dataloader) == streams
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert (EMATarget in kinds) == taught
    assert (MetricHistory in kinds) == (method == "prcl")
    assert (module.heads is not None) == (module.contrast is not None) == (method in ("prcl", "point_contrast"))
    if module.heads is not None:
        assert (module.heads.probability is not None) == (method == "prcl")
    if taught:  # the first update copies the student
        own, teacher = dict(module.student.named_parameters()), dict(module.teacher.named_parameters())
        assert all(torch.equal(value, own[name]) for name, value in teacher.items())


def check_metrics(cli: AppCLI, method: str) -> None:
    """The terms that the method has are logged, finite, and add up."""
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    contrast = method in ("prcl", "point_contrast")
    terms = {"supervised_loss": True, "unsupervised_loss": method != "supervised", "contrast_loss": contrast}
    assert {name: f"train/{name}" in metrics for name in terms} == terms
    assert ("train/pseudo_coverage" in metrics) == (method != "supervised")
    assert any(key.startswith("variance/") for key in metrics) == (method == "prcl")
    weight = metrics.get("train/contrast_weight", 0.0)
    assert weight == (1.0 if contrast else 0.0)
    total = sum(metrics[f"train/{name}"] for name, there in terms.items() if there)
    assert metrics["train/loss"] == pytest.approx(total, rel=1e-5)
    assert math.isfinite(total)
    main = "teacher" if method != "supervised" else "student"
    assert metrics["val/main"] == metrics[f"val/miou_{main}"]
    assert ("val/miou_teacher" in metrics) == (method != "supervised")
    assert "val/miou_student" in metrics


def test_the_default_trains_without_data(tmp_path, roots, monkeypatch):
    """Its pictures come with installed packages; nothing may be asked of a network."""

    def refuse(*_):
        raise AssertionError("asked for a network address")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    check_one_step(tmp_path, roots, "prcl")


def test_a_baseline_trains_quickly(tmp_path, roots):
    check_one_step(tmp_path, roots, *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, tmp_path, roots):
    check_one_step(tmp_path, roots, name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overlay"), COMBINATIONS)
def test_a_recipe_trains_with_another_method(name, overlay, tmp_path, roots):
    cli = check_one_step(tmp_path, roots, name, overlay)
    plain, changed = expected_settings(name), expected_settings(name, overlay)
    assert {key: plain.get(key) for key in changed} != changed, "it makes a difference"
    if overlay == "prcl/journal":
        memory = cli.model.contrast.memory
        assert memory is not None
        assert "contrast.memory.precision" in cli.model.state_dict()
    if changed["method"] in ("prcl", "point_contrast"):
        contrast = cli.model.contrast
        wanted = (
            ("sum", 0.5) if overlay == "prcl/point_contrast" else (changed["mls_reduction"], changed["temperature"])
        )
        assert (contrast.reduction, contrast.temperature) == wanted
        assert (contrast.anchors, contrast.negatives) == (plain["anchors"], plain["negatives"])


def test_what_is_added_to_a_configuration_is_added_to_the_default_if_alone(tmp_path, roots):
    cli = one_step_of_overlay(tmp_path)
    assert cli.model.hparams.method == "mean_teacher"
    assert cli.datamodule.hparams.layout == "mosaic"
    assert cli.model.hparams.strong_scale == arguments("prcl")["strong_scale"]


def one_step_of_overlay(folder) -> AppCLI:
    options = [
        *("--run.root", str(folder / "runs"), "--model.backbone", TINY_BACKBONE, "--model.backbone_options", "{}"),
        *("--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu", "--data.batch_size", "2"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]
    return AppCLI(APP, ["fit", "--config", "prcl/mean_teacher.yaml", *options])


def test_all_configurations_are_there():
    assert sorted(NAMES) == sorted([*RECIPES, *OVERLAYS])


@pytest.mark.parametrize("name", ["prcl", *RECIPES])
def test_a_recipe_is_a_complete_configuration(name):
    recipe = read(name)
    assert list(recipe) == ["app", "seed_everything", "model", "data", "callbacks", "trainer"]
    assert (recipe["app"], recipe["model"]["class_path"]) == ("prcl", SEGMENTER)
    assert recipe["callbacks"]["checkpoint"] == {
        "class_path": "callbacks.BestAndLastCheckpoint",
        "init_args": {"monitor": "val/main", "mode": "max"},
    }
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line says what it is"
    if name != "prcl":
        assert re.findall(r"fit --config (\S+)", text) == [f"{name}.yaml"]
    assert ("lightning-apps[weights]" in text) == (arguments(name).get("init_from") == "efficientnet-lite0")


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_names_neither_data_nor_network(name):
    """It goes on top of any recipe, so that it must not bring what is another's."""
    overlay = read(name)
    assert overlay["app"] == "prcl"
    assert set(overlay) <= {"app", "model", "data", "callbacks"}
    assert list(overlay["model"]) == ["init_args"]
    assert overlay["model"]["init_args"].keys().isdisjoint({"backbone", "init_from", "lr", "anchors", "negatives"})
    assert overlay.get("data", {"init_args": {"use_unlabeled": False}}) == {"init_args": {"use_unlabeled": False}}
    text = (SHIPPED / f"{name}.yaml").read_text()
    first, second = re.findall(r"--config (\S+)", text)
    assert first.removesuffix(".yaml") in RECIPES
    assert second == f"{name}.yaml"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_values(name):
    """Section 9's table, and sections 2 and 7 for the views."""
    settings, pictures, content = arguments(name), arguments(name, "data"), read(name)
    trainer, teacher = content["trainer"], content["callbacks"]["teacher"]["init_args"]
    voc = name == "prcl/voc_662"
    assert pictures["image_size"] == (321 if voc else 512)
    assert pictures["labeled_scale"] == ([0.5, 1.5] if voc else [1.0, 1.0])
    assert pictures["weak_scale"] == [1.0, 1.0]
    assert settings["strong_scale"] == ([0.5, 1.5] if voc else [0.5, 2.0])
    assert (pictures["batch_size"], trainer["devices"]) == ((2, 8) if voc else (6, 1))
    assert "unlabeled_batch_size" not in pictures, "as many as labelled ones"
    assert (trainer["max_epochs"], pictures["images_per_epoch"], content["seed_everything"]) == (200, 2000, 3407)
    assert (settings["method"], settings["mix"], settings["backbone"]) == ("prcl", "classmix", "resnet101")
    assert (settings["lr"], settings["probability_lr"], settings["min_lr"]) == (3.2e-3, 5e-5, 1e-6)
    assert (settings["weight_decay"], settings["momentum"]) == (5e-4, 0.9)
    assert (settings["lr_reference_batch"], settings.get("head_lr_multiplier", 1)) == (None, 1)
    thresholds = ("unsupervised_threshold", "weak_threshold", "strong_threshold")
    assert [settings[key] for key in thresholds] == [0.97, 0.7, 0.8]
    assert (settings["temperature"], settings["mls_reduction"]) == (100, "sum")
    assert (settings["anchors"], settings["negatives"], settings["dimensions"]) == (256, 512, 256)
    assert (settings["contrast_weight"], settings["contrast_rate"]) == (1, -5)
    assert "contrast_end" not in settings, "the last epoch"
    assert (settings["output_stride"], settings["sync_batchnorm"]) == (16, True)
    assert teacher == {
        "online": "student", "target": "teacher", "momentum": 0.99, "schedule": "warmup", "buffers": "keep",
    }  # fmt: skip


def test_the_overlays_have_the_values_of_the_released_code_and_of_the_draft():
    """Section 8 (similarity and 8-bit path) and section 11."""
    official, journal = arguments("prcl/official_code"), arguments("prcl/journal")
    assert official == {
        "method": "prcl", "mls_reduction": "mean", "temperature": 100, "unsupervised_threshold": 0.97254902,
        "weak_threshold": 0.70196079,
    }  # fmt: skip
    assert journal == {
        "method": "prcl", "mls_reduction": "mean", "temperature": 0.5, "global_prototypes": True, "forget": 1.0,
        "virtual_negatives": 4, "virtual_radius": 1.0, "contrast_rate": 0.0, "contrast_end": math.inf,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), [("prcl/voc_662", 59_520_693), ("prcl/cityscapes_150", 59_520_179)])
def test_the_network_is_the_published_one(name, parameters):
    settings = arguments(name)
    with torch.device("meta"):
        network = DeepLabV3Plus(settings["backbone"], CLASSES[arguments(name, "data")["layout"]])
        heads = RepresentationHeads(network.feature_channels, settings["dimensions"], probabilistic=True)
    assert sum(parameter.numel() for parameter in network.parameters()) + count(heads.mean) == parameters
    assert count(heads.probability) == 143_874


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_cpu_recipe_is_the_preset_of_the_specification():
    """Section 16: tf_efficientnet_lite0, 240 x 180, Q 64, K 128; the rates are 64 times apart (section 1)."""
    settings, pictures = arguments("prcl/camvid_46"), arguments("prcl/camvid_46", "data")
    assert (settings["backbone"], settings["anchors"], settings["negatives"]) == ("tf_efficientnet_lite0", 64, 128)
    assert pictures["train_shorter_side"] == pictures["test_shorter_side"] == 180
    assert pictures["mean"] == pictures["std"] == [0.5, 0.5, 0.5]
    for name, tolerance in (("prcl/camvid_46", 0.05), ("prcl", 0.05), ("prcl/voc_662", 1e-9)):
        options = arguments(name)
        ratio = options["lr"] * options.get("head_lr_multiplier", 1) / options["probability_lr"]
        assert ratio == pytest.approx(64, rel=tolerance)


def test_the_defaults_of_the_module_are_those_of_the_recipe():
    module = ProbabilisticSegmenter(backbone=TINY_BACKBONE).hparams
    settings = arguments("prcl/voc_662")
    told = {key: value for key, value in settings.items() if key not in ("backbone", "temperature")}
    assert {key: module[key] if key != "strong_scale" else list(module[key]) for key in told} == told
    assert settings["temperature"] == ProbabilisticSegmenter(backbone=TINY_BACKBONE).contrast.temperature
