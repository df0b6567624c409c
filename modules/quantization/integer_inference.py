"""What integer hardware computes: sums of integers, brought to the next scale by a multiplication and a shift.

This is a check in evaluation of what fake quantization promises, not a fast path.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.quantization.quantizers import QuantizedWeight

MANTISSA_BITS = 31
LARGEST_SHIFT = 62
BIAS_BITS = 32


class Dyadic(NamedTuple):
    """The number ``multiplier / 2 ** shift``.

    Args:
        multiplier: int64, at most 2 ** 31.
        shift: int64, at least 1, of the same shape.
    """

    multiplier: Tensor
    shift: Tensor


def dyadic(ratio: Tensor) -> Dyadic:
    """The nearest m / 2 ** e with 31 bits for m, halves up, on the tensor's device.

    Args:
        ratio: any shape, above 0 and below 2 ** 30; taken as float64.

    Raises:
        ValueError: for a ratio outside of that range.

    Source: specification, section 6 (HAWQ-v3, dyadic re-quantization).
    """
    ratio = ratio.double()
    limit = MANTISSA_BITS - 1
    if not ((ratio > 0) & (ratio < 2.0**limit)).all():
        raise ValueError(f"ratio of scales: {ratio.min():g} to {ratio.max():g} is not within (0, 2^{limit})")
    mantissa, exponent = torch.frexp(ratio)
    multiplier = (mantissa * 2.0**MANTISSA_BITS + 0.5).floor().long()
    return Dyadic(multiplier, MANTISSA_BITS - exponent.long())


def scale_ratio(input_scale: Tensor, weight_scale: Tensor, output_scale: Tensor) -> Tensor:
    """s_x s_w / s_out as HAWQ-v3 takes it: the scales in single precision, their quotient in double."""
    return (input_scale.float() * weight_scale.float()).double() / output_scale.float().double()


def rescale(integers: Tensor, ratio: Dyadic, dim: int = 1) -> Tensor:
    """Multiply integers by a dyadic number and round, halves to even: exact, whatever the size of the product.

    Args:
        integers: int64, of magnitude below 2 ** 31.
        ratio: one number, or one for each channel.
        dim: dimension of the channels.

    Returns:
        int64 of the same shape.
    """
    shape = [1] * integers.ndim
    shape[dim] = -1
    product = integers * ratio.multiplier.view(shape)
    wanted = ratio.shift.view(shape)
    shift = wanted.clamp(max=LARGEST_SHIFT)
    below = product >> shift
    rest = product - (below << shift)
    half = torch.ones_like(shift) << (shift - 1)
    up = (rest > half) | ((rest == half) & (below % 2 == 1))
    return torch.where(wanted > LARGEST_SHIFT, 0, below + up)


def integer_layer(
    inputs: Tensor,
    input_scale: Tensor,
    layer: nn.Module,
    weight: QuantizedWeight,
    output_scale: Tensor,
    output_range: tuple[int, int],
    relu: bool = True,
) -> Tensor:
    """A convolution or linear layer with its BatchNorm folded, ReLU and re-quantization, on integers alone.

    Args:
        inputs: int64 (B, in, ...), standing for ``inputs * input_scale``.
        input_scale: one number.
        layer: gives stride, padding (with zeros) and bias (of the folded BatchNorm).
        weight: its integers, symmetric.
        output_scale: one number.
        output_range: least and largest integer of the output.
        relu: whether a ReLU stands between.

    Returns:
        int64 (B, out, ...), standing for that times ``output_scale``.

    Raises:
        ValueError: for a weight with zero points.

    Source: specification, section 6: the bias is round(b / (s_w s_x)) in 32 bits, the order convolution, ReLU,
        quantization.
    """
    if weight.zero_point.any():
        raise ValueError("integer inference needs symmetric weights; these have zero points")
    sums = _integer_sums(inputs, layer, weight.integers)
    dim = sums.ndim - 1 if isinstance(layer, nn.Linear) else 1
    if layer.bias is not None:
        largest = 2.0 ** (BIAS_BITS - 1)
        unit = input_scale.double() * weight.scale.double()
        bias = (layer.bias.double() / unit).round().clamp(-largest, largest - 1).long()
        sums = sums + bias.view(-1, *[1] * (sums.ndim - 1 - dim))
    if relu:
        sums = sums.clamp(min=0)
    ratio = dyadic(scale_ratio(input_scale, weight.scale, output_scale))
    return rescale(sums, ratio, dim).clamp(*output_range)


def integer_join(
    branch: Tensor, branch_ratio: Dyadic, identity: Tensor, identity_ratio: Dyadic, dim: int = 1
) -> Tensor:
    """The sum at the end of a residual block: both sides are brought to its scale and rounded, nothing is cut off.

    Args:
        branch: int64 sums of the last layer.
        branch_ratio: their scale (of each channel) over that of the sum.
        identity: int64, of the same shape.
        identity_ratio: its scale over that of the sum.
        dim: dimension of the channels.
    """
    return rescale(branch, branch_ratio, dim) + rescale(identity, identity_ratio, dim)


def _integer_sums(inputs: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
    """Sums of products, in float64, which holds integers below 2 ** 53."""
    numbers, weight = inputs.double(), weight.double()
    if isinstance(layer, nn.Linear):
        return functional.linear(numbers, weight).long()
    convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[weight.ndim]
    return convolve(numbers, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups).long()
