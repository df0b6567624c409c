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
