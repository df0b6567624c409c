"""What a reader of a detection data set returns: images with boxes, in flat arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

OUTSIDE_TOLERANCE = 2.0  # pixels; COCO's boxes are rounded and may end a little outside


@dataclass(frozen=True)
class BoxSamples:
    """Images of one part of a data set and the objects in them.

    Args:
        ids: (N,) int64 id of each image, as in files of results.
        paths: (N,) path of each image.
        sizes: (N, 2) int64 height and width.
        bounds: (N + 1,) int64: image i has the objects ``bounds[i]`` to ``bounds[i + 1]``.
        boxes: (M, 4) float32 xyxy in pixels.
        labels: (M,) int64 from 1.
        iscrowd: (M,) int64; 1 for a region that detections may lie in without counting.
        area: (M,) float32 in square pixels.
    """

    ids: np.ndarray
    paths: np.ndarray
    sizes: np.ndarray
    bounds: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray
    area: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def objects(self, row: int) -> slice:
        """Where the objects of an image are."""
        return slice(int(self.bounds[row]), int(self.bounds[row + 1]))

    def trainable(self) -> np.ndarray:
        """(K,) rows of the images with at least one object that is no crowd region."""
        single = np.concatenate([[0], np.cumsum(self.iscrowd == 0)])
        return np.flatnonzero(np.diff(single[self.bounds]))

    @classmethod
    def build(
        cls,
        ids: Sequence[int],
        paths: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        objects: Sequence[np.ndarray],
    ) -> "BoxSamples":
        """Put images together.

        Args:
            ids: of the images.
            paths: of the images.
            sizes: height and width of the images.
            objects: for each image (n, 7): x1, y1, x2, y2, label, iscrowd, area.
        """
        table = np.concatenate([np.zeros((0, 7)), *objects])
        return cls(
            ids=np.asarray(ids, dtype=np.int64),
            paths=np.asarray(paths, dtype=np.str_),
            sizes=np.asarray(sizes, dtype=np.int64).reshape(-1, 2),
            bounds=np.cumsum([0, *(len(rows) for rows in objects)]),
            boxes=table[:, :4].astype(np.float32),
            labels=table[:, 4].astype(np.int64),
            iscrowd=table[:, 5].astype(np.int64),
            area=table[:, 6].astype(np.float32),
        )


class BoxReader(Protocol):
    """One layout of a detection data set on disk."""

    @property
    def class_names(self) -> list[str]:
        """Name of each class, in the order of the labels; cheap, and the same on every rank."""

    @property
    def category_ids(self) -> list[int]:
        """Id of each class in files of results, in the order of the labels."""

    def read(self, part: str) -> BoxSamples:
        """Images and objects of ``train``, ``val`` or ``test``.

        Raises:
            FileNotFoundError: if the part is not there.
        """
