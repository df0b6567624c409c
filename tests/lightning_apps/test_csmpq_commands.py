"""Commands of the CSMPQ app, each in a fresh process outside the checkout, on what a short `fit` wrote."""

import csv
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from callbacks import BitAllocation
from datamodules import ImageClassification
from lightning_apps.checkpoints import read_checkpoint
from modules.classification import ImageClassifier
from modules.csmpq import QuantizedClassifier
from modules.quantization.attachment import bake, input_quantizers, set_bits, weight_quantizers
from modules.quantization.packing import load_packed
from tests.callbacks.mixed_precision import check_budget, check_levels, weight_bits
from tests.lightning_apps.commands import last, rows, run, run_python
from tests.modules.toy_images import quiet_trainer

pytestmark = pytest.mark.slow

ENCODER = {"channels": [8, 8, 16, 16], "stem_width": 8}
QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "csv", "--trainer.enable_progress_bar", "false"]
SMALL = [*QUIET, "--model.encoder_options", json.dumps(ENCODER), "--data.num_workers", "0"]
SHORT = [*SMALL, "--trainer.max_epochs", "3", "--callbacks.allocation.begin_epoch", "2", "--model.lr", "0.02"]
LAST = ["--ckpt_path", "runs/csmpq/csmpq/checkpoints/last.ckpt"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    run_python(folder, "fit", *SHORT, app="csmpq")
    return folder


@pytest.fixture(scope="module")
def finished(work) -> Path:
    return work / "runs/csmpq/csmpq"


@pytest.fixture
def module(finished) -> QuantizedClassifier:
    """The module of the checkpoint, put together by the means that a person's own project has."""
    content = read_checkpoint(finished / "checkpoints/last.ckpt", weights_only=True)
    settings = {key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")}
    assert settings.keys() >= {"quantization", "encoder", "num_classes"}
    module = QuantizedClassifier(**settings)
    BitAllocation(mean_bits=4).setup(quiet_trainer(), module, "predict")
    module.load_state_dict(content["state_dict"])
    return module.eval()


@pytest.fixture(scope="module")
def data() -> ImageClassification:
    data = ImageClassification(image_size=32, eval_batch_size=256, num_workers=0, seed=0)
    data.setup("fit")
    data.setup("test")
    return data


@torch.no_grad()
def logits(network: torch.nn.Module, loader) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(network(batch.images), batch.labels) for batch in loader]
    return tuple(torch.cat(part) for part in zip(*pairs, strict=True))


def accuracy(network: torch.nn.Module, loader) -> float:
    found, labels = logits(network, loader)
    return (found.argmax(1) == labels).float().mean().item()


def test_fit_leaves_a_network_with_bits_and_tells_them(finished, module):
    check_budget(module.network, finished / "bits.yaml", 4)
    check_levels(module.network, weight_bits(module.network))
    content = read_checkpoint(finished / "checkpoints/last.ckpt", weights_only=True)
    assert content["callbacks"]["BitAllocation"]["chosen"]["weight_bits"] == weight_bits(module.network)
    assert last(finished / "metrics.csv", "quantization/size_mib") == pytest.approx(
        yaml.safe_load((finished / "bits.yaml").read_text())["size_mib"]
    )
    assert list((finished / "media/quantization/layers").glob("*.csv"))


def test_scores_and_predictions_are_those_of_the_loaded_module(work, finished, module, data):
    for command in ("validate", "test", "predict"):
        run(work, command, *LAST, *QUIET, app="csmpq")
    assert last(finished / "validate/metrics.csv", "val/main") == pytest.approx(
        last(finished / "metrics.csv", "val/main"), abs=1e-6
    )
    found, labels = logits(module.network, data.test_dataloader())
    table = pd.read_csv(finished / "predict/predictions.csv")
    np.testing.assert_allclose(table[data.class_names].to_numpy(), found.softmax(1).numpy(), atol=1e-5)
    share = (found.argmax(1) == labels).float().mean().item()
    assert last(finished / "test/metrics.csv", "test/acc") == pytest.approx(share, abs=1e-6)
    assert share > 0.2, "it has learned something in three epochs"
    unquantized, _ = logits(as_float(module).network, data.test_dataloader())
    assert not torch.allclose(found, unquantized, atol=1e-2), "bits are of effect"


def as_float(module: QuantizedClassifier) -> QuantizedClassifier:
    network = module.network
    set_bits(network, dict.fromkeys(weight_quantizers(network), 0), dict.fromkeys(input_quantizers(network), 0))
    return module


def test_allocate_writes_bits_that_can_be_edited_and_given_back(work, finished):
    run(work, "allocate", *LAST, *QUIET, "--callbacks.allocation.mean_bits", "5", app="csmpq")
    content = yaml.safe_load((finished / "allocate/bits.yaml").read_text())
    table = {row["layer"]: row for row in rows(finished / "allocate/layers.csv")}
    assert {name: int(row["bits"]) for name, row in table.items()} == {
        name: row["weight_bits"] for name, row in content["layers"].items()
    }
    assert {"bits (equal)", "bits (random)", "worth of a bit", "parameters"} <= table["fc"].keys()
    spent = sum(row["parameters"] * row["weight_bits"] for row in content["layers"].values())
    total = sum(row["parameters"] for row in content["layers"].values())
    assert 4 < spent / total <= 5
    assert content["size_mib"] == pytest.approx(spent / 2**23)

    content["layers"]["layer2.0.conv1"]["weight_bits"] = 3
    (work / "mine.yaml").write_text(yaml.safe_dump(content))
    again = ["--model.init_from", str(finished / "checkpoints/last.ckpt"), "--callbacks.allocation.begin_epoch", "0"]
    given = ["--callbacks.allocation.allocation", "mine.yaml", "--callbacks.allocation.mean_bits", "null"]
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--run.name", "given"]
    run(work, "fit", *SMALL, *again, *given, *limits, app="csmpq")
    chosen = read_checkpoint(work / "runs/csmpq/given/checkpoints/last.ckpt")["callbacks"]["BitAllocation"]["chosen"]
    assert chosen["weight_bits"] == {name: row["weight_bits"] for name, row in content["layers"].items()}


def test_sweep_compares_budgets_and_methods(work, finished, module, data):
    run(work, "sweep", *LAST, *QUIET, "--budgets", "[3,4.5]", app="csmpq")
    table = rows(finished / "sweep/sweep.csv")
    methods = [(row["method"], float(row["mean bits"])) for row in table]
    assert methods == [
        ("float", 32.0),
        *((name, 3.0) for name in ("method", "equal", "random", "uniform")),
        *((name, 4.5) for name in ("method", "equal", "random")),
    ]
    size = float(table[0]["size MiB"])
    for row in table[1:]:
        assert float(row["size MiB"]) <= size * float(row["mean bits"]) / 32 + 1e-9
    assert (finished / "sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    quantized = accuracy(module.network, data.val_dataloader())
    network = as_float(module).network
    assert float(table[0]["main"]) == pytest.approx(accuracy(network, data.val_dataloader()), abs=1e-6)
    assert float(table[0]["main"]) != quantized, "although the checkpoint has bits"

    # The uniform row by hand: nearest rounding to 3 bits, and inputs in the range of the calibration pictures.
    for quantizer in input_quantizers(network).values():
        quantizer.batches.zero_()
        quantizer.train()
    set_bits(network, dict.fromkeys(weight_quantizers(network), 3), dict.fromkeys(input_quantizers(network), 8))
    data.trainer = None
    logits(network, data.calibration_dataloader(128))
    (row,) = [row for row in table if row["method"] == "uniform"]
    assert float(row["main"]) == pytest.approx(accuracy(network.eval(), data.val_dataloader()), abs=1e-6)


def test_what_is_exported_computes_what_the_network_does(work, finished, module, data):
    run(work, "export", *LAST, "--formats", "[onnx,safetensors,packed,int8]", *QUIET, app="csmpq")
    folder = finished / "export"
    images = next(iter(data.test_dataloader())).images[:64]
    with torch.inference_mode():
        quantized = module.network(images)
    network = bake(module.deployable_network())
    with torch.inference_mode():
        expected = network(images)
    tensors, weights = load_file(folder / "model.safetensors"), network.state_dict()
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], value) for name, value in weights.items())
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * expected.abs().max().item())
    session = onnxruntime.InferenceSession(str(folder / "model.int8.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})[0]
    assert (found.argmax(1) == quantized.argmax(1).numpy()).mean() > 0.9
    plain = ImageClassifier(encoder="resnet10t", encoder_options=ENCODER, image_size=32, drop_path=0.0).network
    load_packed(plain, folder / "model.packed.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(plain.eval()(images), expected, rtol=1e-4, atol=1e-4)
    report = json.loads((folder / "export.json").read_text())
    assert report["quantization"]["int8"]["calibration_images"] == 128
    assert report["facts"]["num_classes"] == 10


def test_post_training_quantization_keeps_the_classifier_of_another_app(work, data):
    settings = {"encoder": "resnet10t", "encoder_options": ENCODER, "image_size": 32, "drop_path": 0.0}
    torch.manual_seed(0)
    trained = ImageClassifier(**settings)
    trainer = quiet_trainer()
    trainer.strategy.connect(trained)
    trainer.save_checkpoint(work / "trained.ckpt")
    (work / "ptq.yaml").write_text(
        "app: csmpq\n"
        "model: {init_args: {quantization: ptq}}\n"
        "callbacks:\n"
        "  allocation: {init_args: {weight_scale: fixed, begin_epoch: 0, pictures: 64}}\n"
        "  reconstruction: {class_path: callbacks.BlockReconstruction,"
        " init_args: {steps: 20, pictures: 64, batch_size: 32}}\n"
    )
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    run(work, "fit", *SMALL, "--config", "ptq.yaml", "--model.init_from", "trained.ckpt", *limits, app="csmpq")
    folder = work / "runs/csmpq/ptq"
    content = read_checkpoint(folder / "checkpoints/last.ckpt", weights_only=True)
    state, network = content["state_dict"], trained.network
    assert content["global_step"] == 2
    assert content["callbacks"]["BlockReconstruction"] == {"done": True}
    assert torch.equal(state["network.fc.bias"], network.fc.bias)
    assert torch.equal(state["network.bn1.running_mean"], network.bn1.running_mean)
    rounded = state["network.fc.parametrizations.weight.original"]
    scale = state["network.fc.parametrizations.weight.0.scale"]
    assert 0 < (rounded - network.fc.weight).abs().max() <= scale.max() * 1.01, "8 bits, up or down"
    assert {"fc", "layer1.0"} <= {path.stem for path in (folder / "reconstruction").glob("*.safetensors")}
    with open(next((folder / "media/quantization/blocks").glob("*.csv")), newline="") as file:
        assert {row["block"] for row in csv.DictReader(file)} >= {"fc", "layer1.0"}
