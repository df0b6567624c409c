import pytest
import torch

from modules.quantization import scale_search
from modules.quantization.scale_search import quantize, search_channel_grid, search_tensor_grid


def plain_loop(weight, bits, symmetric, exponent=2.4):
    """Channel after channel, range after range."""
    scales, zero_points = [], []
    for channel in weight:
        least, largest = channel.min(), channel.max()
        if symmetric:
            largest = torch.maximum(largest.abs(), least.abs())
        best = float("inf")
        for step in range(80):
            low, high = least * (1.0 - step * 0.01), largest * (1.0 - step * 0.01)
            if symmetric:
                top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
                delta, zero = high / top, torch.zeros(())
            else:
                top, bottom = 2**bits - 1, 0
                delta = (high - low) / top
                zero = (-low / delta).round()
            integers = ((channel / delta).round() + zero).clamp(bottom, top)
            error = (channel - (integers - zero) * delta).abs().pow(exponent).mean()
            if error < best:
                best, scale, zero_point = error, delta, zero
        scales.append(scale)
        zero_points.append(zero_point)
    return torch.stack(scales), torch.stack(zero_points)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("shape", "bits"), [((16, 8, 3, 3), 4), ((24, 1, 3, 3), 3), ((6, 70), 2), ((5, 4, 3), 8), ((4, 3, 2, 2, 2), 5)]
)
def test_scales_and_zero_points_are_those_of_a_plain_loop(shape, bits, symmetric):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) ** 3 * 0.02
    grid = search_channel_grid(weight, bits, symmetric)
    scale, zero_point = plain_loop(weight, bits, symmetric)
    assert torch.equal(grid.scale, scale)
    assert torch.equal(grid.zero_point, zero_point)


def test_chunks_of_channels_and_steps_change_nothing(monkeypatch):
    weight = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    whole = search_channel_grid(weight, 4)
    for chunk in (1, 45, 130, 45 * 12 * 7):
        monkeypatch.setattr(scale_search, "CHUNK", chunk)
        parts = search_channel_grid(weight, 4)
        assert torch.equal(parts.scale, whole.scale)
        assert torch.equal(parts.zero_point, whole.zero_point)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_other_exponents(exponent):
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    assert torch.equal(
        search_channel_grid(weight, 3, exponent=exponent).scale, plain_loop(weight, 3, False, exponent)[0]
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_dead_and_constant_channels_have_a_usable_grid(symmetric):
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(3))
    weight[1] = 0
    weight[2] = 0.5
    weight[3] = -0.25
    weight[4] = 1 + 1e-7 * torch.arange(9)
    grid = search_channel_grid(weight, 4, symmetric)
    assert (grid.scale > 0).all()
    assert (grid.zero_point.abs() <= 2**14).all()
    back = (quantize(weight, grid) - grid.zero_point[:, None]) * grid.scale[:, None]
    torch.testing.assert_close(back[1:], weight[1:], rtol=1e-5, atol=0.2)
    assert not back[1].any()
    torch.testing.assert_close(back[2:4], weight[2:4], rtol=1e-6, atol=0)
    assert (search_channel_grid(torch.zeros(3, 4), 4, symmetric).scale > 0).all()


def test_zero_points_are_integers_of_the_grid_where_zero_is_included():
    weight = torch.rand(20, 9, generator=torch.Generator().manual_seed(4)) + torch.linspace(-2, 1, 20)[:, None]
    grid = search_channel_grid(weight, 4, include_zero=True)
    assert ((grid.zero_point >= 0) & (grid.zero_point <= 15)).all()
    free = search_channel_grid(weight, 4).zero_point
    assert (free < 0).any()
    assert (free > 15).any()


def test_one_range_for_a_tensor():
    values = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(5)).relu()
    grid = search_tensor_grid(values, 4)
    scale, zero_point = plain_loop(values.reshape(1, -1), 4, False)
    assert torch.equal(grid.scale, scale)
    assert torch.equal(grid.zero_point, zero_point)


def test_a_sample_keeps_the_extremes_of_all_values():
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(6))
    values[12_345] = 9.0
    sampled, whole = (search_tensor_grid(values, 8, samples=samples) for samples in (5_000, None))
    torch.testing.assert_close(sampled.scale, whole.scale, rtol=0.15, atol=0)
    # in 8 bits the tail decides: without it, the sample would have a range of about 4 to either side
    assert sampled.scale * 255 > 9
    told = search_tensor_grid(values[:1000], 8, extremes=(float(values.min()), 9.0))
    torch.testing.assert_close(told.scale, whole.scale, rtol=0.25, atol=0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"9 is outside 2\.\.8"):
        search_channel_grid(torch.ones(2, 2), 9)
    with pytest.raises(ValueError, match="1 of 4 weights are not finite"):
        search_channel_grid(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 4)
