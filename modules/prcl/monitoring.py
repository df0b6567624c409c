"""What there is to watch while PRCL trains: quality of pseudo-labels, and uncertainty by class."""

import torch
from torch import Tensor
from torchmetrics import Metric

from modules.segmentation.metrics import VOID


class ClassMeans(Metric):
    """Mean of a value over the pixels of each class, over batches and processes.

    Args:
        num_classes: C.
    """

    full_state_update = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, labels: Tensor) -> None:
        """Add pixels.

        Args:
            values: (N,).
            labels: (N,) int64 classes.
        """
        self.total += torch.bincount(labels, values.to(self.total), minlength=self.num_classes)
        self.count += torch.bincount(labels, minlength=self.num_classes)

    def compute(self) -> Tensor:
        """(C,) float32 means, NaN for a class without pixels."""
        return (self.total / self.count).float()


def pseudo_label_quality(labels: Tensor, confidence: Tensor, truth: Tensor, threshold: float) -> dict[str, Tensor]:
    """How many pseudo-labels are confident, and how many are right where the hidden labels are known.

    Args:
        labels: (B, H, W) int64 pseudo-labels.
        confidence: (B, H, W).
        truth: (B, H, W) int64 hidden labels, 255 where unknown.
        threshold: from which on a label counts as confident.

    Returns:
        ``pseudo_confident``, the share of confident pixels; where hidden labels are known also ``pseudo_accuracy`` and
        ``pseudo_confident_accuracy`` over known pixels. Scalars.
    """
    confident, known = confidence >= threshold, truth != VOID
    right = (labels == truth) & known
    sure = (confident & known).sum()
    return {
        "pseudo_confident": confident.float().mean(),
        "pseudo_accuracy": right.sum() / known.sum().clamp(min=1),
        "pseudo_confident_accuracy": (right & confident).sum() / sure.clamp(min=1),
    }
