"""Mutual likelihood score of diagonal Gaussians, and a contrastive loss on it that never holds all pairs."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reduction = Literal["sum", "mean"]

# Elements (anchors x keys x dimensions) worked on at a time: what fits a core's cache, and what keeps a GPU busy.
CPU_ELEMENTS = 1 << 18
GPU_ELEMENTS = 1 << 25
LOG_GROUP = 4


class Gaussians(NamedTuple):
    """Diagonal Gaussian distributions.

    Args:
        mean: (..., D).
        variance: (..., D), positive.
    """

    mean: Tensor
    variance: Tensor


def mutual_likelihood_score(first: Gaussians, second: Gaussians, reduction: Reduction = "sum") -> Tensor:
    """Similarity of two Gaussians: ``-1/2 R_d [(m1 - m2)^2 / (v1 + v2) + log(v1 + v2)]`` (PRCL; Shi and Jain 2019).

    Args:
        first: means and variances (..., D), broadcast against ``second``.
        second: the same.
        reduction: R, over the dimensions: ``sum`` (the logarithm of a likelihood up to a constant) or ``mean`` (the
            released code).

    Returns:
        (...).
    """
    check_reduction(reduction)
    variance = first.variance + second.variance
    terms = (first.mean - second.mean).square() / variance + variance.log()
    return -0.5 * (terms.sum(-1) if reduction == "sum" else terms.mean(-1))


def gaussian_contrast(
    anchors: Gaussians,
    keys: Gaussians,
    index: Tensor,
    temperature: float = 100.0,
    reduction: Reduction = "sum",
) -> Tensor:
    """Cross-entropy of telling each anchor's positive key from its negatives by mutual likelihood score.

    Memory does not grow with anchors x keys x dimensions: a few anchors are worked on at a time, and their gradients
    are computed along with the loss. No gradient reaches the keys.

    Args:
        anchors: A Gaussians, means and variances (A, D). Sums of two variances lie between 1e-9 and 1e9, so that a
            product of four has a logarithm in single precision.
        keys: N Gaussians, (N, D); treated as constants.
        index: (A, K + 1) int64 rows of ``keys``, for each anchor its positive and then its K negatives.
        temperature: divides the scores.
        reduction: see :func:`mutual_likelihood_score`.

    Returns:
        (A,) float32 losses.

    Raises:
        ValueError: for a temperature that is not positive, or shapes that do not fit.

    Source: PRCL, the loss of its section on probabilistic representation contrastive learning.
    """
    check_reduction(reduction)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    count, dimensions = anchors.mean.shape
    if index.shape[:1] != (count,) or index.ndim != 2 or keys.mean.shape[1:] != (dimensions,):
        raise ValueError(
            f"anchors {tuple(anchors.mean.shape)}, keys {tuple(keys.mean.shape)} and index {tuple(index.shape)} do not "
            "fit; expected (A, D), (N, D) and (A, K + 1)"
        )
    scale = 1.0 / (temperature * (1 if reduction == "sum" else dimensions))
    with torch.autocast(anchors.mean.device.type, enabled=False):
        return _GaussianContrast.apply(
            anchors.mean.float(), anchors.variance.float(), keys.mean.float(), keys.variance.float(), index, scale
        )


def check_reduction(reduction: str) -> None:
    """Raise a ValueError unless the name is known."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}, expected sum or mean")


class _GaussianContrast(torch.autograd.Function):
    """Losses in the forward pass together with their derivatives, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, variance: Tensor, key_mean: Tensor, key_variance: Tensor, index: Tensor, scale: float
    ) -> Tensor:
        with_gradients = any(ctx.needs_input_grad[:2])
        losses = mean.new_empty(len(mean))
        gradients = [torch.empty_like(mean), torch.empty_like(variance)] if with_gradients else []
        limit = CPU_ELEMENTS if mean.device.type == "cpu" else GPU_ELEMENTS
        step = max(1, limit // (index.shape[1] * mean.shape[1]))
        for start in range(0, len(mean), step):
            part = slice(start, start + step)
            spread = key_variance[index[part]].add_(variance[part, None])
            # In place of key_mean - mean, whose square is the same; the sign returns in the derivative.
            difference = key_mean[index[part]].sub_(mean[part, None])
            logs = _sum_of_logs(spread)
            inverse = spread.reciprocal_()
            if with_gradients:
                ratio = difference * inverse
                scores = _dot(difference, ratio)
            else:
                scores = _dot(difference.square_(), inverse)
            logits = scores.add_(logs).mul_(-0.5 * scale)
            losses[part] = torch.logsumexp(logits, 1) - logits[:, 0]
            if with_gradients:
                weights = logits.softmax(1)
                weights[:, 0] -= 1.0
                gradients[0][part] = _weighted(weights, ratio).mul_(scale)
                gradients[1][part] = _weighted(weights, ratio.square_().sub_(inverse)).mul_(0.5 * scale)
        ctx.save_for_backward(*gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        mean, variance = ctx.saved_tensors
        return upstream[:, None] * mean, upstream[:, None] * variance, None, None, None, None


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Sum of products over the last axis of two (a, k, D): (a, k)."""
    return torch.linalg.vecdot(first, second)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sums over keys: (a, k) and (a, k, D) -> (a, D)."""
    return torch.bmm(weights[:, None], values)[:, 0]


def _sum_of_logs(values: Tensor) -> Tensor:
    """Sum of logarithms over the last axis, with a logarithm for each product of four."""
    groups, rest = divmod(values.shape[-1], LOG_GROUP)
    if rest:
        return values.log().sum(-1)
    parts = values.unflatten(-1, (LOG_GROUP, groups)).unbind(-2)
    return (parts[0] * parts[1]).mul_(parts[2] * parts[3]).log_().sum(-1)
