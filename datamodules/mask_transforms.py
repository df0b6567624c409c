"""Transforms of pictures with masks, for albumentations; imported only where a pipeline is built."""

import os
from collections.abc import Sequence
from typing import Any

# Albumentations asks its server for updates when it is imported, unless it is told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as alb
import cv2
import numpy as np

from datamodules.readers.segmentation_samples import VOID
from datamodules.segmentation_dataset import scaled_size

CROP_TRIES = 10


class RandomScale(alb.DualTransform):
    """Resize to a random multiple of a base size, keeping the ratio of the sides.

    Args:
        shorter_side: The base size, see :func:`datamodules.segmentation_dataset.scaled_size`; None for the picture's.
        scale_range: Smallest and largest multiple.
    """

    def __init__(self, shorter_side: int | None, scale_range: Sequence[float]) -> None:
        super().__init__(p=1.0)
        self.shorter_side, self.scale_range = shorter_side, tuple(scale_range)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the size, as (width, height)."""
        scale = self.py_random.uniform(*self.scale_range)
        height, width = scaled_size(data["image"].shape[:2], self.shorter_side, scale)
        return {"size": (width, height)}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize a picture."""
        return cv2.resize(img, size, interpolation=cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize a mask; classes are not mixed."""
        return cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)


class MixedClassCrop(alb.DualTransform):
    """Crop at a random place, up to ten times until no class covers too much of the labelled pixels.

    A picture that is smaller than the crop stays as it is along that side.

    Args:
        side: Side of the crop in pixels.
        max_ratio: Largest share of one class; 1 takes the first place.
    """

    def __init__(self, side: int, max_ratio: float) -> None:
        super().__init__(p=1.0)
        self.side, self.max_ratio = side, max_ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the place, as slices of rows and columns."""
        place = self._draw(data["image"].shape[:2])
        for _ in range(CROP_TRIES - 1):
            if self.max_ratio >= 1 or self._mixed(data["mask"][place]):
                break
            place = self._draw(data["image"].shape[:2])
        return {"place": place}

    def apply(self, img: np.ndarray, place: tuple[slice, slice], **params: Any) -> np.ndarray:
        """Cut a picture or a mask."""
        return img[place]

    def _draw(self, size: tuple[int, int]) -> tuple[slice, slice]:
        starts = (self.py_random.randint(0, max(length - self.side, 0)) for length in size)
        return tuple(slice(start, start + self.side) for start in starts)

    def _mixed(self, mask: np.ndarray) -> bool:
        counts = np.bincount(mask.reshape(-1), minlength=VOID + 1)[:VOID]
        return np.count_nonzero(counts) > 1 and counts.max() < self.max_ratio * counts.sum()


class ReflectPad(alb.DualTransform):
    """Pad right and bottom up to a size: the picture mirrors itself, again and again if it is small, the mask is void.

    Args:
        size: Height and width that the result has at least.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(p=1.0)
        self.size = tuple(size)

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Pad a picture; its last row and column are not doubled."""
        return cv2.copyMakeBorder(img, 0, *self._below_and_right(img), cv2.BORDER_REFLECT_101)

    def apply_to_mask(self, mask: np.ndarray, **params: Any) -> np.ndarray:
        """Pad a mask."""
        return cv2.copyMakeBorder(mask, 0, *self._below_and_right(mask), cv2.BORDER_CONSTANT, value=VOID)

    def _below_and_right(self, pixels: np.ndarray) -> tuple[int, int, int]:
        below, right = (max(0, want - have) for want, have in zip(self.size, pixels.shape[:2], strict=True))
        return below, 0, right


class PhotometricDistortion(alb.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each with probability one half; contrast before or after the others.

    Args:
        brightness: Largest amount that is added, of 255.
        contrast: Smallest and largest factor.
        saturation: Smallest and largest factor.
        hue: Largest turn in degrees of 360.
    """

    def __init__(
        self,
        brightness: float = 32,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: float = 36,
    ) -> None:
        super().__init__(p=1.0)
        self.brightness, self.hue = brightness, hue
        self.contrast, self.saturation = tuple(contrast), tuple(saturation)

    def get_params(self) -> dict[str, Any]:
        """Draw what is done and how much; None leaves it out."""
        draw = self.py_random
        ranges = {
            "brightness": (-self.brightness, self.brightness),
            "contrast": self.contrast,
            "saturation": self.saturation,
            "hue": (-self.hue, self.hue),
        }
        chosen = {name: draw.uniform(*limits) if draw.random() < 0.5 else None for name, limits in ranges.items()}
        return chosen | {"contrast_first": draw.random() < 0.5}

    def apply(
        self,
        img: np.ndarray,
        brightness: float | None,
        contrast: float | None,
        saturation: float | None,
        hue: float | None,
        contrast_first: bool,
        **params: Any,
    ) -> np.ndarray:
        """Distort a picture (H, W, 3) uint8."""
        if brightness is not None:
            img = cv2.convertScaleAbs(np.maximum(img.astype(np.float32) + brightness, 0))
        if contrast is not None and contrast_first:
            img = cv2.convertScaleAbs(img, alpha=contrast)
        if saturation is not None or hue is not None:
            img = _turn_colours(img, 1.0 if saturation is None else saturation, hue or 0.0)
        if contrast is not None and not contrast_first:
            img = cv2.convertScaleAbs(img, alpha=contrast)
        return img


def _turn_colours(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    colours = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    colours[..., 0] = (colours[..., 0] + hue) % 360
    colours[..., 1] = np.clip(colours[..., 1] * saturation, 0, 1)
    return np.rint(255 * cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)).astype(np.uint8)


def view_transforms(
    size: tuple[int, int], shorter_side: int | None, scale_range: Sequence[float], photometric: bool, flip: bool
) -> list[alb.BasicTransform]:
    """Return what makes a view for semi-supervised training: scale, pad, crop, and if asked for, colours and flip.

    Colours are those of PRCL: with probability 0.8 brightness, contrast, saturation and hue in random order, with
    probability 0.5 a Gaussian blur (specification, section 7).

    Args:
        size: Height and width of the view in pixels.
        shorter_side: See :class:`RandomScale`.
        scale_range: See :class:`RandomScale`.
        photometric: Change colours and sharpness.
        flip: Mirror left and right with probability one half.
    """
    steps: list[alb.BasicTransform] = [
        RandomScale(shorter_side, scale_range),
        ReflectPad(size),
        alb.RandomCrop(*size),
    ]
    if photometric:
        factors = (0.75, 1.25)
        steps.append(alb.ColorJitter(factors, factors, factors, hue=(-0.25, 0.25), p=0.8))
        steps.append(alb.GaussianBlur(blur_limit=0, sigma_limit=(0.15, 1.15), p=0.5))
    if flip:
        steps.append(alb.HorizontalFlip(p=0.5))
    return steps


def training_transforms(
    image_size: int,
    shorter_side: int | None,
    scale_range: Sequence[float],
    max_class_ratio: float,
    flip: bool,
    photometric: bool,
    mean: Sequence[float],
) -> list[alb.BasicTransform]:
    """Return scale, crop, flip, colours, and padding with the mean and with void.

    Args:
        image_size: Side of the result in pixels.
        shorter_side: See :class:`RandomScale`.
        scale_range: See :class:`RandomScale`.
        max_class_ratio: See :class:`MixedClassCrop`.
        flip: Mirror left and right with probability one half.
        photometric: See :class:`PhotometricDistortion`.
        mean: Of the pictures, per channel, of values in [0, 1]; the colour of the padding.
    """
    steps: list[alb.BasicTransform] = [
        RandomScale(shorter_side, scale_range),
        MixedClassCrop(image_size, max_class_ratio),
    ]
    if flip:
        steps.append(alb.HorizontalFlip(p=0.5))
    if photometric:
        steps.append(PhotometricDistortion())
    padding = alb.PadIfNeeded(
        image_size,
        image_size,
        position="top_left",
        border_mode=cv2.BORDER_CONSTANT,
        fill=[round(255 * value) for value in mean],
        fill_mask=VOID,
    )
    return [*steps, padding]
