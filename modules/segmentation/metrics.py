"""Scores of semantic segmentation from one confusion matrix; states add up over batches and processes."""

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

VOID = 255
METRIC_NAMES = ("miou", "aacc", "macc")


class SegmentationScores(MulticlassConfusionMatrix):
    """Intersection over union and pixel accuracies over all pixels seen, from predicted and true class indices.

    Args:
        num_classes: C.
        ignore_index: label of pixels that do not count.

    Example::

        scores = SegmentationScores(11)
        scores.update(logits.argmax(1), masks)
        scores.compute()["miou"]
    """

    def __init__(self, num_classes: int, ignore_index: int = VOID) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, validate_args=False)

    def compute(self) -> dict[str, Tensor]:
        """Everything that follows from the counts.

        Returns:
            ``confusion`` (C, C) counts (row = label, column = prediction), ``iou`` (C,) and ``accuracy`` (C,) per
            class, ``miou`` and ``macc`` their means over the classes where they are defined (IoU: the class occurs
            among labels or predictions; accuracy: among labels), and ``aacc``, the share of pixels that are right.
        """
        counts = super().compute()
        hits, labels, predictions = counts.diagonal(), counts.sum(1), counts.sum(0)
        # Counts are whole numbers up to here, and so exact without the float64 that some devices do not have.
        iou, accuracy = hits / (labels + predictions - hits), hits / labels
        return {
            "confusion": counts,
            "iou": iou,
            "accuracy": accuracy,
            "miou": iou.nanmean(),
            "macc": accuracy.nanmean(),
            "aacc": hits.sum() / counts.sum(),
        }


def pixel_cross_entropy(logits: Tensor, masks: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy averaged over labelled pixels, weighted by class; 0 where no pixel is labelled.

    Args:
        logits: (B, C, H, W).
        masks: (B, H, W) int64, 255 where a pixel does not count.
        class_weights: (C,); None for equal weights.
    """
    total = torch.nn.functional.cross_entropy(logits, masks, class_weights, ignore_index=VOID, reduction="sum")
    labels = masks[masks != VOID]
    weight = class_weights[labels].sum() if class_weights is not None else labels.numel()
    return total / weight if len(labels) else total
