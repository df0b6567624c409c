import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from modules.norm_folding import fold_after
from modules.quantization.attachment import attach_quantizers
from modules.quantization.folding import fold_norms
from modules.quantization.quantizers import WeightQuantizer
from modules.quantization.tracing import trace_network


def shake_norms(network, seed=0):
    """Give every BatchNorm statistics and scales that matter, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, -0.3, 1.3),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network.eval()


def pictures(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "efficientnet-lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_folded_network_computes_the_same(name):
    torch.manual_seed(0)
    network = shake_norms(NETWORKS[name]())
    norms = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    trace = trace_network(network, pictures())
    before = network(pictures())
    assert before.std() > 1e-3
    folding = fold_norms(network, trace, strict=True)
    assert sorted(folding.folded) == sorted(norms)
    assert not any(isinstance(module, _BatchNorm) for module in network.modules())
    torch.testing.assert_close(network(pictures()), before, rtol=1e-5, atol=1e-5)
    again = trace_network(network, pictures())
    assert again.names == trace.names
    assert all(layer.norm is None and layer.has_bias for layer in again.layers)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(5, 7), nn.BatchNorm1d(7), (4, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv3d(2, 4, 3, bias=False), nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
        (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), (2, 2, 5, 5)),
    ],
)
def test_other_layers_and_norms(layer, norm, shape):
    network = nn.Sequential(layer, norm).eval()
    norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    before = network(images)
    assert fold_norms(network, trace_network(network, images)).folded == {"1": "0"}
    torch.testing.assert_close(network(images), before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizing_before_folding_equals_quantizing_after(bits):
    generator = torch.Generator().manual_seed(bits)
    conv, norm = nn.Conv2d(4, 16, 3, bias=False).double(), nn.BatchNorm2d(16).double().eval()
    conv.weight.normal_(generator=generator)
    norm.weight.copy_(torch.linspace(-2, 2, 16))
    norm.running_var.uniform_(0.1, 4, generator=generator)
    folded = copy.deepcopy(conv)
    fold_after(folded, norm)
    quantized = []
    for layer in (conv, folded):
        quantizer = WeightQuantizer(layer.weight, "max")
        quantizer.set_bits(bits)
        quantized.append((quantizer(layer.weight), quantizer.quantized(layer.weight)))
    (before, integers), (after, integers_after) = quantized
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert (scale < 0).sum() == 8
    torch.testing.assert_close(before * scale.view(-1, 1, 1, 1), after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(integers.scale * scale.abs(), integers_after.scale, rtol=1e-12, atol=1e-12)
    assert torch.equal(integers.integers * scale.sign().view(-1, 1, 1, 1), integers_after.integers.double())


class Odd(nn.Module):
    """Two convolutions share a norm; another norm comes first; a third has no statistics."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.shared = nn.BatchNorm2d(3)
        self.free = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        x = self.shared(self.one(self.first(x)))
        x = self.shared(self.two(x))
        return self.free(self.three(x)).mean((2, 3))


def test_norms_that_cannot_be_folded_are_named_and_kept():
    network = Odd().eval()
    trace = trace_network(network, pictures(8))
    before = network(pictures(8))
    with pytest.raises(ValueError, match="3 BatchNorms are not folded"):
        fold_norms(network, trace, strict=True)
    with pytest.warns(UserWarning, match="3 BatchNorms are not folded"):
        folding = fold_norms(network, trace)
    assert folding.folded == {}
    assert folding.kept == {
        "first": "no layer of the trace stands right before it",
        "shared": "2 layers share it",
        "free": "it has no running statistics",
    }
    assert torch.equal(network(pictures(8)), before)


def test_layers_with_quantizers_and_old_traces_are_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    trace = trace_network(network, pictures(8))
    quantized = copy.deepcopy(network)
    attach_quantizers(quantized, trace.names)
    with pytest.raises(ValueError, match="its layer has quantizers"):
        fold_norms(quantized, trace, strict=True)
    fold_norms(network, trace)
    with pytest.raises(ValueError, match="trace the network again"):
        fold_norms(network, trace, strict=True)
    with pytest.raises(ValueError, match="another network"):
        fold_norms(nn.Sequential(nn.Conv2d(3, 4, 3)), trace)
