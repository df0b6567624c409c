"""Bits of any network in any training: chosen once, applied, told, and kept."""

import csv
import json
from itertools import pairwise

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader

import modules.emo  # noqa: F401  registers the networks in timm
from callbacks import BestAndLastCheckpoint, BitAllocation, EMATarget
from datamodules import SemiSupervisedSegmentation
from modules.classification import ImageClassifier
from modules.prcl import ProbabilisticSegmenter
from modules.quantization.attachment import weight_quantizers
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.mixed_precision import (
    Classifier,
    allocation,
    check_budget,
    check_levels,
    input_bits,
    loader,
    ranges,
    weight_bits,
)
from tests.callbacks.wandb_files import history
from tests.modules.street_scenes import TINY_BACKBONE
from tests.modules.toy_images import TINY, batches

EMO = {
    "depths": (1, 1, 2, 2),
    "dims": (8, 12, 16, 24),
    "expansions": (2, 2, 2, 1.5),
    "head_dims": (0, 0, 8, 6),
    "stem_dim": 8,
}
STEADY = {"warmup_epochs": 0, "lr_reference_batch": None}


def pictures(count=2, **options):
    return DataLoader(batches(count, **options), batch_size=None)


def emo():
    module = ImageClassifier("emo_1m", EMO, num_classes=3, image_size=32, in_channels=3, **STEADY)
    return module, pictures(size=8, side=32, channels=3), "network"


def vit():
    return ImageClassifier(encoder_options=TINY, num_classes=3, **STEADY), pictures(size=8), "network"


def prcl():
    module = ProbabilisticSegmenter(
        backbone=TINY_BACKBONE, num_classes=5, method="mean_teacher", unsupervised_threshold=0.2
    )
    data = SemiSupervisedSegmentation(
        layout="mosaic", labeled=4, image_size=33, batch_size=2, images_per_epoch=4, num_workers=0
    )
    return module, data, ["student", "teacher"]


def plain():
    return Classifier(), loader(16), "model"


@pytest.mark.filterwarnings("ignore:window_size. a .* map is padded:UserWarning")
@pytest.mark.parametrize("make", [emo, vit, prcl, plain])
def test_works_unchanged_on_a_module(tmp_path, make, monkeypatch):
    monkeypatch.setattr("callbacks.media._encode_figure", lambda figure: b"")  # drawing takes longer than all else
    torch.manual_seed(0)
    module, data, paths = make()
    teacher = [EMATarget("student", "teacher", 0.99, "warmup", log_as=None)] if make is prcl else []
    callback = BitAllocation(paths, mean_bits=5, pictures=8)
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, callbacks=[callback, *teacher], logger=CSVLogger(tmp_path), limit_val_batches=0
    )
    trainer.fit(module, data)
    assert trainer.global_step == 2
    for path in [paths] if isinstance(paths, str) else paths:
        network = module.get_submodule(path)
        check_budget(network, tmp_path / "bits.yaml", 5)
        check_levels(network, weight_bits(network))
        assert set(input_bits(network).values()) == {8}
        assert all(low < high for low, high in ranges(network).values())
    with open(f"{trainer.logger.log_dir}/metrics.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row.get("quantization/size_mib")]
    told = yaml.safe_load((tmp_path / "bits.yaml").read_text())
    assert float(row["quantization/size_mib"]) == pytest.approx(told["size_mib"])
    assert float(row["quantization/gbops"]) == pytest.approx(told["gbops"])
    assert 4 < float(row["quantization/mean_bits"]) <= 5


class Seen(Callback):
    """Pictures of each training step, and where training was when bits were chosen."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_looking_at_pictures_takes_none_from_training(tmp_path, options):
    seen = Seen()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[allocation(begin_epoch=0), seen])
    trainer.fit(Classifier(), loader(32, 8, **options))
    expected = [pictures for pictures, _ in loader(32, 8)] * 2
    assert len(seen.batches) == len(expected)
    assert all(torch.equal(found, wanted) for found, wanted in zip(seen.batches, expected, strict=True))


def test_the_dashboard_and_the_folder_tell_the_bits(tmp_path):
    module, logger = Classifier(), WandbLogger(save_dir=tmp_path, offline=True)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[allocation()], logger=logger).fit(module, loader())
    logger.experiment.finish()
    bits = weight_bits(module.model)
    folder = tmp_path / "media/quantization"
    with open(folder / "layers/step-00000000.csv", newline="") as file:
        table = {row["layer"]: row for row in csv.DictReader(file)}
    assert {name: int(row["bits"]) for name, row in table.items()} == bits
    for name, row in table.items():
        layer = module.model.get_submodule(name)
        plain = layer.weight.numel() + (layer.bias is not None) * len(layer.weight)
        assert int(row["parameters"]) == plain + 2 * len(layer.weight) * isinstance(layer, nn.Conv2d)
        assert row["bits (equal)"]
        assert row["bits (random)"]
    first_and_last = {"conv", "head"}
    assert {name for name, row in table.items() if not row["worth of a bit"]} >= first_and_last
    for name in ("bits", "score"):
        assert (folder / name / "step-00000000.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "bits/step-00000000.csv", newline="") as file:
        assert {row["label"]: float(row["value"]) for row in csv.DictReader(file)} == bits
    rows = history(tmp_path)
    logged = {key: row[key] for row in rows for key in row}
    assert logged["quantization/mean_bits"] == pytest.approx(mean(bits, table))
    assert (logged["quantization/layers/_type"], logged["quantization/layers/nrows"]) == ("table-file", len(bits))
    (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{logged['quantization/layers/path']}")
    assert {row[0]: row[1] for row in json.loads(file.read_text())["data"]} == bits
    assert any(key.startswith("quantization/bits") for key in logged)


def mean(bits, table):
    """Mean bits over all parameters."""
    counts = {name: int(row["parameters"]) for name, row in table.items()}
    return sum(bits[name] * counts[name] for name in bits) / sum(counts.values())


class States(Callback):
    """The network's weights and bits at the start of each epoch's first batch and at its end; after the allocation."""

    def __init__(self):
        self.weights, self.bits = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = pl_module.model.state_dict()
        float_names = {key.replace("parametrizations.weight.original", "weight"): key for key in state}
        self.weights.append({name: state[key].clone() for name, key in float_names.items()})
        self.bits.append(weight_bits(pl_module.model))


def test_before_its_epoch_training_is_as_without_and_then_quantized(tmp_path):
    found = {}
    for name, callbacks in (("without", []), ("with", [allocation(begin_epoch=1)])):
        module, states = Classifier(), States()
        quiet_trainer(tmp_path, max_epochs=2, callbacks=[*callbacks, states]).fit(module, loader())
        found[name] = module, states
    (_, plain), (module, states) = found["without"], found["with"]
    assert len(plain.weights) == 8
    for expected, weights in zip(plain.weights[:4], states.weights[:4], strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    assert not any(any(bits.values()) for bits in states.bits[:4])
    assert all(all(bits.values()) for bits in states.bits[4:])
    assert any(not torch.equal(value, states.weights[4][name]) for name, value in plain.weights[4].items())
    check_levels(module.model, weight_bits(module.model))


class Worsening(Classifier):
    """Its score is best in the first epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("score", 1.0 / (1 + self.current_epoch))
        self.log("loss", float(self.current_epoch))


@pytest.mark.parametrize("make", [BestAndLastCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize(("monitor", "mode"), [("score", "max"), ("loss", "min")])
def test_the_best_checkpoint_is_one_with_bits(tmp_path, make, monitor, mode):
    saver = make(dirpath=tmp_path, filename="best", monitor=monitor, mode=mode)
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[allocation(begin_epoch=2), saver])
    trainer.fit(Worsening(), loader(16), loader(16))
    content = torch.load(saver.best_model_path, weights_only=True)
    assert content["epoch"] == 2
    assert content["callbacks"]["BitAllocation"]["chosen"]
    assert saver.best_model_score == pytest.approx({"score": 1 / 3, "loss": 2.0}[monitor])
    assert [path.name for path in tmp_path.glob("best*")] == ["best.ckpt"]


def test_an_edited_file_is_applied(tmp_path):
    first = Classifier()
    quiet_trainer(tmp_path / "first", max_epochs=1, callbacks=[allocation()]).fit(first, loader(16))
    content = yaml.safe_load((tmp_path / "first/bits.yaml").read_text())
    layers = content["layers"]
    layers["blocks.0.conv1"]["weight_bits"] = 2
    layers["head"]["weight_bits"] = 3
    layers["blocks.1.conv2"]["activation_bits"] = 6
    layers["conv"]["activation_bits"] = 32
    edited = tmp_path / "mine.yaml"
    edited.write_text(yaml.safe_dump(content))
    module = Classifier()
    callback = BitAllocation("model", allocation=str(edited), pictures=8)
    quiet_trainer(tmp_path / "second", max_epochs=1, callbacks=[callback]).fit(module, loader(16))
    expected = {name: row["weight_bits"] for name, row in layers.items()}
    assert weight_bits(module.model) == expected != weight_bits(first.model)
    check_levels(module.model, expected)
    assert input_bits(module.model) == {name: row["activation_bits"] % 32 for name, row in layers.items()}
    written = yaml.safe_load((tmp_path / "second/bits.yaml").read_text())
    assert written["layers"] == layers
    assert written["provenance"]["edited"] is True
    assert written["size_mib"] == pytest.approx(
        sum(row["weight_bits"] * row["parameters"] for row in layers.values()) / 2**23
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_norms_keep_their_statistics_from_then_on(tmp_path, freeze):
    module, states = Classifier(), States()
    callbacks = [allocation(begin_epoch=1, freeze_norms=freeze), states]
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=callbacks, num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader())
    statistics = [{key: value for key, value in state.items() if "running_" in key} for state in states.weights]
    assert statistics[0], "there are norms"
    for step, (before, after) in enumerate(pairwise(statistics)):
        still = [torch.equal(before[name], after[name]) for name in before]
        assert all(still) if freeze and step >= 3 else not any(still), f"after step {step}"
    norms = [part for part in module.model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {norm.training for norm in norms} == {not freeze}
    assert all(norm.weight.requires_grad for norm in norms), "their scales and shifts are trained on"


@pytest.mark.parametrize("scale", ["fixed", "learned"])
def test_scales_that_are_not_the_largest_weight(tmp_path, scale):
    class Scales(Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            own = [(one.scale, one.scale.grad) for one in weight_quantizers(pl_module.model).values()]
            self.seen.append([(value.detach().clone(), grad) for value, grad in own])

    module, scales = Classifier(), Scales()
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[allocation(weight_scale=scale), scales]).fit(module, loader())
    first, last = scales.seen[0], scales.seen[-1]
    moved = [not torch.equal(before, after) for (before, _), (after, _) in zip(first, last, strict=True)]
    assert all(moved) if scale == "learned" else not any(moved)
    for value, gradient in first:
        assert (value > 0).all()
        assert not torch.equal(value, torch.ones_like(value)), "a search has set it"
        assert (gradient is not None and gradient.abs().sum() > 0) == (scale == "learned")
    for name, number in weight_bits(module.model).items():
        layer = module.model.get_submodule(name)
        step = weight_quantizers(module.model)[name].scale.detach()
        levels = layer.weight.detach().flatten(1) / step[:, None]
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert levels.min() >= -(2 ** (number - 1)) - 1e-3
        assert levels.max() <= 2 ** (number - 1) - 1 + 1e-3
    assert all(torch.isfinite(torch.tensor(module.losses)))


def test_half_precision_and_exclusion(tmp_path):
    module = Classifier()
    callback = allocation(exclude=["blocks.0.*"], activation_bits=None, layer_bits={"blocks.1.*": [3, 4]}, mean_bits=4)
    quiet_trainer(tmp_path, max_epochs=1, precision="bf16-mixed", callbacks=[callback]).fit(module, loader(16))
    bits = weight_bits(module.model)
    assert bits.keys() == {"conv", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.shortcut.0", "head"}
    assert {bits.pop("conv"), bits.pop("head")} == {8}
    assert set(bits.values()) <= {3, 4}
    assert not input_bits(module.model)
    assert type(module.model.blocks[0].conv1) is nn.Conv2d


def test_a_trial_run_writes_nothing_and_claims_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    quiet_trainer(tmp_path, fast_dev_run=True, callbacks=[allocation()]).fit(Classifier(), loader(16))
    assert not list(tmp_path.rglob("*.yaml"))
    assert not list(tmp_path.rglob("*.png"))
    assert "bits of 7 layers" in caplog.text
    assert "written to" not in caplog.text
