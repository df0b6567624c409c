import copy

import pytest
import torch

from modules.quantization.activation_streams import float_weights
from modules.quantization.attachment import attach_quantizers, set_bits
from modules.quantization.quantizers import InputQuantizer
from modules.quantization.reconstruction import ReconstructionSettings, reconstruct
from modules.quantization.scale_search import UniformGrid, search_tensor_grid
from modules.quantization.step_sizes import LearnedStep, StepSettings, initial_steps, learn_steps
from modules.quantization.tracing import trace_network
from tests.modules.quantization.small_networks import images, make

QUICK = StepSettings(steps=60, batch_size=16, learning_rate=4e-3)


def prepared(name, bits=4):
    """A network with quantized weights, and what it was."""
    network = make(name)
    reference = copy.deepcopy(network)
    trace = trace_network(network, images(2))
    settings = ReconstructionSettings(steps=5, batch_size=8)
    reconstruct(network, trace, images(16), dict.fromkeys(trace.names, 8), settings)
    return network, reference, trace, dict.fromkeys(trace.names, bits)


def test_values_and_gradients_of_a_step_are_those_of_lsq():
    step = LearnedStep(UniformGrid(torch.tensor([0.3]), torch.tensor([2.0]), 0, 7)).double()
    values = torch.linspace(-2, 3, 41, dtype=torch.float64)[1:]
    weights = torch.arange(40.0, dtype=torch.float64).sin()
    out = step(values)
    (out * weights).sum().backward()
    scale, expected, gradient = step.scale.item(), [], 0.0
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        ratio = value / scale
        if ratio <= -2:
            expected.append(-2 * scale)
            gradient += -2 * weight
        elif ratio >= 5:
            expected.append(5 * scale)
            gradient += 5 * weight
        else:
            expected.append(round(ratio) * scale)
            gradient += (round(ratio) - ratio) * weight
    torch.testing.assert_close(out.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert step.scale.grad.item() == pytest.approx(gradient, rel=1e-9)


def test_initial_scales_are_those_of_each_layers_input():
    network, _, trace, bits = prepared("residual")
    steps = initial_steps(network, trace, images(16), bits)
    assert list(steps) == trace.names
    grid = search_tensor_grid(images(16), 4)
    assert torch.equal(steps["conv"].scale.detach(), grid.scale)
    assert torch.equal(steps["conv"].zero_point, grid.zero_point)
    with torch.no_grad():
        hidden = network.act(network.norm(network.conv(images(16))))
    assert torch.equal(steps["blocks.0.conv1"].scale.detach(), search_tensor_grid(hidden, 4).scale)


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_outputs_of_units_come_closer(name):
    network, reference, trace, bits = prepared(name)
    before = copy.deepcopy(network.state_dict())
    steps = initial_steps(network, trace, images(16), bits)
    results, seen = [], []
    learn_steps(
        network,
        trace,
        images(32),
        steps,
        float_weights(reference, trace),
        QUICK,
        progress=seen.append,
        on_unit=results.append,
    )
    assert [result.name for result in results] == [unit.name for unit in trace.units]
    assert {now.unit for now in seen} == {unit.name for unit in trace.units}
    assert sum(result.error < result.first_error for result in results) >= len(results) - 1
    assert sum(result.error for result in results) < 0.98 * sum(result.first_error for result in results)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(results[0].scales[trace.names[0]], steps[trace.names[0]].scale)


def test_a_run_that_goes_on_equals_one_without_a_break():
    network, reference, trace, bits = prepared("residual")
    originals, settings = float_weights(reference, trace), StepSettings(steps=10, batch_size=8, learning_rate=4e-3)
    whole = initial_steps(network, trace, images(16), bits)
    resumed = copy.deepcopy(whole)
    results = {}
    learn_steps(
        network,
        trace,
        images(16),
        whole,
        originals,
        settings,
        on_unit=lambda result: results.setdefault(result.name, result.scales),
    )
    done = {name: results[name] for name in ("conv", "blocks.0")}
    later = []
    learn_steps(network, trace, images(16), resumed, originals, settings, done=done, on_unit=later.append)
    assert [result.name for result in later] == ["blocks.1", "blocks.2", "head"]
    for name, step in whole.items():
        assert torch.equal(step.scale, resumed[name].scale)


@torch.no_grad()
def test_an_input_quantizer_takes_the_range():
    for values in (images(8), images(8).relu()):
        step = LearnedStep(search_tensor_grid(values, 4))
        quantizer = InputQuantizer("affine").eval()
        quantizer.set_bits(4)
        quantizer.set_range(*step.range())
        torch.testing.assert_close(quantizer(values), step(values), rtol=1e-5, atol=1e-5)


def test_bad_input_is_named():
    network, reference, trace, _ = prepared("residual")
    originals = float_weights(reference, trace)
    with pytest.raises(ValueError, match="bits: no layers of this network: stem"):
        initial_steps(network, trace, images(4), {"stem": 8})
    with pytest.raises(ValueError, match="quantizers: no layers of this network: stem"):
        learn_steps(network, trace, images(4), {"stem": None}, originals)
    with pytest.raises(ValueError, match="4 calibration images are fewer than batch_size: 32"):
        learn_steps(network, trace, images(4), {}, originals)
    attach_quantizers(network, trace.names, weight_scale="max")
    set_bits(network, {"conv": 8})
    with pytest.raises(ValueError, match=r"1 layers are quantized already \(conv\)"):
        learn_steps(network, trace, images(32), {}, originals)
