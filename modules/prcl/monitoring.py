"""What there is to watch while PRCL trains: quality of pseudo-labels, and uncertainty by class."""

import torch
from torch import Tensor
from torchmetrics import Metric

from modules.segmentation.metrics import VOID


class ClassMeans(Metric):
    """Mean of a value of each class over its pixels, or over steps, and over processes.

    Args:
        num_classes: C.
    """

    full_state_update = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("total", torch.zeros(num_classes), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, labels: Tensor) -> None:
        """Add pixels.

        Args:
            values: (N,).
            labels: (N,) int64 classes.
        """
        member = labels == torch.arange(self.num_classes, device=labels.device)[:, None]
        # Pixels are added in a tree and not one by one, so that float32 (the best that some devices have) suffices.
        self.total += torch.where(member, values.to(self.total), 0.0).sum(1)
        self.count += member.sum(1)

    def compute(self) -> Tensor:
        """(C,) float32 means, NaN for a class without pixels."""
        return self.total / self.count


class PseudoLabelQuality(Metric):
    """How many pseudo-labels are confident, and how many are right where the hidden labels are known.

    Args:
        threshold: confidence from which on a label counts as confident.
    """

    full_state_update = False

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        for name in ("pixels", "confident", "known", "right", "known_confident", "right_confident"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, confidence: Tensor, truth: Tensor) -> None:
        """Add a batch.

        Args:
            labels: (B, H, W) int64 pseudo-labels.
            confidence: (B, H, W).
            truth: (B, H, W) int64 hidden labels, 255 where unknown.
        """
        confident, known = confidence >= self.threshold, truth != VOID
        right = (labels == truth) & known
        self.pixels += labels.numel()
        self.confident += confident.sum()
        self.known += known.sum()
        self.right += right.sum()
        self.known_confident += (known & confident).sum()
        self.right_confident += (right & confident).sum()

    def compute(self) -> dict[str, Tensor]:
        """Shares.

        Returns:
            ``pseudo_coverage`` of all pixels are confident; where hidden labels are known, ``pseudo_accuracy`` of the
            known pixels are right, and ``pseudo_confident_accuracy`` of the confident ones among these. A share of
            nothing is left out.
        """
        shares = {
            "pseudo_coverage": (self.confident, self.pixels),
            "pseudo_accuracy": (self.right, self.known),
            "pseudo_confident_accuracy": (self.right_confident, self.known_confident),
        }
        return {name: part / whole for name, (part, whole) in shares.items() if whole > 0}
