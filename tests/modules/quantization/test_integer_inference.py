import math
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
import torch
from torch import nn

from modules.norm_folding import fold_after
from modules.quantization.integer_inference import (
    dyadic,
    integer_join,
    integer_layer,
    rescale,
    scale_ratio,
)
from modules.quantization.quantizers import WeightQuantizer


def ratios():
    exponents = torch.linspace(-40, 29, 400, dtype=torch.float64)
    random = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    # the largest mantissa, which rounds up to 2^31, and one that lies halfway between two multipliers
    special = torch.tensor([1 - 2.0**-53, 0.5 + 2.0**-32, 0.5, 1.0, 2.0**-70], dtype=torch.float64)
    return torch.cat([2.0**exponents * random, special])


def test_multipliers_are_those_of_decimal_arithmetic():
    found = dyadic(ratios())
    for ratio, multiplier, shift in zip(
        ratios().tolist(), found.multiplier.tolist(), found.shift.tolist(), strict=True
    ):
        mantissa, exponent = math.frexp(ratio)
        exact = Decimal(mantissa) * 2**31
        assert multiplier == int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP))
        assert shift == 31 - exponent
        assert abs(Fraction(multiplier, 1) / 2**shift / Fraction(ratio) - 1) <= Fraction(1, 2**31)


def test_products_are_rounded_as_fractions_are():
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-(2**31) + 1, 2**31, (50, 405), generator=generator)
    integers[:20] = torch.randint(-300, 300, (20, 405), generator=generator)
    ratio = dyadic(ratios())
    found = rescale(integers, ratio)
    for row, results in zip(integers.tolist(), found.tolist(), strict=True):
        for integer, multiplier, shift, result in zip(
            row, ratio.multiplier.tolist(), ratio.shift.tolist(), results, strict=True
        ):
            assert result == round(Fraction(integer * multiplier, 2**shift))


def test_halves_go_to_even():
    halves = torch.arange(-9, 10, 2)
    assert rescale(halves[None], dyadic(torch.tensor([0.5]))).tolist() == [[-4, -4, -2, -2, 0, 0, 2, 2, 4, 4]]


@pytest.mark.parametrize("ratio", [0.0, -1.0, 2.0**30, float("nan"), float("inf")])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="ratio of scales"):
        dyadic(torch.tensor([1.0, ratio]))


def folded_layer(layer, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(layer.weight.shape[0]).eval()
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        norm.weight.copy_(torch.linspace(-1, 2, norm.num_features))
        norm.bias.normal_(generator=generator)
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    fold_after(layer, norm)
    quantizer = WeightQuantizer(layer.weight, "max")
    quantizer.set_bits(bits)
    return quantizer.quantized(layer.weight)


def plain_convolution(inputs, weight, stride, padding, groups):
    """Python integers, output after output."""
    batch, channels, height, width = inputs.shape
    out, per_group, kernel, _ = weight.shape
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
    numbers, weights = inputs.tolist(), weight.tolist()
    result = torch.zeros(batch, out, rows, columns, dtype=torch.int64)
    for b in range(batch):
        for o in range(out):
            first = o // (out // groups) * per_group
            for y in range(rows):
                for x in range(columns):
                    total = 0
                    for c in range(per_group):
                        for i in range(kernel):
                            for j in range(kernel):
                                v, u = y * stride + i - padding, x * stride + j - padding
                                if 0 <= v < height and 0 <= u < width:
                                    total += weights[o][c][i][j] * numbers[b][first + c][v][u]
                    result[b, o, y, x] = total
    assert channels == per_group * groups
    return result


@pytest.mark.parametrize(("stride", "groups", "relu"), [(1, 1, True), (2, 4, True), (1, 1, False)])
@torch.no_grad()
def test_convolution_norm_relu_and_requantization_on_python_integers(stride, groups, relu):
    layer = nn.Conv2d(4, 8, 3, stride, padding=1, groups=groups, bias=False)
    weight = folded_layer(layer, 4)
    inputs = torch.randint(-128, 128, (2, 4, 6, 5), generator=torch.Generator().manual_seed(3))
    input_scale, output_scale = torch.tensor(0.021), torch.tensor(0.173)
    found = integer_layer(inputs, input_scale, layer, weight, output_scale, (-31, 31), relu)
    sums = plain_convolution(inputs, weight.integers, stride, 1, groups)
    ratio = dyadic(scale_ratio(input_scale, weight.scale, output_scale))
    for channel in range(8):
        unit = Fraction(input_scale.item()) * Fraction(weight.scale[channel].item())
        bias = round(Fraction(layer.bias[channel].item()) / unit)
        for place, total in enumerate(sums[:, channel].flatten().tolist()):
            activation = max(total + bias, 0) if relu else total + bias
            result = round(Fraction(activation * ratio.multiplier[channel].item(), 2 ** ratio.shift[channel].item()))
            assert found[:, channel].flatten()[place] == min(max(result, -31), 31)
    # and the same as fake quantization, which computes with floats, but for a place at the edge of two integers
    fake = nn.functional.conv2d(
        inputs * input_scale, weight.dequantized(), layer.bias, stride, padding=1, groups=groups
    )
    expected = ((fake.relu() if relu else fake) / output_scale).round().clamp(-31, 31)
    assert (found - expected).abs().max() <= 1
    assert (found == expected).float().mean() > 0.99


@torch.no_grad()
def test_a_linear_layer_on_tokens():
    layer = nn.Linear(6, 5)
    quantizer = WeightQuantizer(layer.weight, "max")
    quantizer.set_bits(8)
    weight = quantizer.quantized(layer.weight)
    inputs = torch.randint(-128, 128, (2, 3, 6), generator=torch.Generator().manual_seed(4))
    scales = torch.tensor(0.02), torch.tensor(0.05)
    found = integer_layer(inputs, scales[0], layer, weight, scales[1], (-128, 127), relu=False)
    expected = (nn.functional.linear(inputs * scales[0], weight.dequantized(), layer.bias) / scales[1]).round()
    assert (found - expected).abs().max() <= 1


def test_residual_join_scales_each_side_and_cuts_nothing_off():
    generator = torch.Generator().manual_seed(5)
    branch = torch.randint(-(2**20), 2**20, (2, 3, 4, 4), generator=generator)
    identity = torch.randint(-128, 128, (2, 3, 4, 4), generator=generator)
    branch_ratio = dyadic(torch.tensor([0.003, 0.1, 0.7], dtype=torch.float64))
    identity_ratio = dyadic(torch.tensor([13.7], dtype=torch.float64))
    found = integer_join(branch, branch_ratio, identity, identity_ratio)
    assert found.abs().max() > 2**15
    for channel in range(3):
        left = Fraction(branch_ratio.multiplier[channel].item(), 2 ** branch_ratio.shift[channel].item())
        right = Fraction(identity_ratio.multiplier.item(), 2 ** identity_ratio.shift.item())
        pairs = zip(branch[:, channel].flatten().tolist(), identity[:, channel].flatten().tolist(), strict=True)
        expected = [round(one * left) + round(other * right) for one, other in pairs]
        assert found[:, channel].flatten().tolist() == expected


def test_weights_with_zero_points_are_refused():
    quantizer = WeightQuantizer(torch.ones(2, 2), "fixed")
    quantizer.set_bits(4)
    quantizer.set_scale(torch.ones(2), torch.ones(2), signed=False)
    weight = quantizer.quantized(torch.ones(2, 2))
    with pytest.raises(ValueError, match="symmetric"):
        integer_layer(torch.ones(1, 2).long(), torch.ones(()), nn.Linear(2, 2), weight, torch.ones(()), (0, 15))
