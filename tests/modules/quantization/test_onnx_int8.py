"""int8 files hold the network's own integers on folded scales, and answer as the quantized network does."""

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from modules.quantization.attachment import (
    attach_quantizers,
    input_quantizers,
    quantized_weights,
    set_bits,
    weight_quantizers,
)
from modules.quantization.latency import onnx_runner
from modules.quantization.onnx_int8 import agreement, write_int8_onnx
from modules.quantization.tracing import layer_names


class SmallResidual(nn.Module):
    """Stem, max pooling, one block with a shortcut, and a classifier."""

    def __init__(self, channels=3, classes=10, activation=nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), activation())
        self.pool = nn.MaxPool2d(2)
        self.conv1, self.bn1 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.act = activation()
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.head(self.act(y + self.shortcut(x)).mean((2, 3)))


def lively(network, size=12, channels=3):
    """Norms with factors of both signs and statistics of their own."""
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=generator) + 0.3
            module.weight.data[::3] *= -1
            module.bias.data = torch.randn(module.num_features, generator=generator) / 3
    network.train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(8, channels, size, size, generator=generator))
    return network.eval()


def quantize(network, bits, images, input_bits=8, scheme="affine", names=None):
    """Attach quantizers, and calibrate those of inputs."""
    names = names or layer_names(network)
    attach_quantizers(network, names, input_scheme=scheme, momentum=1.0)
    bits = dict(zip(names, np.resize(bits, len(names)).tolist(), strict=True))
    if input_bits:
        handles = [
            quantizer.register_forward_pre_hook(lambda module, inputs: module.observe(inputs[0]))
            for quantizer in input_quantizers(network).values()
        ]
        with torch.no_grad():
            network(images)
        for handle in handles:
            handle.remove()
    set_bits(network, bits, dict.fromkeys(names, input_bits))
    return network


@pytest.fixture(autouse=True)
def same_networks():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def file_weights(path):
    """Integers and scales of each `name.weight` in an ONNX file, zero point taken off."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for name, integers in tensors.items():
        if name.endswith(".weight_quantized"):
            base = name.removesuffix("_quantized")
            zero_point = tensors[f"{base}_zero_point"].astype(int).reshape(-1, *[1] * (integers.ndim - 1))
            found[base.removesuffix(".weight")] = (integers.astype(int) - zero_point, tensors[f"{base}_scale"])
    return found


@pytest.mark.parametrize(("container", "exact"), [("auto", False), ("auto", True), ("int8", False), ("uint8", True)])
def test_integers_are_the_networks_own_and_scales_are_folded(images, tmp_path, monkeypatch, container, exact):
    flags = {"avx2", "avx_vnni"} if exact else {"avx2"}
    monkeypatch.setattr("modules.quantization.latency._processor_information", lambda: ("a processor", flags))
    network = quantize(lively(SmallResidual()), [8, 2, 5, 3, 7], images)
    own, norms = quantized_weights(network), dict(network.named_modules())
    written = write_int8_onnx(network, images, tmp_path / "int8.onnx", container)
    found = file_weights(written.path)
    assert found.keys() == own.keys()
    pairs = {"stem.0": "stem.1", "conv1": "bn1", "conv2": "bn2", "shortcut.0": "shortcut.1", "head": None}
    for name, weight in own.items():
        factor = torch.ones(len(weight.scale))
        if pairs[name]:
            norm = norms[pairs[name]]
            factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            assert (factor < 0).any()
        signs = factor.sign().to(torch.int16).view(-1, *[1] * (weight.integers.ndim - 1))
        assert np.array_equal(found[name][0], (weight.integers * signs).numpy())
        np.testing.assert_allclose(found[name][1], (weight.scale * factor.abs()).numpy(), rtol=1e-5)
    assert written.changed_weights == {}
    assert written.float_layers == []
    signed = container == "int8" or (container == "auto" and exact)
    expected = set() if signed else {"stem.0"} if container == "auto" else set(own)
    assert {name for name, kind in written.containers.items() if kind == "uint8"} == expected
    operators = {node.op_type for node in onnx.load(written.path).graph.node}
    assert not operators & {"Clip", "BatchNormalization"}
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


@pytest.mark.parametrize(("scheme", "activation"), [("affine", nn.ReLU), ("affine", nn.ReLU6), ("symmetric", nn.ReLU)])
def test_answers_are_those_of_the_quantized_network(images, tmp_path, scheme, activation):
    network = quantize(lively(SmallResidual(activation=activation)), [8, 4, 8, 6, 8], images, scheme=scheme)
    written = write_int8_onnx(network, images, tmp_path / "int8.onnx")
    fresh = torch.randn(200, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network(fresh)
    found = agreement(expected, onnx_runner(written.path)(fresh))
    assert found.top1 >= 0.95  # outputs of a random network lie close together
    assert found.relative_error < 0.02
    assert onnx_runner(written.path)(fresh[:1]).shape == (1, 10)


def test_ranges_of_input_quantizers_are_in_the_file(images, tmp_path):
    network = quantize(lively(SmallResidual()), [6], images)
    input_quantizers(network)["head"].set_bits(4)
    input_quantizers(network)["conv1"].set_range(0.0, 1.7)  # behind the max pooling, beside the shortcut
    input_quantizers(network)["shortcut.0"].set_range(0.0, 1.2)
    graph = onnx.load(write_int8_onnx(network, images, tmp_path / "int8.onnx").path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def grid(layer):
        key = f"{layer}.weight_DequantizeLinear_Output"
        node = next(n for n in graph.node if key in n.input)
        reader = makers[node.input[0]]
        assert reader.op_type == "DequantizeLinear"
        return float(tensors[reader.input[1]]), int(tensors[reader.input[2]])

    scale, zero_point, _ = input_quantizers(network)["stem.0"].grid()
    assert grid("stem.0") == (pytest.approx(float(scale)), int(zero_point))
    assert grid("conv1") == (pytest.approx(1.7 / 255), 0), "of two readers of a tensor, the wider range decides"
    head = input_quantizers(network)["head"]
    assert grid("head")[0] == pytest.approx(float(head.high) / 255, rel=1e-5), "the range of 4 bits in 255 steps"
    sums = [node for node in graph.node if node.op_type == "Add"]
    assert [makers[name].op_type for name in sums[0].input] == ["DequantizeLinear"] * 2


def test_digits_are_recognised_as_before(tmp_path):
    digits = load_digits()
    pictures = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    network = SmallResidual(channels=1)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for step in range(120):
        rows = torch.randint(1297, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(network(pictures[rows]), labels[rows]).backward()
        optimizer.step()
    held_out, truth = pictures[1297:], labels[1297:]
    quantize(network.eval(), [8, 4, 5, 6, 8], pictures[:128])
    with torch.no_grad():
        expected = network(held_out)
    found = onnx_runner(write_int8_onnx(network, pictures[:128], tmp_path / "int8.onnx").path)(held_out)
    assert (expected.argmax(1) == truth).float().mean() > 0.85, "it learned something that could be lost"
    assert agreement(expected, found).top1 >= 0.99


def test_large_products_do_not_saturate(tmp_path):
    """255 * 127 twice is more than 16 bits hold, in which kernels without VNNI add unsigned times signed bytes."""
    layer = nn.Conv2d(64, 8, 1)
    layer.weight.data = torch.full_like(layer.weight, 1.0) * torch.tensor([1.0, -1.0] * 4).view(8, 1, 1, 1)
    network = nn.Sequential(layer)
    images = torch.rand(8, 64, 4, 4) * 0.1 + 0.9
    quantize(network, [8], images)
    with torch.no_grad():
        expected = network(images)
    found = onnx_runner(write_int8_onnx(network, images, tmp_path / "int8.onnx").path)(images)
    assert agreement(expected, found).relative_error < 0.01


def test_layers_without_bits_stay_float(images, tmp_path):
    network = quantize(lively(SmallResidual()), [4], images, names=["conv1", "conv2"])
    set_bits(network, {"conv2": 0}, {"conv2": 0})
    written = write_int8_onnx(network, images, tmp_path / "int8.onnx")
    assert file_weights(written.path).keys() == {"conv1"}
    assert len(written.float_layers) == 4


def test_linear_layers_on_tokens_are_found_where_the_exporter_transposed_them(tmp_path):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.mlp, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.mlp(self.patch(x).flatten(2).transpose(1, 2)).relu().mean(1))

    images = torch.randn(32, 3, 12, 12)
    network = quantize(Tokens().eval(), [8, 5, 6], images)
    written = write_int8_onnx(network, images, tmp_path / "int8.onnx")
    assert written.float_layers == []
    stored = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(written.path).graph.initializer
        if tensor.name.endswith("_quantized") and tuple(tensor.dims) == (8, 8)
    ]
    assert np.array_equal(stored[0].T, quantized_weights(network)["mlp"].integers.numpy())
    with torch.no_grad():
        expected = network(images)
    assert agreement(expected, onnx_runner(written.path)(images)).relative_error < 0.05


def test_channels_too_small_for_their_bias_keep_the_bias_and_are_counted(images, tmp_path):
    network = lively(SmallResidual())
    network.bn1.weight.data[4] = 1e-9
    network.bn1.bias.data[4] = 2.5
    quantize(network, [8], images)
    written = write_int8_onnx(network, images, tmp_path / "int8.onnx")
    assert written.changed_weights.keys() == {"conv1"}
    assert written.changed_weights["conv1"] <= 12 * 9
    with torch.no_grad():
        expected = network(images)
    assert agreement(expected, onnx_runner(written.path)(images)).relative_error < 0.05


def test_what_cannot_be_written_is_said(images, tmp_path):
    network = SmallResidual().eval()
    attach_quantizers(network, ["conv1", "head"], weight_scale="fixed", input_scheme=None)
    with pytest.raises(ValueError, match="no layer has bits; allocate bits first"):
        write_int8_onnx(network, images, tmp_path / "x.onnx")
    set_bits(network, {"conv1": 4, "head": 4})
    quantizer = weight_quantizers(network)["conv1"]
    quantizer.set_scale(torch.full((16,), 0.1), torch.full((16,), 3.0), signed=False)
    with pytest.raises(ValueError, match=r"1 layers are quantized asymmetrically \(conv1\), and a zero point"):
        write_int8_onnx(network, images, tmp_path / "x.onnx")
    quantizer.set_scale(torch.full((16,), 1e-3), signed=False)
    with pytest.raises(ValueError, match=r"weights of 1 layers are unsigned \(conv1\)"):
        write_int8_onnx(network, images, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="container: 'int4' is unknown; expected auto, int8, uint8"):
        write_int8_onnx(network, images, tmp_path / "x.onnx", "int4")
    assert not list(tmp_path.iterdir())


def test_folding_that_changes_the_outputs_is_noticed(tmp_path):
    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return (self.bn(y) + y).mean((2, 3))

    images = torch.randn(16, 3, 8, 8)
    network = quantize(lively(TwoReaders(), 8), [8], images)
    with pytest.raises(ValueError, match="folding the BatchNorms changes the outputs by"):
        write_int8_onnx(network, images, tmp_path / "x.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [torchvision.models.resnet18, torchvision.models.mobilenet_v2, lambda: timm.create_model("tf_efficientnet_lite0")],
    ids=["resnet18", "mobilenet_v2", "tf_efficientnet_lite0"],
)
def test_published_networks(build, tmp_path):
    network = lively(build(), 64)
    images = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        unquantized = network(images)
    quantize(network, [8, 4, 6], images)
    written = write_int8_onnx(network, images, tmp_path / "int8.onnx")
    assert written.float_layers == []
    own = quantized_weights(network)
    assert sum(written.changed_weights.values()) == 0
    found = file_weights(written.path)
    assert found.keys() == own.keys()
    assert all(np.array_equal(np.abs(found[name][0]), own[name].integers.abs().numpy()) for name in own)
    with torch.no_grad():
        expected = network(images)
    found = agreement(expected, onnx_runner(written.path)(images)).relative_error
    assert found < 0.7 * agreement(unquantized, expected).relative_error, "untrained depth makes much of any rounding"
