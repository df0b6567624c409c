"""The training pictures of ImageNet recipes: timm's random crop, flip, RandAugment and random erasing."""

import hashlib
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

    from datamodules.augmentations import Key


class TimmAugmentation:
    """``timm.data.create_transform`` with its randomness bound to the sample's key.

    RandomResizedCrop with 8 to 100 % of the area and an interpolation drawn per picture, horizontal flip, then the
    operations of ``auto_augment``. There is no colour jitter: timm ignores that setting beside RandAugment.

    Args:
        image_size: Side length of the result in pixels.
        auto_augment: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1``.
        re_prob: How often a random rectangle is erased.
        mean: Per channel, of values in [0, 1]; what rotated and erased areas are filled with.
        std: Per channel, of values in [0, 1].
        flip: Flip half of the pictures.

    Raises:
        ValueError: If timm does not know the policy.
    """

    def __init__(
        self,
        image_size: int,
        auto_augment: str,
        re_prob: float,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool = True,
    ) -> None:
        from timm.data import create_transform

        mean, std = (tuple(values) * (3 // len(values)) for values in (mean, std))  # timm wants colours
        self.re_prob, self.mean, self.std = re_prob, np.array(mean, np.float32), np.array(std, np.float32)
        try:
            crop_and_flip, operations, self._normalise_and_erase = create_transform(
                image_size,
                is_training=True,
                auto_augment=auto_augment,
                interpolation="random",
                hflip=0.5 if flip else 0.0,
                color_jitter=None,
                mean=mean,
                std=std,
                re_prob=re_prob,
                separate=True,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"auto_augment is '{auto_augment}', which timm does not know ({error}); expected a policy such as "
                "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original-mstd0.5"
            ) from error
        self._steps = (crop_and_flip, operations)

    def __call__(self, image: np.ndarray, key: "Key") -> np.ndarray:
        """Return an image (S, S, C) uint8 for an image (H, W, C) uint8; grey ones pass through colour and back."""
        from PIL import Image

        channels = image.shape[2]
        picture = Image.fromarray(np.repeat(image, 3, axis=2) if channels == 1 else image)
        with seeded(key):
            for step in self._steps:
                picture = step(picture)
            pixels = self._erase(picture) if self.re_prob else np.asarray(picture)
        return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]

    def _erase(self, picture: "Image") -> np.ndarray:
        """Erase in normalised values, as timm does, and come back to bytes."""
        values = self._normalise_and_erase(picture).numpy().transpose(1, 2, 0)
        return np.rint(255 * (values * self.std + self.mean)).clip(0, 255).astype(np.uint8)


@contextmanager
def seeded(key: "Key") -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch from a key, and put them back afterwards."""
    digest = hashlib.blake2b(struct.pack("<5q", *key), digest_size=32).digest()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(np.frombuffer(digest[8:24], dtype="<u4"))
    torch.default_generator.manual_seed(int.from_bytes(digest[24:], "little") >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
