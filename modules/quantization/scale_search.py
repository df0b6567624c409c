"""Ranges of weights and inputs by search: how far to shrink the extremes so that quantization loses least."""

from typing import NamedTuple

import torch
from torch import Tensor

from modules.quantization.quantizers import check_bits, integer_range

SHRINK_STEPS = 80
STEP = 0.01
EXPONENT = 2.4
LARGEST_ZERO_POINT = 2**14
CHUNK = 2**18


class UniformGrid(NamedTuple):
    """Integers ``low..high`` and what they stand for: ``(integer - zero_point) * scale``.

    Args:
        scale: (C,), above 0.
        zero_point: (C,), whole numbers in the scale's type.
        low: least integer.
        high: largest integer.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


@torch.no_grad()
def search_channel_grid(
    weight: Tensor, bits: int, symmetric: bool = False, exponent: float = EXPONENT, include_zero: bool = False
) -> UniformGrid:
    """The best of 80 ranges, 1.00 to 0.21 of (min, max), for each output channel.

    Best is the least mean of ``|w - w_hat| ** exponent`` with nearest rounding; of equals the widest.

    Args:
        weight: (C, ...).
        bits: 2..8.
        symmetric: signed integers without zero point, the largest magnitude at the largest integer; otherwise integers
            from 0, with a zero point.
        exponent: of the error.
        include_zero: widen ranges of one sign to 0, so that zero points are among the integers, which runtimes ask for.
            This happens anyway where all weights of a channel are (nearly) the same.

    Returns:
        The grid, with (C,) scales. A channel of zeros gets the scale of the tensor's largest weight.

    Raises:
        ValueError: for bits outside 2..8, or weights that are not finite.

    Source: specification, section 7 (BRECQ's initial scales).
    """
    low, high = integer_range(check_bits(bits), signed=symmetric)
    rows = weight.detach().flatten(1) if weight.ndim > 1 else weight.detach()[:, None]
    if not torch.isfinite(rows).all():
        raise ValueError(f"{int((~torch.isfinite(rows)).sum())} of {rows.numel()} weights are not finite")
    extremes = _extremes(rows, symmetric, include_zero, high)
    per_chunk = max(1, CHUNK // rows.shape[1])
    found = [
        _search(part, part_extremes, low, high, symmetric, exponent)
        for part, part_extremes in zip(rows.split(per_chunk), extremes.split(per_chunk), strict=True)
    ]
    scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
    return UniformGrid(scale, zero_point, low, high)


@torch.no_grad()
def search_tensor_grid(
    values: Tensor,
    bits: int,
    symmetric: bool = False,
    exponent: float = EXPONENT,
    include_zero: bool = True,
    samples: int | None = None,
    extremes: tuple[float, float] | None = None,
) -> UniformGrid:
    """One range for a whole tensor, such as a layer's input.

    Args:
        values: any shape.
        bits: see :func:`search_channel_grid`, as are the other arguments.
        symmetric: signed integers without zero point.
        exponent: of the error.
        include_zero: widen the range to 0, as padding is 0.
        samples: measure errors on at most so many values, evenly spread; the extremes are those of all.
        extremes: known (min, max), of more values than these.

    Returns:
        The grid, with one scale: (1,).

    Raises:
        ValueError: as :func:`search_channel_grid`.
    """
    flat = values.detach().flatten()
    kept = flat if samples is None else flat[:: max(1, -(-flat.numel() // samples))]
    ends = torch.stack(flat.aminmax()) if extremes is None else flat.new_tensor(extremes)
    # the extremes stand at the end of the sample, so that they are those of the row that is searched
    row = kept if extremes is None and kept.numel() == flat.numel() else torch.cat([kept, ends])
    return search_channel_grid(row[None], bits, symmetric, exponent, include_zero)


def quantize(values: Tensor, grid: UniformGrid) -> Tensor:
    """Nearest integers of a tensor (C, ...), or of any tensor for a grid with one scale, in the values' type."""
    shape = (-1, *[1] * (values.ndim - 1))
    numbers = (values / grid.scale.view(shape)).round() + grid.zero_point.view(shape)
    return numbers.clamp(grid.low, grid.high)


def _extremes(rows: Tensor, symmetric: bool, include_zero: bool, high: int) -> Tensor:
    """(C, 2) least and largest of each row, such that a grid can be put between them."""
    low, high_end = rows.aminmax(dim=1)
    if symmetric:
        high_end = torch.maximum(low.abs(), high_end.abs())
        low = -high_end
    elif include_zero:
        low, high_end = low.clamp(max=0), high_end.clamp(min=0)
    else:
        narrow = torch.maximum(low.abs(), high_end.abs()) * high > (high_end - low) * LARGEST_ZERO_POINT
        low = torch.where(narrow, low.clamp(max=0), low)
        high_end = torch.where(narrow, high_end.clamp(min=0), high_end)
    dead = rows.abs().amax(1) < torch.finfo(rows.dtype).tiny
    largest = rows.abs().amax()
    high_end = torch.where(dead, torch.where(largest > 0, largest, 1), high_end)
    return torch.stack([low, high_end], 1)


def _search(
    rows: Tensor, extremes: Tensor, low: int, high: int, symmetric: bool, exponent: float
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (C,) of some rows (C, N), several ranges at a time if the rows are short."""
    best = torch.full_like(extremes[:, 0], torch.inf)
    best_scale, best_zero_point = torch.ones_like(best), torch.zeros_like(best)
    at_a_time = max(1, CHUNK // rows.numel())
    for start in range(0, SHRINK_STEPS, at_a_time):
        steps = range(start, min(start + at_a_time, SHRINK_STEPS))
        shrink = torch.tensor([1.0 - step * STEP for step in steps], dtype=torch.float64).to(rows)
        ends = extremes * shrink[:, None, None]
        if symmetric:
            scale = ends[..., 1] / high
            zero_point = torch.zeros_like(scale)
        else:
            scale = (ends[..., 1] - ends[..., 0]) / high
            zero_point = (-ends[..., 0] / scale).round()
        numbers = (rows / scale[..., None]).round_().add_(zero_point[..., None]).clamp_(low, high)
        errors = numbers.sub_(zero_point[..., None]).mul_(scale[..., None]).sub_(rows).abs_().pow_(exponent).mean(-1)
        error, index = errors.min(0)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale.gather(0, index[None])[0], best_scale)
        best_zero_point = torch.where(better, zero_point.gather(0, index[None])[0], best_zero_point)
    return best_scale, best_zero_point
