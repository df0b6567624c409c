import math

import pytest
import torch

from modules.quantization.rounding import LearnedRounding, temperature
from modules.quantization.scale_search import UniformGrid, quantize, search_channel_grid


def example(bits=4, symmetric=False, shape=(6, 4, 3, 3), dtype=torch.float32):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).to(dtype) * 0.1
    grid = search_channel_grid(weight, bits, symmetric)
    return weight, grid, LearnedRounding(weight, grid)


def numbers(weight, grid):
    """(weight, scale, zero point) for each weight, as Python numbers."""
    for channel, (scale, zero) in enumerate(zip(grid.scale.tolist(), grid.zero_point.tolist(), strict=True)):
        for value in weight[channel].flatten().tolist():
            yield value, scale, zero


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, False), (4, True), (8, True)])
def test_alpha_soft_and_hard_weights_are_those_of_the_formulas(bits, symmetric):
    # in double precision: in single, a weight on an integer may count as just below it
    weight, grid, rounding = example(bits, symmetric, dtype=torch.float64)
    shift = 0.8 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    alphas, softs, hards, penalty = [], [], [], 0.0
    exponent = 3.7
    for (value, scale, zero), moved in zip(numbers(weight, grid), shift.flatten().tolist(), strict=True):
        rest = value / scale - math.floor(value / scale)
        alpha = -math.log(1.2 / (rest + 0.1) - 1)
        alphas.append(alpha)
        h = min(max(1.2 / (1 + math.exp(-alpha - moved)) - 0.1, 0), 1)
        softs.append(scale * (min(max(math.floor(value / scale) + h + zero, grid.low), grid.high) - zero))
        up = alpha + moved >= 0
        hards.append(scale * (min(max(math.floor(value / scale) + up + zero, grid.low), grid.high) - zero))
        penalty += 1 - abs(2 * h - 1) ** exponent
    expected = [torch.tensor(values).reshape(weight.shape).double() for values in (alphas, softs, hards)]
    torch.testing.assert_close(rounding.alpha.detach(), expected[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        rounding.alpha.copy_(expected[0] + shift)
    torch.testing.assert_close(rounding.soft(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rounding.hard(), expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rounding.regulariser(exponent).item(), penalty, rtol=1e-5, atol=1e-5)


def test_it_starts_at_the_float_weight_where_that_is_in_range():
    weight, grid, rounding = example()
    inside = (weight / grid.scale.view(-1, 1, 1, 1) + grid.zero_point.view(-1, 1, 1, 1)).sub(7.5).abs() <= 7.5
    assert 0.9 < inside.float().mean() < 1
    torch.testing.assert_close(rounding.soft()[inside], weight[inside], rtol=0, atol=1e-6)
    nearest = (quantize(weight, grid) - grid.zero_point.view(-1, 1, 1, 1)) * grid.scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(rounding.hard(), nearest, rtol=0, atol=1e-6)


def test_alpha_of_zero_rounds_up():
    rounding = LearnedRounding(torch.tensor([[0.5, -0.5, 1.5]]), UniformGrid(torch.ones(1), torch.zeros(1), -8, 7))
    torch.testing.assert_close(rounding.alpha.detach(), torch.zeros(1, 3), rtol=0, atol=1e-6)
    with torch.no_grad():
        rounding.alpha.copy_(torch.tensor([[0.0, -1e-6, 1e-6]]))
    assert rounding.integers().tolist() == [[1, -1, 2]]


def test_gradients_of_alpha():
    _, _, double = example(shape=(2, 5), dtype=torch.float64)

    def loss(alpha):
        with torch.no_grad():
            double.alpha.copy_(alpha)
        weights = torch.arange(10.0, dtype=torch.float64).reshape(2, 5).cos()
        return (double.soft() * weights).sum() + 0.3 * double.regulariser(4.0)

    alpha = double.alpha.detach().clone()
    loss(alpha).backward()
    gradient = double.alpha.grad.clone()
    for index in range(10):
        step = torch.zeros(10, dtype=torch.float64)
        step[index] = 1e-6
        step = step.reshape(2, 5)
        numeric = (loss(alpha + step) - loss(alpha - step)).item() / 2e-6
        assert gradient.flatten()[index].item() == pytest.approx(numeric, abs=1e-6)


def test_what_is_stored_stands_for_the_hard_weight():
    _, _, rounding = example(3)
    stored = rounding.quantized(3)
    assert torch.equal(stored.dequantized(), rounding.hard())
    assert stored.bits == 3
    assert stored.integers.min() >= 0
    assert stored.integers.max() == 7


def test_undecided_weights_are_counted():
    rounding = LearnedRounding(torch.zeros(1, 4), UniformGrid(torch.ones(1), torch.zeros(1), -8, 7))
    with torch.no_grad():
        rounding.alpha.copy_(torch.tensor([[-5.0, 5.0, 0.0, 1.0]]))
    assert rounding.undecided() == 2


def test_temperature_schedule():
    steps = [temperature(step, 1000) for step in range(1, 1001)]
    assert steps[:199] == [None] * 199
    assert steps[199] == 20
    for step in range(200, 1001):
        assert steps[step - 1] == pytest.approx(20 - 18 * (step - 200) / 800)
    assert steps[-1] == 2
    assert temperature(1, 10, warm_up=0, first=8, last=4) == pytest.approx(7.6)
