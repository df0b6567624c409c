"""Learned rounding of weights (AdaRound): each weight goes up or down as the output of its layer prefers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.quantization.quantizers import QuantizedWeight
from modules.quantization.scale_search import UniformGrid

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
WARM_UP = 0.2
FIRST_TEMPERATURE, LAST_TEMPERATURE = 20.0, 2.0
UNDECIDED_MARGIN = 0.05


class LearnedRounding(nn.Module):
    """A weight between two neighbouring integers, weight by weight.

    The only parameter is ``alpha``: h(alpha) = clip(1.2 sigmoid(alpha) - 0.1, 0, 1) is how far a weight is on its way
    from the integer below to the one above. It starts where the weight is.

    Args:
        weight: (C, ...), float.
        grid: scales (C,) and zero points, and the range of integers.

    Source: Nagel et al., AdaRound (2020), equations 21 to 25; specification, section 7.
    """

    def __init__(self, weight: Tensor, grid: UniformGrid) -> None:
        super().__init__()
        shape = (-1, *[1] * (weight.ndim - 1))
        self.low, self.high = grid.low, grid.high
        self.register_buffer("scale", grid.scale.view(shape))
        self.register_buffer("zero_point", grid.zero_point.view(shape))
        numbers = weight.detach() / self.scale
        below = numbers.floor()
        share = (numbers - below - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.alpha = nn.Parameter(share.logit())
        below += self.zero_point
        self.register_buffer("below", below)
        # a weight outside of the grid, or at its upper end, has no choice: the cut is part of base and step
        free = (below >= self.low) & (below < self.high)
        self.register_buffer("base", (below.clamp(self.low, self.high) - self.zero_point) * self.scale)
        self.register_buffer("step", torch.where(free, self.scale, 0))
        self.register_buffer("low_end", weight.new_tensor(STRETCH_LOW))

    def fraction(self) -> Tensor:
        """h(alpha), of the weight's shape, in [0, 1]."""
        stretched = torch.add(self.low_end, self.alpha.sigmoid(), alpha=STRETCH_HIGH - STRETCH_LOW)
        return functional.hardtanh(stretched, 0.0, 1.0)

    def soft(self, fraction: Tensor | None = None) -> Tensor:
        """The weight on its way, of the weight's shape, with gradients for alpha.

        Args:
            fraction: what :meth:`fraction` gave, if it is at hand.
        """
        return torch.addcmul(self.base, self.step, self.fraction() if fraction is None else fraction)

    @torch.no_grad()
    def integers(self) -> Tensor:
        """What the weight is rounded to, of its shape: up where alpha is at least 0."""
        return (self.below + (self.alpha >= 0)).clamp(self.low, self.high)

    def hard(self) -> Tensor:
        """The weight that the integers stand for."""
        return (self.integers() - self.zero_point) * self.scale

    def quantized(self, bits: int) -> QuantizedWeight:
        """Integers, scale and zero point, to be stored."""
        kept = [self.integers(), self.scale.flatten().clone(), self.zero_point.flatten()]
        return QuantizedWeight(kept[0].to(torch.int16), kept[1], kept[2].to(torch.int16), bits)

    def regulariser(self, temperature: float, fraction: Tensor | None = None) -> Tensor:
        """Sum over weights of 1 - \\|2 h - 1\\| ** temperature: how far weights are from a decision."""
        return _Indecision.apply(self.fraction() if fraction is None else fraction, temperature)

    @torch.no_grad()
    def undecided(self) -> Tensor:
        """How many weights are neither at the integer below nor at the one above."""
        fraction = self.fraction()
        return ((fraction > UNDECIDED_MARGIN) & (fraction < 1 - UNDECIDED_MARGIN)).sum()


class _Indecision(torch.autograd.Function):
    """Sum of 1 - |2 h - 1| ** t and its gradient with a single power, as powers take most of the time."""

    @staticmethod
    def forward(context: Any, fraction: Tensor, exponent: float) -> Tensor:
        centred = torch.add(fraction.new_tensor(-1.0), fraction, alpha=2)
        distance = centred.abs()
        power = distance.pow(exponent - 1)
        context.save_for_backward(power.copysign(centred))
        context.exponent = exponent
        return fraction.numel() - torch.dot(power.flatten(), distance.flatten())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (power,) = context.saved_tensors
        return power * (-2 * context.exponent * gradient), None


def temperature(
    step: int, steps: int, warm_up: float = WARM_UP, first: float = FIRST_TEMPERATURE, last: float = LAST_TEMPERATURE
) -> float | None:
    """Exponent of the regulariser: ``first`` at the end of the warm-up, from there linearly to ``last``.

    Args:
        step: 1 to ``steps``.
        steps: of the whole optimisation.
        warm_up: share of the steps in which there is no regulariser.
        first: exponent at the start.
        last: exponent at the end.

    Returns:
        The exponent, or None while there is no regulariser.

    Source: specification, section 7.
    """
    start = warm_up * steps
    if step < start:
        return None
    return last + (first - last) * max(0.0, 1 - (step - start) / max(steps - start, 1))
