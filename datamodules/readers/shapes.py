"""Hand-written digits pasted on photographs, made from what scikit-learn brings along."""

import colorsys
from collections.abc import Mapping

import numpy as np

from datamodules.readers.segmentation_samples import SegmentationFacts, SegmentationSamples

SIDE = 64
COUNTS = {"train": 320, "val": 80, "test": 80}
DIGITS_PER_PICTURE = 3
SIZES = (16, 29)
INK = 6  # of 16; grey values from here on belong to the digit
HUE_SPREAD = 0.04  # standard deviation, of a turn; the hues of neighbouring digits are a tenth of a turn apart
CLASS_NAMES = ("background", *(str(digit) for digit in range(10)))


class ShapesReader:
    """Makes pictures of 64 pixels with up to three digits of 16 to 28 pixels on photographs; class 0 is background.

    The hue hints at the digit, yet those of neighbours overlap and the photographs have all of them.

    No handwriting is in two parts, and the left, middle and right of the photographs belong to different parts.
    """

    facts = SegmentationFacts(CLASS_NAMES, image_size=SIDE, flip=False)

    def read(self) -> Mapping[str, SegmentationSamples]:
        """Return ``train``, ``val`` and ``test``, always the same."""
        from sklearn.datasets import load_digits, load_sample_images

        digits = load_digits()
        photographs = load_sample_images().images
        parts = {}
        for number, (part, count) in enumerate(COUNTS.items()):
            random = np.random.RandomState(number)
            rows = np.flatnonzero(np.arange(len(digits.images)) % 5 == number) if number else _rest(len(digits.images))
            places = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}[part]
            made = [
                _picture(random, _background(random, photographs, places), digits.images, digits.target, rows)
                for _ in range(count)
            ]
            parts[part] = SegmentationSamples(
                [f"{part}_{row:03d}" for row in range(count)], [image for image, _ in made], [mask for _, mask in made]
            )
        return parts


def _rest(count: int) -> np.ndarray:
    """Rows of the training part: those that neither of the others takes."""
    return np.flatnonzero(~np.isin(np.arange(count) % 5, (1, 2)))


def _background(
    random: np.random.RandomState, photographs: list[np.ndarray], places: tuple[float, float]
) -> np.ndarray:
    """Cut a square out of a photograph, between two shares of its width."""
    photograph = photographs[random.randint(len(photographs))]
    height, width = photograph.shape[:2]
    left = random.randint(int(places[0] * width), int(places[1] * width) - SIDE)
    top = random.randint(height - SIDE)
    return photograph[top : top + SIDE, left : left + SIDE].copy()


def _picture(
    random: np.random.RandomState, image: np.ndarray, digits: np.ndarray, labels: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paste digits on an image (64, 64, 3); returns it with its mask (64, 64)."""
    import cv2

    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for row in random.choice(rows, random.randint(1, DIGITS_PER_PICTURE + 1), replace=False):
        side = random.randint(*SIZES)
        ink = cv2.resize(digits[row].astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC) >= INK
        top, left = random.randint(0, SIDE - side + 1, size=2)
        place = (slice(top, top + side), slice(left, left + side))
        image[place][ink] = _colour(random, int(labels[row]))
        mask[place][ink] = labels[row] + 1
    return image, mask


def _colour(random: np.random.RandomState, digit: int) -> np.ndarray:
    """A colour (red, green, blue in 0..255) whose hue is near that of the digit."""
    hue = random.normal(digit / 10, HUE_SPREAD) % 1
    return np.rint(255 * np.array(colorsys.hsv_to_rgb(hue, random.uniform(0.7, 1), random.uniform(0.6, 1))))
