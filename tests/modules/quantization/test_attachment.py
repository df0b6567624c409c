"""Quantizers on whole networks: attached, loaded, copied, taken off."""

import copy

import pytest
import timm
import torch
from torch import nn

from modules.quantization.attachment import (
    attach_quantizers,
    bake,
    float_names,
    input_quantizers,
    quantized_weights,
    set_bits,
    weight_quantizers,
)
from modules.quantization.tracing import layer_names, trace_network


def images(seed=0):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def plain_network():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).eval()


@pytest.fixture
def network():
    network = plain_network()
    attach_quantizers(network, layer_names(network))
    return network


@pytest.fixture
def quantized(network):
    names = layer_names(network)
    set_bits(network, dict.fromkeys(names, 4), dict.fromkeys(names, 8))
    network.train()(images())
    return network.eval()


def test_attached_quantizers_change_nothing_until_they_have_bits(network):
    assert torch.equal(network(images()), plain_network()(images()))
    assert len(weight_quantizers(network)) == len(input_quantizers(network)) == len(layer_names(network))


def test_weights_without_quantizers_are_loaded_strictly(quantized):
    state = plain_network().state_dict()
    ranges = {name: quantizer.high.item() for name, quantizer in input_quantizers(quantized).items()}
    quantized.load_state_dict({name: value + 1 for name, value in state.items()})
    assert float_names(quantized.state_dict()).keys() == state.keys()
    for name, value in float_names(quantized.state_dict()).items():
        assert torch.equal(value, state[name] + 1)
    assert {name: quantizer.high.item() for name, quantizer in input_quantizers(quantized).items()} == ranges
    with pytest.raises(RuntimeError, match="Missing key"):
        quantized.load_state_dict({name: value for name, value in state.items() if name != "conv1.0.weight"})


def test_quantized_layers_compute_with_quantized_weights_and_inputs(quantized):
    layer = quantized.get_submodule("layer1.0.conv1")
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    quantized(images())
    inputs, output = seen[0]
    levels = torch.unique(inputs)
    assert len(levels) <= 256
    weight = quantized_weights(quantized)["layer1.0.conv1"].dequantized()
    assert all(len(torch.unique(channel)) <= 15 for channel in weight)
    expected = nn.functional.conv2d(inputs, weight, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(output, expected)


def test_a_fresh_network_takes_the_state_of_a_quantized_one(quantized):
    fresh = timm.create_model("test_resnet", num_classes=5).eval()
    attach_quantizers(fresh, layer_names(fresh))
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh(images()), quantized(images()))


def test_a_copy_has_quantizers_of_its_own(quantized):
    other = copy.deepcopy(quantized)
    before = quantized(images())
    assert torch.equal(other(images()), before)
    set_bits(other, {"conv1.0": 2})
    assert not torch.equal(other(images()), before)
    assert torch.equal(quantized(images()), before)


def test_baked_networks_are_plain_ones_that_compute_the_same(quantized):
    kept = bake(copy.deepcopy(quantized), inputs=True)
    assert torch.equal(kept(images()), quantized(images()))
    baked = bake(copy.deepcopy(quantized))
    assert baked.state_dict().keys() == plain_network().state_dict().keys()
    for quantizer in input_quantizers(quantized).values():
        quantizer.set_bits(0)
    assert torch.equal(baked(images()), quantized(images()))


def test_a_traced_network_with_quantizers_has_the_layers_of_one_without(quantized):
    assert trace_network(quantized, images()) == trace_network(plain_network(), images())


def test_attaching_twice_changes_nothing(quantized):
    before = quantized(images())
    attach_quantizers(quantized, layer_names(quantized))
    assert torch.equal(quantized(images()), before)


def test_bits_for_a_layer_without_quantizer_are_refused(network):
    with pytest.raises(ValueError, match=r"1 layers have no quantizer \(layer9\); those with one: conv1\.0, "):
        set_bits(network, {"layer9": 4})


def test_layers_with_another_parametrization_are_refused():
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    assert weight_quantizers(network) == {}
    with pytest.raises(ValueError, match="0 has a parametrization of its own"):
        attach_quantizers(network, ["0"])
