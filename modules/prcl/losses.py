"""What PRCL trains with besides the contrast: pseudo-labels weighted by confidence, and the ramp of the contrast."""

import math

from torch import Tensor
from torch.nn import functional

from modules.segmentation.metrics import VOID


def confidence_weighted_cross_entropy(
    logits: Tensor, labels: Tensor, confidence: Tensor, threshold: float = 0.97
) -> Tensor:
    """Cross-entropy with pseudo-labels; each image counts by the share of its pixels that the teacher is sure of.

    ``w_i = #{confidence >= threshold} / #{label is not void}``, and the loss is the mean of ``w_i`` times the
    cross-entropy over all pixels where the latter is above 0. The threshold weighs images and selects no pixels.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64, 255 for void.
        confidence: (B, H, W) the teacher's probability of the label, 0 where there is none.
        threshold: in [0, 1].

    Returns:
        Scalar; 0 where everything is void.

    Source: PRCL, the unsupervised loss (as in ReCo).
    """
    losses = functional.cross_entropy(logits, labels, ignore_index=VOID, reduction="none")
    labelled = (labels != VOID).flatten(1).sum(1)
    weights = (confidence >= threshold).flatten(1).sum(1) / labelled.clamp(min=1)
    counted = (losses.detach() > 0).sum().clamp(min=1)
    return (weights[:, None, None] * losses).sum() / counted


def ramp(
    time: float, begin: float = 0.0, end: float = 200.0, peak: float = 1.0, floor: float = 0.0, rate: float = -5.0
) -> float:
    """Weight of the contrastive loss: ``peak exp(rate ((t - begin) / (end - begin))^2)`` between begin and end.

    Args:
        time: t, in epochs.
        begin: the weight is 0 before.
        end: the weight is ``floor`` from then on; infinite for a constant one.
        peak: weight at ``begin``.
        floor: least weight from ``begin`` on.
        rate: negative for a falling weight.

    Source: PRCL, released code.
    """
    if time < begin:
        return 0.0
    if time >= end:
        return floor
    share = 0.0 if math.isinf(end) else (time - begin) / (end - begin)
    return max(peak * math.exp(rate * share**2), floor)
