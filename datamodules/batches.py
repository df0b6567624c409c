"""The typed batch that every image datamodule yields."""

from typing import NamedTuple

from torch import Tensor


class ImageBatch(NamedTuple):
    """Images with labels and the rows they come from.

    Args:
        views: One tensor per view, each (B, C, H, W) float32, normalised. One view in evaluation and classification.
        labels: (B,) int64 class indices, -1 where the label is unknown or not to be used.
        index: (B,) int64 row of each sample in its split.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor

    @property
    def images(self) -> Tensor:
        """The first view, (B, C, H, W)."""
        return self.views[0]


class SegmentationBatch(NamedTuple):
    """Images with a class for each pixel.

    Args:
        images: (B, C, h, w) float32, normalised.
        masks: (B, H, W) int64 class indices, 255 where a pixel is not to be learned from or counted. In training the
            size is that of the images; in evaluation it is that of the picture on disk, also where nothing is labelled.
            Images and masks of an evaluation batch whose pictures differ in size are lists of B tensors instead.
        index: (B,) int64 row of each sample in its split.
    """

    images: Tensor | list[Tensor]
    masks: Tensor | list[Tensor]
    index: Tensor


class DetectionBatch(NamedTuple):
    """Pictures with boxes around objects.

    Args:
        images: B tensors (C, h, w) float32 in [0, 1], of any sizes.
        targets: B dictionaries: ``boxes`` (n, 4) float32 xyxy in pixels of the image given to the model, ``labels``
            (n,) int64 from 1 (0 is the background), ``iscrowd`` (n,) int64, ``area`` (n,) float32 in pixels of the
            picture on disk (of the segment, where there is one), ``size`` (2,) int64 its height and width.
        index: (B,) int64 row of each sample in its split.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    index: Tensor
