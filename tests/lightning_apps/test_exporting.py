"""What `export` writes computes what torch computes, and says so when it does not."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_apps import exporting
from lightning_apps.errors import UserError
from lightning_apps.exporting import export_network

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


def test_a_difference_is_an_error_and_leaves_no_file(network, tmp_path):
    with pytest.raises(UserError, match=r"model.onnx and torch differ by .* at batch 1 \(tolerance -1e\+00\)"):
        export_network(network, FACTS, tmp_path, formats=["onnx"], tolerance=-1.0)
    assert not list(tmp_path.glob("*.onnx*"))


def test_without_the_extra_its_name_is_said(network, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime: pip install 'lightning-apps\[export\]'"):
        export_network(network, FACTS, tmp_path)
    assert (tmp_path / "model.safetensors").is_file(), "safetensors needs nothing more"
