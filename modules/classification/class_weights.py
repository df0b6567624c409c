"""Weights of classes in the loss, from how often they occur."""

from typing import Any, Literal

import torch
from torch import Tensor

ClassWeight = Literal["none", "inverse", "effective"]

BETA = 0.999


def class_weights(counts: Tensor, rule: ClassWeight) -> Tensor:
    """Weight of each class; the weights of classes that occur have mean 1, those of absent classes are 0.

    Args:
        counts: (C,) training samples per class.
        rule: ``none``: all 1. ``inverse``: proportional to 1/n. ``effective``: proportional to (1 - b)/(1 - b^n) with
            b = 0.999 (Cui et al., "Class-balanced loss based on effective number of samples", 2019).

    Returns:
        (C,) float32.
    """
    if rule == "none":
        return torch.ones(len(counts))
    present = counts > 0
    samples = counts.clamp(min=1).double()
    raw = 1 / samples if rule == "inverse" else (1 - BETA) / (1 - BETA**samples)
    raw = raw * present
    return (raw * present.sum() / raw.sum()).float()


def count_classes(dataset: Any, num_classes: int) -> Tensor:
    """Samples per class of a training set, without reading images; unlabelled samples (-1) are not counted.

    Args:
        dataset: has ``labels`` (with ``rows``, the ones it uses) or ``targets``, as torchvision's data sets.
        num_classes: C.

    Returns:
        (C,) int64.

    Raises:
        ValueError: if the data set does not tell its labels.
    """
    labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if labels is None:
        raise ValueError(
            f"class_weight: {type(dataset).__name__} has no 'labels' or 'targets' to count; set class_weight: none"
        )
    labels = torch.as_tensor(labels)
    rows = getattr(dataset, "rows", None)
    labels = labels if rows is None else labels[torch.as_tensor(rows)]
    return torch.bincount(labels[labels >= 0], minlength=num_classes)
