"""How segmenters are evaluated: at the size of the masks, by windows, at several scales, with scores that add up."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

from modules.segmentation.heads import resize_logits
from modules.segmentation.metrics import METRIC_NAMES, VOID, SegmentationScores, pixel_cross_entropy

Segmenter = Callable[[Tensor], Tensor]


class EvaluationScores(nn.Module):
    """Confusion counts and loss of one evaluation, over batches and processes.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.counts = SegmentationScores(num_classes)
        # A metric, so that processes are reduced together whatever each of them has seen.
        self.losses = MeanMetric()

    def update(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Count a batch and return its predictions.

        Args:
            logits: (B, C, H, W).
            masks: (B, H, W) int64 class indices, 255 where a pixel does not count.

        Returns:
            (B, H, W) int64.
        """
        predictions = logits.argmax(1)
        self.counts.update(predictions, masks)
        for one, mask in zip(logits, masks, strict=True):
            if (mask != VOID).any():
                self.losses.update(pixel_cross_entropy(one[None], mask[None]))
        return predictions

    def confusion(self) -> Tensor:
        """Counts (C, C) so far, row = label; to be called by all processes."""
        return self.counts.compute()["confusion"]

    def result(self) -> dict[str, Tensor]:
        """``miou``, ``aacc``, ``macc`` and ``loss`` of all processes, and start anew; empty without labelled pixels."""
        values, loss = self.counts.compute(), self.losses.compute()
        self.counts.reset()
        self.losses.reset()
        if not values["confusion"].any():
            return {}
        return {name: values[name] for name in METRIC_NAMES} | {"loss": loss}


def logits_at_mask_size(segmenter: Segmenter, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (b, C, H, W) with masks (b, H, W): the whole batch, or one by one where pictures differ in size.

    Args:
        segmenter: images (b, channels, h, w) -> logits of the same size.
        batch: with ``images`` and ``masks``.
    """
    for images, masks in groups_of_one_size(batch):
        yield resize_logits(segmenter(images).float(), masks.shape[1:]), masks


def groups_of_one_size(batch: Any) -> list[tuple[Tensor, Tensor]]:
    """Images (b, channels, h, w) with masks (b, H, W): the whole batch, or one by one where pictures differ in size."""
    images, masks = batch.images, batch.masks
    if isinstance(images, Tensor):
        return [(images, masks)]
    return [(image[None], mask[None]) for image, mask in zip(images, masks, strict=True)]


def multi_scale_logits(segmenter: Segmenter, images: Tensor, scales: Sequence[float], flip: bool = False) -> Tensor:
    """Mean of the class probabilities over scaled and mirrored copies of the images, as logits.

    Args:
        segmenter: images (B, channels, h, w) -> logits of the same size.
        images: (B, channels, H, W).
        scales: factors of the size.
        flip: take the mirrored images as well.

    Returns:
        (B, C, H, W): the segmenter's own for scale 1 without mirroring, otherwise logarithms of probabilities.
    """
    if tuple(scales) == (1.0,) and not flip:
        return segmenter(images)
    total: Tensor | None = None
    for scale in scales:
        size = [max(1, round(length * scale)) for length in images.shape[2:]]
        scaled = functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            logits = segmenter(scaled.flip(-1) if mirrored else scaled).float()
            logits = resize_logits(logits.flip(-1) if mirrored else logits, images.shape[2:])
            total = logits.softmax(1) if total is None else total + logits.softmax(1)
    # A class whose probability underflows at every scale has a finite logit, and a finite loss where it is right.
    return torch.log((total / (len(scales) * (1 + flip))).clamp(min=torch.finfo(total.dtype).tiny))
