import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from modules.quantization.activation_streams import Streams, float_weights, split_network
from modules.quantization.attachment import attach_quantizers, set_bits, weight_quantizers
from modules.quantization.reconstruction import ReconstructionSettings, batch_indices, reconstruct
from modules.quantization.scale_search import search_channel_grid
from modules.quantization.tracing import trace_network
from tests.distributed import run_ranks
from tests.modules.quantization.small_networks import images, make

QUICK = ReconstructionSettings(steps=100, batch_size=16, learning_rate=3e-2, regulariser=1e-3)


def run(network, bits=3, settings=QUICK, pictures=None, **options):
    pictures = images(64) if pictures is None else pictures
    trace = trace_network(network, pictures[:2])
    weight_bits = bits if isinstance(bits, dict) else dict.fromkeys(trace.names, bits)
    return trace, reconstruct(network, trace, pictures, weight_bits, settings, **options)


def rounded_to_nearest(network, trace, bits):
    network = copy.deepcopy(network)
    for name in trace.names:
        weight = network.get_submodule(name).weight.data
        grid = search_channel_grid(weight, bits)
        scale, zero = (values.view(-1, *[1] * (weight.ndim - 1)) for values in (grid.scale, grid.zero_point))
        weight.copy_((((weight / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale)
    return network


@torch.no_grad()
def output_error(network, reference, pictures):
    return functional.mse_loss(network(pictures), reference(pictures)).item()


def same(left, right):
    assert left.keys() == right.keys()
    for name, weight in left.items():
        for one, other in zip(weight, right[name], strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), name


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", ["residual", "depthwise", "vit"])
def test_outputs_are_closer_than_with_nearest_rounding_also_on_other_images(name, bits):
    network = make(name)
    reference = copy.deepcopy(network)
    results = []
    trace, found = run(network, bits, on_unit=results.append)
    nearest = rounded_to_nearest(reference, trace, bits)
    assert list(found) == trace.names
    for pictures in (images(64), images(64, seed=5)):
        assert output_error(network, reference, pictures) < 0.7 * output_error(nearest, reference, pictures)
    assert [result.name for result in results] == [unit.name for unit in trace.units]
    assert all(result.steps == QUICK.steps for result in results)
    # the first and smallest layer has little to choose
    assert all(result.error < result.nearest_error for result in results[1:])
    assert results[-1].error == pytest.approx(output_error(network, reference, images(64)), rel=1e-4)


def test_the_loss_falls():
    network = make("residual")
    seen = []
    settings = ReconstructionSettings(steps=200, batch_size=64, learning_rate=3e-3, regulariser=1e-3, warm_up=0.5)
    run(network, {"conv": 2, "blocks.1.conv2": 2}, settings, progress=seen.append)
    for unit, index in (("conv", 0), ("blocks.1", 2)):
        own = [now for now in seen if now.unit == unit]
        assert [(now.index, now.units, now.step, now.steps) for now in own] == [
            (index, 5, step, 200) for step in (50, 100, 150, 200)
        ]
        # without the push towards integers the error falls; with it, weights come closer to them
        assert own[1].error <= own[0].error
        assert own[0].penalty == 0
        assert own[3].penalty < own[1].penalty
    assert seen[5].error < 0.9 * seen[4].error


def test_a_quantizer_that_rounds_to_nearest_leaves_the_weights_as_they_are():
    for symmetric in (False, True):
        network = make("depthwise")
        trace, found = run(network, 4, ReconstructionSettings(steps=20, batch_size=8, symmetric=symmetric))
        before = {name: network.get_submodule(name).weight.clone() for name in trace.names}
        attach_quantizers(network, trace.names, weight_scale="fixed", input_scheme=None)
        for name, quantizer in weight_quantizers(network).items():
            quantizer.set_scale(found[name].scale, found[name].zero_point, signed=symmetric)
        set_bits(network, dict.fromkeys(trace.names, 4))
        for name, weight in before.items():
            assert torch.equal(network.get_submodule(name).weight, weight)
            assert torch.equal(found[name].dequantized(), weight)
            original = network.get_submodule(name).parametrizations.weight.original
            assert torch.equal(weight_quantizers(network)[name].quantized(original).integers, found[name].integers)


@pytest.mark.parametrize(("finished", "cache"), [(1, "float32"), (3, "float16")])
def test_a_run_that_goes_on_equals_one_without_a_break(finished, cache):
    reference = make("residual")
    stored = {}

    class BreakError(Exception):
        pass

    def store(result):
        if len(stored) == finished:
            raise BreakError
        stored[result.name] = result.weights

    settings = ReconstructionSettings(steps=25, batch_size=16, learning_rate=1e-2, cache=cache)
    whole, resumed = copy.deepcopy(reference), copy.deepcopy(reference)
    _, expected = run(whole, 3, settings)
    stored.clear()
    with pytest.raises(BreakError):
        run(copy.deepcopy(reference), 3, settings, on_unit=store)
    later = []
    _, found = run(resumed, 3, settings, done=stored, on_unit=lambda result: later.append(result.name))
    assert len(later) == 5 - finished
    same(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", ["residual", "depthwise", "vit"])
def test_carried_activations_are_those_of_runs_from_the_images(name):
    reference = make(name)
    pictures = images(20)
    trace = trace_network(reference, pictures[:2])
    segments = split_network(reference, trace, pictures[:2])
    assert sum(segment.follows for segment in segments) >= 1
    network = copy.deepcopy(reference)
    streams = [Streams(network, float_weights(network, trace), pictures, 8, carry=carry) for carry in (True, False)]
    with torch.no_grad():
        for segment in split_network(network, trace, pictures[:2]):
            for stream in streams:
                stream.enter(segment)
            for kind in ("inputs", "targets"):
                torch.testing.assert_close(*(getattr(one, kind) for one in streams), rtol=1e-5, atol=1e-5)
            for layer in segment.layers:
                network.get_submodule(layer).weight.mul_(0.9)
            for stream in streams:
                stream.leave(segment, True)
    # the last targets are what the float network gives
    torch.testing.assert_close(streams[0].targets, reference(pictures), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(streams[0].outputs, network(pictures), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_the_route_of_activations_does_not_change_the_result(name):
    reference, networks = make(name), []
    for carry in (True, False):
        networks.append(copy.deepcopy(reference))
        run(networks[-1], 3, ReconstructionSettings(steps=25, batch_size=16, learning_rate=1e-2, carry=carry))
    left, right = (network(images(8)) for network in networks)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(left, reference(images(8)), atol=1e-3)


def test_half_precision_in_the_cache_changes_little_and_halves_its_memory():
    reference, errors, sizes = make("residual"), {}, {}
    for cache in ("float32", "float16", "bfloat16"):
        network = copy.deepcopy(reference)
        settings = dataclasses.replace(QUICK, steps=50, cache=cache)
        bits = {"conv": 3, "blocks.0.conv1": 3, "blocks.1.conv1": 3}
        run(network, bits, settings, progress=lambda now, cache=cache: sizes.setdefault(cache, now.cache_bytes))
        errors[cache] = output_error(network, reference, images(64))
    assert sizes["float32"] == 2 * sizes["float16"] == 2 * sizes["bfloat16"]
    # 64 images with 3 channels and their targets with 8, 16 x 16 pixels
    assert sizes["float32"] == 64 * (3 + 8) * 16 * 16 * 4
    assert max(errors.values()) < 1.5 * min(errors.values())


def test_a_block_with_two_inputs_falls_back_to_its_layers():
    network = make("gated")
    reference = copy.deepcopy(network)
    names = []
    with pytest.warns(UserWarning, match="gated does not map one tensor to one tensor .* its 2 layers"):
        trace, found = run(network, 3, on_unit=lambda result: names.append(result.name))
    assert names == ["conv", "blocks.0", "gated.first", "gated.second", "head"]
    assert list(found) == trace.names
    nearest = rounded_to_nearest(reference, trace, 3)
    assert output_error(network, reference, images(64)) < output_error(nearest, reference, images(64))


class KeywordLinear(nn.Linear):
    """Cannot be run with its input alone."""

    def forward(self, x, *, gain):
        return super().forward(x * gain)


def test_a_layer_that_cannot_be_run_alone_is_rounded_to_nearest():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.head = KeywordLinear(768, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.odd(x.flatten(1), gain=2.0).relu())

    network = Network().eval()
    reference = copy.deepcopy(network)
    with pytest.warns(UserWarning, match="odd cannot be run alone, so its weight is rounded to nearest"):
        trace, _ = run(network, 3, ReconstructionSettings(steps=20, batch_size=8))
    nearest = rounded_to_nearest(reference, trace, 3)
    torch.testing.assert_close(network.odd.weight, nearest.odd.weight)


def test_layers_without_bits_stay_and_nearest_ones_are_not_learned():
    network = make("residual")
    reference = copy.deepcopy(network)
    settings = ReconstructionSettings(steps=60, batch_size=16, learning_rate=1e-2, nearest=("conv", "blocks.0.conv1"))
    results = {}
    bits = {"conv": 3, "blocks.0.conv1": 3, "blocks.0.conv2": 4, "blocks.2.conv1": 2}
    trace, found = run(network, bits, settings, on_unit=lambda result: results.setdefault(result.name, result.steps))
    assert results == {"conv": 0, "blocks.0": 60, "blocks.2": 60}
    assert {name: weight.bits for name, weight in found.items()} == bits
    nearest = rounded_to_nearest(reference, trace, 3)
    for name in trace.names:
        weight, original = network.get_submodule(name).weight, reference.get_submodule(name).weight
        assert torch.equal(weight, original) == (name not in bits)
        assert torch.allclose(weight, nearest.get_submodule(name).weight) == (name in settings.nearest), name
    for module in network.modules():
        assert not module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_statistics_stay_and_modes_come_back():
    network = make("residual").train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    run(network, 4, ReconstructionSettings(steps=3, batch_size=8))
    assert network.blocks[0].bn1.training
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


def test_a_settled_unit_ends_early():
    network = make("residual")
    steps = []
    settings = ReconstructionSettings(
        steps=1000, batch_size=16, learning_rate=3e-2, regulariser=1.0, stop_undecided=0.01
    )
    run(network, {"conv": 3}, settings, on_unit=lambda result: steps.append(result.steps))
    assert 200 <= steps[0] < 1000
    assert steps[0] % 50 == 0


def test_quantizers_that_are_attached_but_off_change_nothing():
    reference = make("residual")
    plain, attached = copy.deepcopy(reference), copy.deepcopy(reference)
    settings = ReconstructionSettings(steps=20, batch_size=16)
    _, expected = run(plain, 3, settings)
    attach_quantizers(attached, expected, weight_scale="fixed")
    trace, found = run(attached, 3, settings)
    same(found, expected)
    assert torch.equal(attached(images(4)), plain(images(4)))
    set_bits(attached, {"conv": 2, "head": 2}, {"head": 8})
    with pytest.raises(ValueError, match=r"2 layers are quantized already \(conv, head\)"):
        reconstruct(attached, trace, images(16), {"conv": 3}, settings)


def test_batches_are_a_function_of_seed_unit_and_step():
    first = batch_indices(100, 32, 0, "a", 1)
    assert len(first.unique()) == 32
    assert torch.equal(first, batch_indices(100, 32, 0, "a", 1))
    for other in ((1, "a", 1), (0, "b", 1), (0, "a", 2)):
        assert not torch.equal(first, batch_indices(100, 32, *other))


def on_a_rank(rank, count):
    network = make("residual")
    settings = ReconstructionSettings(steps=20, batch_size=count, learning_rate=1e-2)
    pictures = images(64)[rank * count : (rank + 1) * count]
    found = run(network, 3, settings, pictures)[1]
    return {name: weight.integers for name, weight in found.items()}


def test_two_processes_with_half_of_the_images_each_equal_one_with_all():
    left, right = run_ranks(on_a_rank, 2, 32)
    alone = on_a_rank(0, 64)
    for name, integers in alone.items():
        assert torch.equal(left[name], right[name])
        assert (left[name] != integers).float().mean() < 0.005, name


def test_bad_input_is_named():
    network = make("residual")
    with pytest.raises(ValueError, match="weight_bits: no layers of this network: nothing"):
        run(network, {"nothing": 4})
    with pytest.raises(ValueError, match=r"weight_bits: conv: 9 is outside 2\.\.8"):
        run(network, {"conv": 9})
    with pytest.raises(ValueError, match="nearest: no layers"):
        run(network, 4, ReconstructionSettings(nearest=("stem",), batch_size=8))
    with pytest.raises(ValueError, match="64 calibration images are fewer than batch_size: 128"):
        run(network, 4, ReconstructionSettings(batch_size=128))
    stored = {}
    settings = ReconstructionSettings(steps=2, batch_size=8)
    run(copy.deepcopy(network), 4, settings, on_unit=lambda result: stored.setdefault(result.name, result.weights))
    with pytest.raises(ValueError, match=r"finished layer conv: .* in 4 bits, expected .* in 3"):
        run(network, 3, settings, done=stored)
    with pytest.raises(ValueError, match="finished unit elsewhere"):
        run(network, 4, settings, done={"elsewhere": {}})
    loud = images(16) * 1e6
    with pytest.raises(ValueError, match=r"activations are not finite in torch\.float16; use bfloat16 or float32"):
        run(network, 4, ReconstructionSettings(steps=2, batch_size=8, cache="float16"), loud)
