"""Augmentations of an image with its boxes, each sample seeded by its own key."""

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from datamodules.augmentations import Key

if TYPE_CHECKING:
    from torchvision.transforms.v2 import Transform

Resize = Literal["fixed", "shorter_side"]
LONGEST_PER_SHORTER = 1333 / 800
LARGEST_CANVAS = 4.0


class BoxPipeline:
    """Changes an image together with its boxes in a way that the key alone determines.

    ``fixed`` squeezes images into a square; in training, colours are distorted, half of the images shrink to 1/4 at
    least on a larger canvas, and crops of 0.3 of a side at least are taken that overlap with some object by 0.1 to 0.9.
    ``shorter_side`` keeps the ratio of the sides, the longer one limited to 1.67 times the shorter. Both flip half of
    the images in training. The pipeline is built on first use in each process, so that it travels to workers cheaply.

    Args:
        resize: ``fixed`` or ``shorter_side``.
        size: side of the square, or shorter side, in pixels.
        train: augment; otherwise resize only.
        fill: colour of the canvas, values in [0, 1].
        zoom_out: largest side of the canvas, in sides of the image; 1 for none.
    """

    def __init__(
        self,
        resize: Resize,
        size: int,
        train: bool,
        fill: tuple[float, ...] = (0.0, 0.0, 0.0),
        zoom_out: float = LARGEST_CANVAS,
    ) -> None:
        self.resize, self.size, self.train, self.fill, self.zoom_out = resize, size, train, fill, zoom_out
        self._transform: Transform | None = None

    def __call__(self, image: Tensor, boxes: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor]:
        """Transform one sample.

        Args:
            image: (3, H, W) uint8.
            boxes: (n, 4) float32 xyxy in pixels.
            key: determines all that is random.

        Returns:
            Image (3, h, w) float32 in [0, 1], the boxes that are left (m, 4), and which of the boxes they are (m,).
        """
        from torchvision import tv_tensors

        transform = self._transform or self._prepare()
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(boxes.view(-1, 4), format="XYXY", canvas_size=tuple(image.shape[-2:])),
            "labels": torch.arange(len(boxes)),
        }
        with seeded(key):
            sample = transform(sample)
        return sample["image"].as_subclass(Tensor), sample["boxes"].as_subclass(Tensor), sample["labels"]

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in ("resize", "size", "train", "fill", "zoom_out")}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def _prepare(self) -> "Transform":
        from torchvision.transforms import v2

        steps: list[Transform] = []
        if self.train and self.resize == "fixed":
            fill = [round(255 * value) for value in self.fill]
            steps += [
                v2.RandomPhotometricDistort(p=0.5),
                v2.RandomZoomOut(fill=fill, side_range=(1.0, self.zoom_out), p=0.5),
                v2.RandomIoUCrop(min_scale=0.3, sampler_options=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
                v2.SanitizeBoundingBoxes(min_size=1),  # a crop may leave nothing of a box
            ]
        if self.resize == "fixed":
            steps.append(v2.Resize((self.size, self.size), antialias=True))
        else:
            steps.append(v2.Resize(self.size, max_size=round(self.size * LONGEST_PER_SHORTER), antialias=True))
        if self.train:
            steps.append(v2.RandomHorizontalFlip(0.5))
        self._transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
        return self._transform


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """Let torch (on the CPU) and Python draw numbers that belong to a key, and go on as before afterwards."""
    digest = hashlib.blake2b(struct.pack("<5q", *key), digest_size=16).digest()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    # Not torch.manual_seed, which would seed the generators of accelerators too.
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
    random.seed(int.from_bytes(digest[8:], "little"))
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
