"""Mosaics of hand-written digits, made from what scikit-learn brings along."""

from collections.abc import Mapping

import numpy as np

from datamodules.readers.segmentation_samples import SegmentationFacts, SegmentationSamples

TILE = 8  # pixels of a digit's side, as scikit-learn has them
TILES = 8  # along a side of a picture
SIDE = TILE * TILES
REGIONS = 4
COUNTS = {"train": 320, "val": 80, "test": 80}
INK = 16  # the largest value of a digit's pixel
CLASSES = 5  # the digits 0 to 4


class MosaicReader:
    """Makes pictures of 64 pixels, 8 x 8 tiles, in four regions; each is filled with samples of one digit.

    The regions are the tiles nearest to one of four random points (a Voronoi diagram), the class of a pixel is the
    digit (0 to 4) of its region, and there is no background. The ink is light and the paper dark, in random colours in
    each picture. No handwriting is in two parts.
    """

    facts = SegmentationFacts(tuple(str(digit) for digit in range(CLASSES)), image_size=SIDE, flip=False)

    def read(self) -> Mapping[str, SegmentationSamples]:
        """Return ``train``, ``val`` and ``test``, always the same."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        parts = {}
        for number, (part, count) in enumerate(COUNTS.items()):
            random = np.random.RandomState(number)
            fifth = np.arange(len(digits.images)) % 5
            rows = np.flatnonzero(fifth == number if number else (fifth != 1) & (fifth != 2))
            written = [digits.images[rows[digits.target[rows] == digit]] for digit in range(CLASSES)]
            made = [_picture(random, written) for _ in range(count)]
            parts[part] = SegmentationSamples(
                [f"{part}_{row:03d}" for row in range(count)], [image for image, _ in made], [mask for _, mask in made]
            )
        return parts


def _picture(random: np.random.RandomState, written: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """An image (64, 64, 3) uint8 with its mask (64, 64) uint8."""
    centres = random.uniform(0, TILES, (REGIONS, 2))
    places = np.stack(np.meshgrid(*[np.arange(TILES) + 0.5] * 2, indexing="ij"), axis=-1)
    region = np.square(places[:, :, None] - centres).sum(-1).argmin(-1)
    classes = random.choice(CLASSES, REGIONS, replace=False)[region]
    tiles = np.stack([[written[digit][random.randint(len(written[digit]))] for digit in row] for row in classes])
    ink = tiles.transpose(0, 2, 1, 3).reshape(SIDE, SIDE, 1) / INK
    paper, colour = random.uniform(0, 90, 3), random.uniform(165, 255, 3)
    image = np.rint(paper + ink * (colour - paper)).astype(np.uint8)
    return image, classes.repeat(TILE, 0).repeat(TILE, 1).astype(np.uint8)
