"""Fake quantization of weights and of inputs of layers, 2 to 8 bits, with straight-through gradients."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

WeightScale = Literal["max", "fixed", "learned"]
InputScheme = Literal["affine", "symmetric"]
LEAST_BITS, MOST_BITS = 2, 8
TINY = 1e-8


class QuantizedWeight(NamedTuple):
    """Integers and how to turn them back to numbers: ``(integers - zero_point) * scale``, channel by channel.

    Args:
        integers: of the weight's shape, int16.
        scale: (C,) float.
        zero_point: (C,) int16; 0 where quantization is symmetric.
        bits: how many bits the integers need.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    def dequantized(self) -> Tensor:
        """The weight that these integers stand for."""
        numbers = self.integers.to(self.scale.dtype)
        return (numbers - _along_channels(self.zero_point.to(self.scale.dtype), numbers)) * _along_channels(
            self.scale, numbers
        )


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Least and largest integer of a number of bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def check_bits(bits: int, field: str = "bits") -> int:
    """Raise a ValueError for a number of bits that no quantizer here has."""
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"{field}: {bits} is outside {LEAST_BITS}..{MOST_BITS}")
    return int(bits)


def round_through(values: Tensor) -> Tensor:
    """Nearest integers, halves to even, with the gradient of the identity."""
    return values + (values.round() - values).detach()


def clamp_through(values: Tensor, low: int, high: int) -> Tensor:
    """Values cut to a range, with the gradient of the identity."""
    return values + (values.clamp(low, high) - values).detach()


class Quantizer(nn.Module):
    """A number of bits that is part of the state; 0 lets everything pass unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bits", torch.zeros((), dtype=torch.int64))
        self._known_bits: int | None = 0

    @property
    def width(self) -> int:
        """Bits, or 0; kept outside of the tensor too, so that a device need not be asked in every step."""
        if self._known_bits is None:
            self._known_bits = int(self.bits)
        return self._known_bits

    def set_bits(self, bits: int) -> None:
        """Quantize with so many bits from now on; 0 for not at all.

        Raises:
            ValueError: for a number outside 2..8.
        """
        self._known_bits = check_bits(bits) if bits else 0
        self.bits.fill_(self._known_bits)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._known_bits = None


class WeightQuantizer(Quantizer):
    """Parametrization of a weight: each output channel has its own scale.

    Args:
        weight: what it will be applied to, (C, ...).
        scale: ``max``: the largest magnitude of each channel, at every step anew, symmetric (HAWQ-v3); ``fixed``: what
            :meth:`set_scale` was given; ``learned``: the same, trained like a weight (LSQ).

    Shape:
        Weight (C, ...) to a weight of the same shape with at most ``2 ** bits`` values in each channel.

    Source: Yao et al., HAWQ-v3 (2021), symmetric weight quantization; Esser et al., LSQ (2020), for ``learned``.
    """

    def __init__(self, weight: Tensor, scale: WeightScale = "max") -> None:
        super().__init__()
        if scale not in get_args(WeightScale):
            raise ValueError(f"scale: {scale!r} is unknown; expected {', '.join(get_args(WeightScale))}")
        self.kind = scale
        initial = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
        if scale == "learned":
            self.scale = nn.Parameter(initial)
        else:
            self.register_buffer("scale", initial)
        self.register_buffer("zero_point", torch.zeros_like(initial))
        self.register_buffer("signed", torch.ones((), dtype=torch.bool, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as its integers stand for it."""
        bits = self.width
        if not bits:
            if self.kind == "learned" and self.training:  # DDP waits for the gradient of every parameter
                return weight + 0 * _along_channels(self.scale, weight)
            return weight
        scale, zero_point = self._scale(weight, bits)
        low, high = integer_range(bits, self._is_signed())
        numbers = weight / scale + zero_point
        if self.kind == "learned":
            return (round_through(numbers.clamp(low, high)) - zero_point) * scale
        return (clamp_through(round_through(numbers), low, high) - zero_point) * scale

    @torch.no_grad()
    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None, signed: bool = True) -> None:
        """Fix the grid.

        Args:
            scale: (C,), above 0.
            zero_point: (C,) integers; None for 0.
            signed: integers from ``-2^(bits - 1)`` on, or from 0.

        Raises:
            ValueError: for a quantizer that takes its scale from the weight, or a scale that is not positive.
        """
        if self.kind == "max":
            raise ValueError("scale: max takes its scale from the weight at every step; use fixed or learned")
        if not (scale > 0).all():
            raise ValueError("scale: not all are positive")
        self.scale.copy_(scale)
        self.zero_point.copy_(torch.zeros_like(scale) if zero_point is None else zero_point)
        self.signed.fill_(signed)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """Integers of a weight (C, ...).

        Raises:
            ValueError: while there are no bits.
        """
        bits = self.width
        if not bits:
            raise ValueError("this weight is not quantized: it has no bits yet")
        scale, zero_point = self._scale(weight, bits)
        integers = (weight / scale + zero_point).round().clamp(*integer_range(bits, self._is_signed()))
        return QuantizedWeight(
            integers.to(torch.int16), scale.flatten().clone(), zero_point.flatten().to(torch.int16), bits
        )

    def _is_signed(self) -> bool:
        return self.kind == "max" or bool(self.signed)

    def _scale(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        if self.kind == "max":
            largest = weight.detach().flatten(1).abs().amax(1).clamp(min=TINY)
            scale = _along_channels(largest / (2 ** (bits - 1) - 1), weight)
            return scale, torch.zeros_like(scale)
        scale = self.scale
        if self.kind == "learned":
            scale = _gradient_scaled(scale.clamp(min=TINY), weight[0].numel(), bits)
        return _along_channels(scale, weight), _along_channels(self.zero_point, weight)


class InputQuantizer(Quantizer):
    """One range for a layer's whole input, a moving average of the extremes of training batches.

    Args:
        scheme: ``affine``: integers from 0, with a zero point, for any range; ``symmetric``: zero point 0, signed with
            8 bits, otherwise from 0, or signed where inputs go below 0 (HAWQ-v3 would cut these off).
        momentum: share of the old range at every step; 1 keeps the extremes of all batches.

    Shape:
        Any to the same.

    Raises:
        ValueError: in evaluation, if bits are set and no batch was seen.

    Source: Yao et al., HAWQ-v3 (2021), activations; an affine range as in Jacob et al. (2018).
    """

    def __init__(self, scheme: InputScheme = "affine", momentum: float = 0.99) -> None:
        super().__init__()
        if scheme not in get_args(InputScheme):
            raise ValueError(f"scheme: {scheme!r} is unknown; expected {', '.join(get_args(InputScheme))}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: {momentum} is outside [0, 1]")
        self.scheme, self.momentum = scheme, momentum
        self._known_fixed: bool | None = False
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def is_fixed(self) -> bool:
        """Whether batches no longer move the range."""
        if self._known_fixed is None:
            self._known_fixed = bool(self.fixed)
        return self._known_fixed

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._known_fixed = None

    def forward(self, inputs: Tensor) -> Tensor:
        """The input as its integers stand for it."""
        bits = self.width
        if not bits:
            return inputs
        if self.training and not self.is_fixed:
            self.observe(inputs)
        scale, zero_point, signed = self.grid()
        numbers = round_through(inputs / scale.to(inputs) + zero_point.to(inputs))
        cut = clamp_through(numbers, *integer_range(bits, signed))
        return (cut - zero_point.to(inputs)) * scale.to(inputs)

    @torch.no_grad()
    def observe(self, inputs: Tensor) -> None:
        """Take the extremes of a batch into the range, those over all processes.

        Raises:
            ValueError: if they are not finite.
        """
        extremes = torch.stack([-inputs.amin(), inputs.amax()]).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        low, high = -extremes[0], extremes[1]
        first = self.batches == 0
        if self.momentum == 1:
            old_low, old_high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            old_low = torch.lerp(low, self.low, self.momentum)
            old_high = torch.lerp(high, self.high, self.momentum)
        self.low.copy_(torch.where(first, low, old_low))
        self.high.copy_(torch.where(first, high, old_high))
        self.batches += 1

    @torch.no_grad()
    def set_range(self, low: float | Tensor, high: float | Tensor) -> None:
        """Fix the range, for example at what was learned, and take no further batches into it."""
        self.low.fill_(low)
        self.high.fill_(high)
        self.batches.clamp_(min=1)
        self.fixed.fill_(True)
        self._known_fixed = True

    def grid(self) -> tuple[Tensor, Tensor, bool]:
        """Scale, zero point, and whether integers are signed.

        Raises:
            ValueError: before any range is known.
        """
        bits = self.width
        if not self.training and not int(self.batches):
            raise ValueError(
                "an input is to be quantized, but its range is unknown: no batch was seen in training or calibration"
            )
        if self.scheme == "affine":
            low, high = self.low.clamp(max=0), self.high.clamp(min=0)
            scale = ((high - low) / (2**bits - 1)).clamp(min=TINY)
            return scale, (-low / scale).round(), False
        signed = bits == MOST_BITS or bool(self.low < 0)
        if signed:
            largest = torch.maximum(self.low.abs(), self.high.abs())
            scale = largest / (2 ** (bits - 1) - 1)
        else:
            scale = (self.high - self.low) / (2**bits - 1)
        return scale.clamp(min=TINY), torch.zeros_like(scale), signed


def _along_channels(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.ndim - 1))


def _gradient_scaled(scale: Tensor, numbers: int, bits: int) -> Tensor:
    """A scale whose gradient is of the size of a weight's (LSQ, section 2.2)."""
    factor = (numbers * (2 ** (bits - 1) - 1)) ** -0.5
    return scale * factor + (scale * (1 - factor)).detach()
