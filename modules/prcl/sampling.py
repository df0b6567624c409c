"""Which pixels are anchors and which are their negatives: drawn for all classes at once."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClassPools(NamedTuple):
    """Pixels sorted by class.

    Args:
        rows: (M,) int64 rows of the pixels, those of class 0 first.
        start: (C,) int64 where each class begins in ``rows``.
        count: (C,) int64 pixels of each class.
    """

    rows: Tensor
    start: Tensor
    count: Tensor

    def draw(self, classes: Tensor, uniform: Tensor) -> Tensor:
        """Rows of pixels of the given classes, each of which has some.

        Args:
            classes: int64 class of each draw.
            uniform: same shape, random numbers in [0, 1).
        """
        # Even the largest float32 below 1 times a count below 2^24 is rounded to less than the count.
        place = (uniform * self.count[classes]).long()
        return self.rows[self.start[classes] + place]


def class_pools(labels: Tensor, chosen: Tensor, num_classes: int) -> ClassPools:
    """Sort the chosen pixels by class.

    Args:
        labels: (N,) int64 classes; where ``chosen`` is false they may be anything.
        chosen: (N,) bool.
        num_classes: C.
    """
    rows = chosen.nonzero()[:, 0]
    classes = labels[rows]
    count = torch.bincount(classes, minlength=num_classes)
    return ClassPools(rows[classes.argsort(stable=True)], count.cumsum(0) - count, count)


def draw_negatives(
    pools: ClassPools,
    anchor_classes: Tensor,
    class_scores: Tensor,
    anchors: int,
    negatives: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw negatives, first their classes by similarity to the anchor's class, then pixels uniformly.

    Args:
        pools: pixels to draw from; at least two classes have some.
        anchor_classes: (P,) int64 classes that have anchors.
        class_scores: (P, C) logits of drawing a class for an anchor of each of them; the own class and classes without
            pixels are left out here.
        anchors: Q anchors of each class.
        negatives: K negatives of each anchor.
        generator: source of the random numbers.

    Returns:
        (P, Q, K) int64 rows of pixels.
    """
    possible = (pools.count > 0).expand(len(anchor_classes), -1).scatter(1, anchor_classes[:, None], False)
    # A network that has diverged shall be stopped by its loss, with a name and the batch, and not by the draw.
    shares = class_scores.float().nan_to_num().masked_fill(~possible, -torch.inf).softmax(1)
    classes = torch.multinomial(shares, anchors * negatives, replacement=True, generator=generator)
    uniform = torch.rand(classes.shape, device=classes.device, generator=generator)
    return pools.draw(classes, uniform).view(-1, anchors, negatives)


def draw_anchors(pools: ClassPools, classes: Tensor, anchors: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw Q anchors of each given class with replacement: (P, Q) int64 rows of pixels.

    Args:
        pools: pixels that may be anchors.
        classes: (P,) int64, each with some.
        anchors: Q.
        generator: source of the random numbers.
    """
    uniform = torch.rand(len(classes), anchors, device=classes.device, generator=generator)
    return pools.draw(classes[:, None].expand(-1, anchors), uniform)
