"""Metrics of image classification; states add up over batches and processes."""

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCohenKappa,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
)
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat

METRIC_NAMES = ("acc", "balanced_acc", "kappa", "macro_f1", "macro_precision", "auroc")
TOP = 5


def metric_names(num_classes: int) -> tuple[str, ...]:
    """Names of the metrics; ``top5`` only where it is not always 1."""
    return (*METRIC_NAMES, "top5") if num_classes > TOP else METRIC_NAMES


class BalancedAccuracy(MulticlassConfusionMatrix):
    """Mean recall over the classes that occur among the labels.

    With all classes present this is torchmetrics' macro recall, which counts an absent but predicted class as zero.
    """

    def compute(self) -> Tensor:
        """Value in [0, 1]."""
        counts = super().compute().float()
        support = counts.sum(1)
        present = support > 0
        return (counts.diagonal()[present] / support[present]).mean()


class QuadraticKappa(MulticlassCohenKappa):
    """Quadratic weighted kappa; 0 where it is undefined because labels and predictions are one and the same class.

    Args:
        num_classes: number of grades, in order.
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, weights="quadratic", **kwargs)

    def compute(self) -> Tensor:
        """Value in [-1, 1]."""
        return super().compute().nan_to_num(nan=0.0)


class PresentClassAUROC(MulticlassAUROC):
    """One-vs-rest AUROC, averaged over the classes that occur among the labels.

    Args:
        num_classes: number of classes.
        class_names: for the warning about absent classes.
    """

    def __init__(self, num_classes: int, class_names: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, average="none", thresholds=None, **kwargs)
        self.class_names = list(class_names) if class_names else [str(label) for label in range(num_classes)]

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; one that saw no label sends empty ones, which torchmetrics waits for."""
        if not self.preds:
            self.preds.append(torch.empty(0, self.num_classes, device=self.device))
            self.target.append(torch.empty(0, dtype=torch.long, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Value in [0, 1]; NaN if fewer than two classes occur."""
        probabilities, labels = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        present = torch.bincount(labels, minlength=self.num_classes) > 0
        if not present.all():
            absent = [name for name, there in zip(self.class_names, present.tolist(), strict=True) if not there]
            rank_zero_warn(f"AUROC is averaged over the classes that occur; without a label: {', '.join(absent)}.")
        if present.sum() < 2:
            return torch.tensor(torch.nan, device=labels.device)
        scores = [binary_auroc(probabilities[:, label], (labels == label).long()) for label in present.nonzero()[:, 0]]
        return torch.stack(scores).mean()


def classification_metrics(num_classes: int, prefix: str, class_names: list[str] | None = None) -> MetricCollection:
    """All metrics by name: acc, balanced_acc, kappa (quadratic), macro_f1, macro_precision, auroc, top5.

    ``top5`` counts an image whose label is among the five most probable classes; it needs more than five.

    Args:
        num_classes: C.
        prefix: put before each name, such as ``val/``.
        class_names: for messages.

    Returns:
        A collection to be updated with probabilities (B, C) and labels (B,).
    """
    quick = {"validate_args": False}
    metrics = {
        "acc": MulticlassAccuracy(num_classes, average="micro", **quick),
        "balanced_acc": BalancedAccuracy(num_classes, **quick),
        "kappa": QuadraticKappa(num_classes, **quick),
        "macro_f1": MulticlassF1Score(num_classes, average="macro", **quick),
        "macro_precision": MulticlassPrecision(num_classes, average="macro", **quick),
        "auroc": PresentClassAUROC(num_classes, class_names, **quick),
    }
    if "top5" in metric_names(num_classes):
        metrics["top5"] = MulticlassAccuracy(num_classes, top_k=TOP, average="micro", **quick)
    return MetricCollection(metrics, prefix=prefix)
