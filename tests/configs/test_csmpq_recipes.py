"""Every shipped configuration of CSMPQ: composed by the real command line, and one step on data in its layout."""

import re

import pytest
import torch

from callbacks import BitAllocation, BlockReconstruction
from lightning_apps.cli import AppCLI
from lightning_apps.config_files import SHIPPED
from lightning_apps.csmpq import APP
from modules.quantization.attachment import input_quantizers, weight_quantizers
from tests.configs.recipes import arguments, read, recipes
from tests.data_layouts import save_image

PUBLISHED = {
    "csmpq/imagenet_resnet18": ("torchvision/resnet18", 6.7, 6, 8),
    "csmpq/imagenet_resnet50": ("torchvision/resnet50", 16.0, 5, 8),
    "csmpq/imagenet_ptq_resnet18": ("torchvision/resnet18", 4.0, 8, None),
    "csmpq/imagenet_ptq_mobilenetv2": ("torchvision/mobilenet_v2", 1.5, 8, None),
}
RECIPES = [*PUBLISHED, "csmpq/lite0_ptq", "csmpq/tiny_imagenet_10"]
UNIFORM = "csmpq/uniform"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """``{train,val}/<class>/*`` of three classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(("n01443537", "n02099601", "n02123045")):
        for part, numbers in (("train", range(4)), ("val", range(4, 5))):
            for number in numbers:
                save_image(folder / part / name / f"{number}.JPEG", seed=10 * label + number, size=(64, 64))
    return folder


def one_step(folder, root, *names: str) -> AppCLI:
    """`fit` of one batch of four, pictures of 32 pixels, with these configurations on top of each other."""
    options = [
        *("--run.root", str(folder / "runs"), "--data.image_size", "32", "--data.batch_size", "4"),
        *("--data.num_workers", "0", "--callbacks.allocation.pictures", "4"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "csv"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--model.init_from", "null", "--callbacks.pictures", "null"),
    ]
    if read(names[0])["data"]["init_args"]["layout"] == "folder":
        options += ["--data.root", str(root)]
    if "reconstruction" in read(names[0])["callbacks"]:
        small = {"steps": 1, "pictures": 4, "batch_size": 2}
        options += [part for key, value in small.items() for part in (f"--callbacks.reconstruction.{key}", str(value))]
    if names[0] == "csmpq/imagenet_ptq_resnet18":  # nine tenths of its weights, whose grids take long to search
        options += ["--callbacks.allocation.exclude", "[layer3.*, layer4.*]"]
    given = [part for name in names for part in ("--config", f"{name}.yaml")]
    return AppCLI(APP, ["fit", *given, *options])


def callback(cli: AppCLI, kind: type):
    (found,) = [one for one in cli.trainer.callbacks if isinstance(one, kind)]
    return found


@pytest.mark.filterwarnings("ignore:no constraint is active")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in RECIPES[:-1]] + RECIPES[-1:])
def test_a_recipe_trains(name, tmp_path, root):
    cli = one_step(tmp_path, root, name)
    allocation = callback(cli, BitAllocation)
    settings = read(name)["callbacks"]["allocation"]["init_args"]
    assert cli.trainer.global_step == 1
    bits = {layer: one.width for layer, one in weight_quantizers(cli.model.network).items()}
    assert bits == allocation.chosen["weight_bits"]
    allowed = {*settings["bits"], *([settings["first_last_bits"]] if settings["first_last_bits"] else [])}
    assert set(bits.values()) <= allowed
    inputs = {one.width for one in input_quantizers(cli.model.network).values()}
    assert inputs == {settings["activation_bits"], max(settings["activation_bits"], settings["first_last_bits"] or 0)}
    ptq = arguments(name)["quantization"] == "ptq"
    assert cli.model.automatic_optimization != ptq
    assert ("reconstruction" in read(name)["callbacks"]) == ptq == (settings.get("weight_scale") == "fixed")
    if ptq:
        assert callback(cli, BlockReconstruction).done
    assert (tmp_path / "runs" / name / "bits.yaml").exists()
    assert all(torch.isfinite(value).all() for value in cli.model.state_dict().values())


def test_the_control_gives_all_layers_the_same_bits(tmp_path, root):
    cli = one_step(tmp_path, root, "csmpq/tiny_imagenet_10", UNIFORM)
    assert {one.width for one in weight_quantizers(cli.model.network).values()} == {5}


def test_all_configurations_are_there():
    assert sorted(recipes("csmpq")) == sorted(["csmpq", *RECIPES, UNIFORM])


@pytest.mark.parametrize("name", ["csmpq", *RECIPES])
def test_a_recipe_is_a_complete_configuration(name):
    recipe = read(name)
    assert list(recipe) == ["app", "seed_everything", "model", "data", "callbacks", "trainer"]
    assert (recipe["app"], recipe["model"]["class_path"]) == ("csmpq", "modules.csmpq.QuantizedClassifier")
    assert recipe["callbacks"]["checkpoint"] == {
        "class_path": "callbacks.BestAndLastCheckpoint",
        "init_args": {"monitor": "val/main", "mode": "max"},
    }
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line says what it is"
    if name != "csmpq":
        assert re.findall(r"csmpq fit --config (\S+)", text) == [f"{name}.yaml"]


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_a_published_configuration_has_the_published_values(name, published):
    """Sections 6, 7 and 9 of the specification."""
    settings, content = arguments(name), read(name)
    allocation, trainer = content["callbacks"]["allocation"]["init_args"], content["trainer"]
    own = [allocation[key] for key in ("size_budget", "activation_bits", "first_last_bits")]
    assert (settings["encoder"], *own) == published
    if "ptq" in name:
        reconstruction = content["callbacks"]["reconstruction"]["init_args"]
        assert allocation["bits"] == [2, 3, 4]
        assert allocation["score"]["init_args"]["weighting"] == "exp_neg"
        assert (reconstruction["steps"], reconstruction["learning_rate"], reconstruction["batch_size"]) == (
            20_000, 1e-3, 32,
        )  # fmt: skip
        assert reconstruction["regulariser"] == (0.1 if "mobilenet" in name else 0.01)
        assert reconstruction["pictures"] == 1024
    else:
        assert allocation["bits"] == [4, 5, 6, 7, 8]
        assert (settings["optimizer"], settings["lr"], settings["weight_decay"]) == ("sgd", 1e-4, 1e-4)
        assert (settings["schedule"], settings["warmup_epochs"], trainer["max_epochs"]) == ("cosine", 0, 90)
        assert arguments(name, "data")["batch_size"] == 1024
