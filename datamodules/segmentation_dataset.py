"""Pictures with masks by row, and how they become batches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.augmentations import SeededPipeline
from datamodules.batches import SegmentationBatch
from datamodules.readers.segmentation_samples import (
    VOID,
    SegmentationFacts,
    SegmentationSamples,
    read_mask_values,
    read_picture,
)
from datamodules.sampling import SampleKey

LONGEST = 4  # the longer side is at most so many times the shorter side that is asked for


class SegmentationSample(NamedTuple):
    """One picture with its mask.

    Args:
        image: (h, w, 3) uint8.
        mask: (H, W) uint8 class indices, 255 for void.
        row: Row in the split.
    """

    image: np.ndarray
    mask: np.ndarray
    row: int


def scaled_size(size: tuple[int, int], shorter_side: int | None, scale: float = 1.0) -> tuple[int, int]:
    """Size of a picture that is resized with the ratio of its sides kept.

    Args:
        size: Height and width of the picture.
        shorter_side: Length in pixels that its shorter side gets, unless the longer one would get more than four times
            that, which it then gets; None for the picture's own size.
        scale: Factor on top.

    Returns:
        Height and width.
    """
    if shorter_side is not None:
        scale *= min(shorter_side / min(size), LONGEST * shorter_side / max(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


class SegmentationDataset(Dataset[SegmentationSample]):
    """Rows under an augmentation that depends on the seed, the epoch and the row alone, or resized for evaluation.

    Args:
        samples: The rows.
        facts: How masks are to be read.
        pipeline: Changes picture and mask alike; None for evaluation, where the mask stays as it is.
        shorter_side: In evaluation, see :func:`scaled_size`.
        seed: First part of the key.
        view: Last part of the key; data sets that are trained on side by side differ in it.
    """

    def __init__(
        self,
        samples: SegmentationSamples,
        facts: SegmentationFacts,
        pipeline: SeededPipeline | None = None,
        shorter_side: int | None = None,
        seed: int = 0,
        view: int = 0,
    ) -> None:
        self.samples, self.facts = samples, facts
        self.pipeline, self.shorter_side = pipeline, shorter_side
        self.seed, self.view = seed, view

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey | int) -> SegmentationSample:
        """Return a sample; an int stands for that row in epoch 0."""
        epoch, pass_, row = (0, 0, int(key)) if isinstance(key, int | np.integer) else key
        image, mask = self.read(row)
        if self.pipeline is not None:
            changed = self.pipeline.apply((self.seed, epoch, pass_, row, self.view), image=image, mask=mask)
            return SegmentationSample(changed["image"], changed["mask"], row)
        return SegmentationSample(self._resize(image), mask, row)

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return picture (H, W, 3) uint8 and mask (H, W) uint8 class indices, both as on disk.

        A picture without labels has a mask of void, and is turned as a viewer would turn it.

        Raises:
            UnreadableImageError: If a file cannot be decoded.
            ValueError: If the mask has another size than the picture, or a value that stands for nothing.
        """
        mask = None if self.samples.masks is None else self.samples.masks[row]
        image = read_picture(self.samples.images[row], upright=mask is None)
        if mask is None:
            return image, np.full(image.shape[:2], VOID, dtype=np.uint8)
        values = read_mask_values(mask)
        source = f"mask of {self.samples.ids[row]}" if isinstance(mask, np.ndarray) else str(mask)
        if values.shape != image.shape[:2]:
            have, want = (f"{width}x{height}" for height, width in (values.shape, image.shape[:2]))
            turned = values.shape == image.shape[1::-1]
            raise ValueError(
                f"{source}: the mask is {have} pixels, but its picture {want}; they must be of one size"
                + (", and a mask fits the pixels as stored, not as a viewer turns them (EXIF)" if turned else "")
            )
        return image, self.facts.class_indices(values, source)

    def _resize(self, image: np.ndarray) -> np.ndarray:
        size = scaled_size(image.shape[:2], self.shorter_side)
        if size == image.shape[:2]:
            return image
        import cv2

        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


class SegmentationBatchBuilder:
    """Turns samples into a ``SegmentationBatch``; pictures or masks of unequal size are left in a list.

    Args:
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = 255 * torch.tensor(mean).view(-1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(-1, 1, 1))

    def __call__(self, samples: list[SegmentationSample]) -> SegmentationBatch:
        """Move channels first, normalise, stack."""
        images = [self._normalise(sample.image) for sample in samples]
        masks = [torch.from_numpy(np.ascontiguousarray(sample.mask)).long() for sample in samples]
        index = torch.tensor([sample.row for sample in samples], dtype=torch.int64)
        if len({(image.shape, mask.shape) for image, mask in zip(images, masks, strict=True)}) > 1:
            return SegmentationBatch(images, masks, index)
        return SegmentationBatch(torch.stack(images), torch.stack(masks), index)

    def _normalise(self, image: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        return (pixels.to(torch.float32, memory_format=torch.contiguous_format) - self.mean).mul_(self.scale)
