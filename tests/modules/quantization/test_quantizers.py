"""Quantizers of weights and inputs against loops over numbers."""

import math

import pytest
import torch

from modules.quantization.quantizers import InputQuantizer, WeightQuantizer
from tests.distributed import run_ranks


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half_to_even(value):
    return round(value)  # Python's own rule


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_of_a_weight_are_those_of_a_loop_over_channels(bits):
    weight = random(5, 3, 2, 2).double()
    weight[3] = 0.0
    quantizer = WeightQuantizer(weight)
    quantizer.set_bits(bits)
    found, fake = quantizer.quantized(weight), quantizer(weight)
    for channel in range(5):
        values = weight[channel].flatten().tolist()
        scale = max(1e-8, *(abs(value) for value in values)) / (2 ** (bits - 1) - 1)
        assert found.scale[channel].item() == pytest.approx(scale, rel=1e-12)
        for value, integer, number in zip(
            values, found.integers[channel].flatten().tolist(), fake[channel].flatten().tolist(), strict=True
        ):
            expected = min(max(half_to_even(value / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
            assert integer == expected
            assert number == pytest.approx(expected * scale, abs=1e-12)
    assert torch.equal(found.dequantized(), fake)


def test_gradients_pass_straight_through():
    weight = random(4, 6).requires_grad_()
    quantizer = WeightQuantizer(weight)
    quantizer.set_bits(3)
    upstream = random(4, 6, seed=1)
    (quantizer(weight) * upstream).sum().backward()
    torch.testing.assert_close(weight.grad, upstream)


def test_without_bits_the_weight_itself_passes():
    weight = random(4, 6)
    assert WeightQuantizer(weight)(weight) is weight


def test_a_fixed_grid_with_zero_points_is_kept():
    weight = random(2, 50)
    quantizer = WeightQuantizer(weight, "fixed")
    quantizer.set_bits(4)
    quantizer.set_scale(torch.tensor([0.1, 0.5]), torch.tensor([3.0, 9.0]), signed=False)
    for channel, (scale, zero) in enumerate([(0.1, 3), (0.5, 9)]):
        integers = quantizer.quantized(weight).integers[channel]
        for value, integer in zip(weight[channel].tolist(), integers.tolist(), strict=True):
            if abs(value / scale % 1 - 0.5) > 1e-4:
                assert integer == min(max(half_to_even(value / scale + zero), 0), 15)
    assert torch.equal(quantizer(weight), quantizer.quantized(weight).dequantized())
    with pytest.raises(ValueError, match="scale: not all are positive"):
        quantizer.set_scale(torch.tensor([0.1, 0.0]))


def test_the_gradient_of_a_learned_scale_is_that_of_lsq():
    """LSQ, equation 3: -v/s + round(v/s) inside, the bound outside, times the factor of section 2.2."""
    weight = random(1, 200)
    quantizer = WeightQuantizer(weight, "learned")
    quantizer.set_bits(3)
    scale = 0.4
    quantizer.set_scale(torch.tensor([scale]))
    upstream = random(1, 200, seed=1)
    (quantizer(weight) * upstream).sum().backward()
    expected = 0.0
    for value, gradient in zip(weight[0].tolist(), upstream[0].tolist(), strict=True):
        ratio = value / scale
        inside = -4 <= ratio <= 3
        slope = half_to_even(ratio) - ratio if inside else (-4 if ratio < -4 else 3)
        expected += gradient * slope
    assert quantizer.scale.grad.item() == pytest.approx(expected / math.sqrt(200 * 3), rel=1e-4)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits: {bits} is outside 2\.\.8"):
        WeightQuantizer(random(2, 2)).set_bits(bits)


def test_a_weight_without_bits_has_no_integers():
    with pytest.raises(ValueError, match="no bits yet"):
        WeightQuantizer(random(2, 2)).quantized(random(2, 2))


def after_three_batches(scheme, bits, batches, momentum=0.99):
    quantizer = InputQuantizer(scheme, momentum).train()
    quantizer.set_bits(bits)
    outputs = [quantizer(batch) for batch in batches]
    return quantizer, outputs


def expected_range(batches, momentum):
    low, high = batches[0].min().item(), batches[0].max().item()
    for batch in batches[1:]:
        low = momentum * low + (1 - momentum) * batch.min().item()
        high = momentum * high + (1 - momentum) * batch.max().item()
    return low, high


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("rectified", [True, False])
def test_affine_inputs_after_three_batches(bits, rectified):
    batches = [random(4, 30, seed=seed) * (seed + 1) for seed in range(3)]
    batches = [batch.relu() if rectified else batch - 0.5 for batch in batches]
    quantizer, outputs = after_three_batches("affine", bits, batches)
    low, high = expected_range(batches, 0.99)
    assert (quantizer.low.item(), quantizer.high.item()) == pytest.approx((low, high), rel=1e-6, abs=1e-7)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = half_to_even(-low / scale)
    for value, output in zip(batches[2].flatten().tolist(), outputs[2].flatten().tolist(), strict=True):
        if abs(value / scale % 1 - 0.5) > 1e-3:
            integer = min(max(half_to_even(value / scale) + zero, 0), 2**bits - 1)
            assert output == pytest.approx((integer - zero) * scale, abs=1e-5)


@pytest.mark.parametrize(("bits", "rectified", "least"), [(8, True, -128), (6, True, 0), (6, False, -32)])
def test_symmetric_inputs_are_signed_with_8_bits_or_below_0(bits, rectified, least):
    batches = [random(4, 30, seed=seed) for seed in range(3)]
    batches = [batch.relu() if rectified else batch for batch in batches]
    _, outputs = after_three_batches("symmetric", bits, batches)
    low, high = expected_range(batches, 0.99)
    signed = least < 0
    scale = max(abs(low), abs(high)) / (2 ** (bits - 1) - 1) if signed else (high - low) / (2**bits - 1)
    most = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    for value, output in zip(batches[2].flatten().tolist(), outputs[2].flatten().tolist(), strict=True):
        if abs(value / scale % 1 - 0.5) > 1e-3:
            assert output == pytest.approx(min(max(half_to_even(value / scale), least), most) * scale, abs=1e-5)


def test_with_momentum_1_the_range_holds_all_batches():
    batches = [random(3, 40, seed=seed) * (3 - seed) for seed in range(3)]
    quantizer, _ = after_three_batches("affine", 8, batches, momentum=1.0)
    every = torch.cat(batches)
    assert (quantizer.low.item(), quantizer.high.item()) == (every.min().item(), every.max().item())


def test_evaluation_moves_no_range_and_needs_one():
    quantizer = InputQuantizer().eval()
    quantizer.set_bits(8)
    with pytest.raises(ValueError, match="its range is unknown"):
        quantizer(random(2, 3))
    quantizer.train()
    quantizer(random(2, 3))
    high = quantizer.high.item()
    quantizer.eval()
    quantizer(100 * random(2, 3))
    assert quantizer.high.item() == high
    quantizer.train().set_range(-1.0, 2.0)
    quantizer(100 * random(2, 3))
    assert (quantizer.low.item(), quantizer.high.item()) == (-1.0, 2.0)


def test_state_is_restored():
    quantizer, _ = after_three_batches("affine", 5, [random(3, 4, seed=seed) for seed in range(3)])
    other = InputQuantizer("affine")
    other.load_state_dict(quantizer.state_dict())
    assert other.width == 5
    assert torch.equal(other.eval()(random(2, 4)), quantizer.eval()(random(2, 4)))


def ranges_of_a_rank(rank):
    quantizer = InputQuantizer().train()
    quantizer.set_bits(8)
    for step in range(3):
        quantizer(random(4, 10, seed=step)[rank::2] * (step + 1))
    return quantizer.low.item(), quantizer.high.item()


def test_two_ranks_have_the_range_of_the_union():
    quantizer = InputQuantizer().train()
    quantizer.set_bits(8)
    for step in range(3):
        quantizer(random(4, 10, seed=step) * (step + 1))
    assert run_ranks(ranges_of_a_rank) == [(quantizer.low.item(), quantizer.high.item())] * 2
