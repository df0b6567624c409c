"""What `export` writes computes what torch computes, and says so when it does not."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from lightning_apps import exporting
from lightning_apps.errors import UserError
from lightning_apps.exporting import export_network
from lightning_apps.trainer import AppTrainer
from modules.quantization.attachment import attach_quantizers, bake, set_bits
from modules.quantization.packing import load_packed

FACTS = {"image_size": 6, "in_channels": 2, "class_names": ["a", "b"]}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def test_onnx_runs_at_any_batch_size_and_safetensors_opens_anywhere(network, tmp_path):
    import onnxruntime

    written = export_network(network, FACTS, tmp_path)
    session = onnxruntime.InferenceSession(str(written["onnx"]), providers=["CPUExecutionProvider"])
    images = torch.randn(7, 2, 6, 6)
    expected = network.eval()(images).detach()
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected)
    with safe_open(written["safetensors"], "pt") as file:
        assert json.loads(file.metadata()["facts"]) == FACTS
        restored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    assert restored.keys() == network.state_dict().keys()
    description = json.loads(written["description"].read_text())
    assert description["facts"] == FACTS
    assert description["parameters"] == sum(p.numel() for p in network.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.onnx", "model.safetensors"]


def test_program_of_torch_export_runs_at_any_batch_size(network, tmp_path):
    written = export_network(network, FACTS, tmp_path, formats=["pt2"])
    images = torch.randn(3, 2, 6, 6)
    found = torch.export.load(written["pt2"]).module()(images)
    torch.testing.assert_close(found, network.eval()(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.pt2"]


def test_files_are_made_for_the_height_and_width_that_are_asked_for(tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    network = nn.Conv2d(2, 3, 3, padding=1).eval()
    written = export_network(network, FACTS, tmp_path, formats=["onnx", "pt2"], input_size=[5, 9])
    images = torch.randn(3, 2, 5, 9)
    expected = network(images).detach()
    session = onnxruntime.InferenceSession(str(written["onnx"]), providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected)
    torch.testing.assert_close(torch.export.load(written["pt2"]).module()(images), expected)
    assert json.loads(written["description"].read_text())["input_shape"] == ["batch", 2, 5, 9]


@pytest.mark.parametrize("size", [[5], [0, 5], [5, 5, 5]], ids=str)
def test_sizes_that_are_no_height_and_width_are_refused(network, tmp_path, size):
    with pytest.raises(UserError, match=r"--input_size \[.*\]: expected \[height, width\] in pixels"):
        export_network(network, FACTS, tmp_path, input_size=size)
    with pytest.raises(UserError, match="--input_size: int8 is made for pictures of the data"):
        export_network(network, FACTS, tmp_path, formats=["int8"], input_size=[6, 6])


def test_a_difference_is_an_error_and_leaves_no_file(network, tmp_path):
    with pytest.raises(UserError, match=r"model.onnx and torch differ by .* at batch 1 \(tolerance -1e\+00\)"):
        export_network(network, FACTS, tmp_path, formats=["onnx"], tolerance=-1.0)
    assert not list(tmp_path.glob("*.onnx*"))


def test_without_the_extra_its_name_is_said(network, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime: pip install 'lightning-apps\[export\]'"):
        export_network(network, FACTS, tmp_path)
    assert (tmp_path / "model.safetensors").is_file(), "safetensors needs nothing more"


@pytest.fixture
def quantized(network):
    attach_quantizers(network, ["0", "4"])
    set_bits(network, {"0": 3, "4": 8}, {"0": 8})
    network(torch.randn(8, 2, 6, 6))
    return network.eval()


def test_a_quantized_network_in_all_formats(quantized, tmp_path):
    plain = bake(copy.deepcopy(quantized))
    images = torch.randn(40, 2, 6, 6)
    formats = ["onnx", "safetensors", "pt2", "int8", "packed"]
    written = export_network(quantized, FACTS, tmp_path, formats=formats, images=images)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "export.json",
        "model.int8.onnx",
        "model.onnx",
        "model.packed.safetensors",
        "model.pt2",
        "model.safetensors",
    ]
    with safe_open(written["safetensors"], "pt") as file:
        restored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    assert restored.keys() == plain.state_dict().keys()
    assert torch.equal(restored["0.weight"], plain[0].weight), "float formats hold the quantized weights"
    fresh = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    assert load_packed(fresh, written["packed"]).facts == FACTS
    assert torch.equal(fresh.eval()(images), plain(images))
    told = json.loads(written["description"].read_text())["quantization"]
    assert told["weight_bits"] == {"0": 3, "4": 8}
    assert told["bops_g"] == pytest.approx((16 * 4 * 2 * 9 * 3 * 8 + 64 * 2 * 8 * 32) / 1e9, abs=1e-4)
    assert told["packed_weights_mib"] == pytest.approx((72 * 3 / 8 + 128) / 2**20, abs=1e-4)
    assert told["files_mib"].keys() == set(formats)
    assert told["latency_ms"].keys() == {"onnx", "int8"}
    assert "No kernel here computes in fewer than 8 bits" in told["note"]
    assert told["int8"]["calibration_images"] == 40
    assert told["int8"]["top1_agreement_on_them"] >= 0.95
    assert told["int8"]["relative_error_on_them"] < 0.05


def test_formats_that_need_bits_say_so(network, tmp_path):
    with pytest.raises(UserError, match=r"--formats packed: the network has no quantizers; .* csmpq"):
        export_network(network, FACTS, tmp_path, formats=["onnx", "packed"])
    attach_quantizers(network, ["0"])
    with pytest.raises(UserError, match="--formats int8, packed: no layer has bits yet"):
        export_network(network, FACTS, tmp_path, formats=["int8", "packed"])
    assert not list(tmp_path.iterdir())
    assert "packed" not in export_network(network, FACTS, tmp_path, formats=["safetensors"])
    set_bits(network, {"0": 4})
    with pytest.raises(UserError, match="--formats int8: needs pictures"):
        export_network(network, FACTS, tmp_path, formats=["int8"])


class Quantized(LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def deployable_network(self):
        return copy.deepcopy(self.network)


class Pictures(LightningDataModule):
    def val_dataloader(self):
        pictures = torch.randn(20, 2, 6, 6, generator=torch.Generator().manual_seed(3))
        return DataLoader(pictures, batch_size=8, collate_fn=lambda rows: SimpleNamespace(images=torch.stack(rows)))


class CalibrationPictures(Pictures):
    def calibration_dataloader(self, count):
        pictures = torch.full((count, 2, 6, 6), 0.5)
        return DataLoader(pictures, batch_size=8, collate_fn=lambda rows: SimpleNamespace(images=torch.stack(rows)))


@pytest.mark.parametrize("data", [Pictures, CalibrationPictures])
def test_the_command_calibrates_with_pictures_of_the_data(quantized, tmp_path, monkeypatch, data):
    seen = {}
    monkeypatch.setattr("lightning_apps.trainer.export_network", lambda *a, **options: seen.update(options) or {})
    module = Quantized(quantized)
    checkpoint = tmp_path / "c.ckpt"
    torch.save({"state_dict": module.state_dict()}, checkpoint)
    trainer = AppTrainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.export(module, data(), str(checkpoint), formats=["int8"], calibration_images=11)
    assert seen["images"].shape == (11, 2, 6, 6)
    assert bool((seen["images"] == 0.5).all()) == (data is CalibrationPictures)
    trainer.export(module, data(), str(checkpoint), formats=["packed"])
    assert seen["images"] is None
    with pytest.raises(UserError, match="--formats int8: needs pictures to calibrate with: give the data"):
        trainer.export(module, None, str(checkpoint), formats=["int8"])
    with pytest.raises(UserError, match="--calibration_images: 0, expected at least 1"):
        trainer.export(module, data(), str(checkpoint), formats=["int8"], calibration_images=0)
