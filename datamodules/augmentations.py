"""Pixel pipelines that belong to the data set, each sample seeded by its own key."""

import hashlib
import os
import random
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from datamodules.readers.samples import IMAGENET_MEAN, IMAGENET_STD, Subject
from datamodules.timm_augmentation import TimmAugmentation

if TYPE_CHECKING:
    from albumentations import BasicTransform, Compose

Strength = Literal["pretrain", "finetune", "none", "randaugment", "padded_crop"]
Key = tuple[int, int, int, int, int]


class Recipe(NamedTuple):
    """Settings of the strengths ``randaugment`` and ``padded_crop``.

    Args:
        auto_augment: timm's name of a policy.
        re_prob: How often ``randaugment`` erases a random rectangle.
        crop_padding: Pixels that ``padded_crop`` adds on each side; None for a tenth of the side.
        mean: Per channel, of values in [0, 1]; what empty areas are filled with.
        std: Per channel, of values in [0, 1].
    """

    auto_augment: str = "rand-m9-mstd0.5-inc1"
    re_prob: float = 0.0
    crop_padding: int | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD


class Augmentation(Protocol):
    """Changes one image in a way that the key alone determines."""

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Return an image (S, S, C) uint8 for an image (H, W, C) uint8."""


class CentreView:
    """The view for evaluation: the whole image resized if it is square, otherwise a centre crop.

    Args:
        image_size: Side length of the result in pixels.
        whole: Resize the centre square to the size instead of cutting a square of that size out of the middle.
    """

    def __init__(self, image_size: int, whole: bool) -> None:
        self.image_size, self.whole = image_size, whole

    def __call__(self, image: np.ndarray, key: Key | None = None) -> np.ndarray:
        """Cut and resize; the key has no influence."""
        height, width = image.shape[:2]
        side = min(height, width) if self.whole else self.image_size
        top, left = (height - side) // 2, (width - side) // 2
        return resize(image[top : top + side, left : left + side], self.image_size)


class SeededPipeline:
    """An albumentations pipeline that draws everything from one generator, reset for every sample.

    ``Compose.set_random_seed`` would give each transform its own generator with the same seed, so that a horizontal
    and a vertical flip of probability 0.5 always happen together (and it takes ten times as long); here the transforms
    share their generators. The pipeline is built on first use in each process, so that it travels to workers cheaply.

    Args:
        build: Returns the transforms.
        options: Further arguments of ``albumentations.Compose``, such as ``bbox_params``.
    """

    def __init__(self, build: "Callable[[], Sequence[BasicTransform]]", options: dict[str, Any] | None = None) -> None:
        # Loaded here, as a first import in a forked loading process fails while W&B watches what is imported.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations  # noqa: F401

        self.build, self.options = build, dict(options or {})
        self._compose: Compose | None = None

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Apply the transforms with the randomness that belongs to ``key``."""
        return self.apply(key, image=image)["image"]

    def apply(self, key: Key, **targets: Any) -> dict[str, Any]:
        """Transform an image together with what belongs to it.

        Args:
            key: Determines all that is random.
            targets: ``image``, and ``mask``, ``bboxes`` or what else albumentations knows.

        Returns:
            The transformed targets by name.
        """
        compose = self._compose or self._prepare()
        digest = hashlib.blake2b(struct.pack("<5q", *key), digest_size=40).digest()
        number = int.from_bytes
        self._numpy_random.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": number(digest[:16], "little"), "inc": number(digest[16:32], "little") | 1},
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._python_random.seed(number(digest[32:], "little"))
        return compose(**targets)

    def __getstate__(self) -> dict:
        return {"build": self.build, "options": self.options}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def _prepare(self) -> "Compose":
        from albumentations import Compose

        compose = Compose(list(self.build()), is_check_shapes=False, **self.options)
        self._numpy_random = np.random.Generator(np.random.PCG64(0))
        self._python_random = random.Random(0)
        compose.set_random_state(self._numpy_random, self._python_random)
        self._compose = compose
        return compose


class PaddedCrop:
    """The view for evaluation, moved: reflected at its borders, and cut out at random.

    Args:
        image_size: Side length of the result in pixels.
        whole: See :class:`CentreView`.
        padding: Pixels added on each side.
        flip: Flip half of the images.
    """

    def __init__(self, image_size: int, whole: bool, padding: int, flip: bool) -> None:
        self.centre = CentreView(image_size, whole)
        self.shift = SeededPipeline(partial(_padded_crop, image_size, padding, flip))

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Apply the move that belongs to ``key``."""
        return self.shift(self.centre(image), key)


def augmentation(
    subject: Subject, strength: Strength, image_size: int, whole: bool, recipe: Recipe | None = None
) -> Augmentation:
    """Return the augmentation of training images.

    Args:
        subject: What the images show; digits are never flipped.
        strength: ``pretrain``, ``finetune``, ``randaugment`` (the recipe of ImageNet), ``padded_crop`` (that of CIFAR,
            for small images), or ``none`` for the view of evaluation.
        image_size: Side length of the result in pixels.
        whole: See :class:`CentreView`.
        recipe: See :class:`Recipe`.
    """
    recipe, flip = recipe or Recipe(), subject != "digits"
    if strength == "none":
        return CentreView(image_size, whole)
    if strength == "randaugment":
        return TimmAugmentation(image_size, recipe.auto_augment, recipe.re_prob, recipe.mean, recipe.std, flip)
    if strength == "padded_crop":
        padding = round(image_size / 10) if recipe.crop_padding is None else recipe.crop_padding
        return PaddedCrop(image_size, whole, padding, flip)
    return SeededPipeline(partial(transforms, subject, strength, image_size))


def transforms(subject: Subject, strength: Strength, image_size: int) -> "list[BasicTransform]":
    """Return the transforms for a kind of image.

    Digits are shifted and scaled only: a flipped or turned digit is another sign. Grey medical images keep their
    orientation (the heart is on one side, the diaphragm below) apart from a horizontal flip, and have no colour to
    change. Coloured medical images have no preferred orientation, and their colour is diagnostic, so it is varied but
    never removed. Photographs are flipped horizontally and lose their colour at times.

    Args:
        subject: What the images show.
        strength: ``pretrain`` or ``finetune`` (milder, as the label must stay readable).
        image_size: Side length of the result in pixels.
    """
    # Albumentations asks its server for updates when it is imported, unless it is told not to.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as alb
    import cv2

    pretrain = strength == "pretrain"
    if subject == "digits":
        scale, shift = (0.25, 0.15) if pretrain else (0.15, 0.1)
        shift_and_scale = alb.Affine(
            scale=(1 - scale, 1 + scale),
            translate_percent=(-shift, shift),
            keep_ratio=True,
            border_mode=cv2.BORDER_CONSTANT,
            fill=0,
            p=1.0,
        )
        return [alb.Resize(image_size, image_size), shift_and_scale]
    crop = alb.RandomResizedCrop(size=(image_size, image_size), scale=(0.4, 1.0) if pretrain else (0.7, 1.0))
    # All flips and quarter turns together are the eight symmetries of the square, drawn evenly in one step.
    orientation = alb.D4(p=1.0) if subject == "colour" else alb.HorizontalFlip(p=0.5)
    steps: list[BasicTransform] = [crop, orientation, _jitter(subject, pretrain)]
    if subject == "photographs" and pretrain:
        steps.append(alb.ToGray(p=0.2))
    if pretrain:
        steps.append(alb.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 1.5), p=0.1))
    return steps


def _padded_crop(image_size: int, padding: int, flip: bool) -> "list[BasicTransform]":
    import albumentations as alb
    import cv2

    steps: list[BasicTransform] = [
        alb.Pad(padding=padding, border_mode=cv2.BORDER_REFLECT_101),
        alb.RandomCrop(image_size, image_size),
    ]
    return [*steps, alb.HorizontalFlip(p=0.5)] if flip else steps


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resize a square image (H, H, C) to (side, side, C); averages over areas when it shrinks."""
    if image.shape[0] == side:
        return image
    import cv2

    shrinks = side < image.shape[0]
    resized = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return resized.reshape(side, side, image.shape[2])


def _jitter(subject: Subject, pretrain: bool) -> "BasicTransform":
    import albumentations as alb

    light = 0.4 if pretrain else 0.3
    saturation, hue = (0.2, 0.1) if pretrain else (0.3, 0.05)
    if subject == "grey":
        saturation, hue = 0.0, 0.0
    around_one = [(1 - amount, 1 + amount) for amount in (light, light, saturation)]
    return alb.ColorJitter(*around_one, hue=(-hue, hue), p=0.8)
