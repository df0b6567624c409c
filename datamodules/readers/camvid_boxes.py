"""Boxes around cars, pedestrians and bicyclists, made from the masks of CamVid."""

import numpy as np

from datamodules.readers.boxes import BoxSamples
from datamodules.readers.camvid import CamvidReader
from datamodules.readers.segmentation_samples import read_mask_values

CLASSES = {"Car": 8, "Pedestrian": 9, "Bicyclist": 10}
SMALLEST = 100


class CamVidBoxReader:
    """Objects of CamVid as connected components of its masks (480 x 360, SegNet's copy with three lists).

    A component of one class, neighbours over corners included, with more than ``min_pixels`` is an object. Objects of a
    class that touch in the picture are therefore one box, and one that something in front divides is several. The
    numbers are for trying a detector on real pictures, not to be compared with those of detection benchmarks.

    Args:
        root: folder with ``{train,val,test}.txt``, ``{train,val,test}/`` and ``{train,val,test}annot/``.
        min_pixels: components of at most so many pixels are no objects.

    Raises:
        FileNotFoundError: if the folder, a list, or a file that a list names is not there.
        ValueError: for a line of a list that does not name two files.
    """

    def __init__(self, root: str | None, min_pixels: int = SMALLEST) -> None:
        self.min_pixels = min_pixels
        self.frames = CamvidReader(root).read()

    @property
    def class_names(self) -> list[str]:
        """Name of each class, in the order of the labels."""
        return list(CLASSES)

    @property
    def category_ids(self) -> list[int]:
        """The labels themselves; CamVid has no ids of objects."""
        return list(range(1, len(CLASSES) + 1))

    def read(self, part: str) -> BoxSamples:
        """Images of a part in the order of its list; ids count from 1.

        Raises:
            ValueError: for a mask that cannot be read.
        """
        frames = self.frames[part]
        masks = [read_mask_values(path) for path in frames.masks]
        return BoxSamples.build(
            range(1, len(frames) + 1),
            [str(path) for path in frames.images],
            [mask.shape for mask in masks],
            [components(mask, self.min_pixels) for mask in masks],
        )


def components(mask: np.ndarray, min_pixels: int = SMALLEST) -> np.ndarray:
    """Objects of a mask.

    Args:
        mask: (H, W) class of each pixel.
        min_pixels: components of at most so many pixels are left out.

    Returns:
        (n, 7): x1, y1, x2, y2 in pixels, label from 1, iscrowd 0, area.
    """
    import cv2

    rows = [np.zeros((0, 7))]
    for label, value in enumerate(CLASSES.values(), start=1):
        _, _, statistics, _ = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8), connectivity=8)
        left, top, width, height, area = statistics[1:].T.astype(np.float64)  # the first is all that is not the class
        found = np.stack([left, top, left + width, top + height, np.full_like(area, label), 0 * area, area], axis=1)
        rows.append(found[area > min_pixels])
    return np.concatenate(rows)
