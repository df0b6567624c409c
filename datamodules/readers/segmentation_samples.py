"""What a reader of pictures with masks returns, and how a mask file becomes class indices."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from datamodules.image_files import UnreadableImageError, list_images, to_mode
from datamodules.readers.samples import IMAGENET_MEAN, IMAGENET_STD

VOID = 255
MAX_CLASSES = 255


@dataclass(frozen=True)
class SegmentationFacts:
    """What is known of a data set without reading a picture.

    Args:
        class_names: Name of each class index.
        image_size: Side in pixels of the crops that the data set is usually trained with.
        palette: Colour (red, green, blue in 0..255) of each class; None for made-up ones.
        first_value: Value of class 0 in the mask files; the others follow.
        class_values: Value of each class in the mask files, where they do not follow one another; wins over
            ``first_value``.
        void_values: Values in the mask files that stand for no class; 255 always does.
        flip: Whether a mirrored picture shows the same classes.
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
    """

    class_names: tuple[str, ...]
    image_size: int
    palette: tuple[tuple[int, int, int], ...] | None = None
    first_value: int = 0
    class_values: tuple[int, ...] | None = None
    void_values: tuple[int, ...] = ()
    flip: bool = True
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def class_indices(self, values: np.ndarray, source: str) -> np.ndarray:
        """Translate the values of a mask file.

        Args:
            values: (H, W) integers as stored.
            source: The file, for the message.

        Returns:
            (H, W) uint8 class indices, 255 for void.

        Raises:
            ValueError: For a value that stands for nothing; names the file, the value and the allowed ones.
        """
        if values.dtype != np.uint8:
            values = values.astype(np.int64)
        last = len(self._index_of_value) - 1
        indices = self._index_of_value[values if values.dtype == np.uint8 else values.clip(0, last)]
        wrong = (indices < 0) | (values > last) | (values < 0)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"{source}: pixel (row {row}, column {column}) has the value {values[row, column]}, expected "
                f"{_ranges(self._values)} for a class or {_ranges({*self.void_values, VOID})} for void"
            )
        return indices.astype(np.uint8)

    def file_values(self, mask: np.ndarray) -> np.ndarray:
        """Translate class indices (H, W) back into uint8 values of a mask file; void stays 255."""
        value_of_index = np.full(VOID + 1, VOID, dtype=np.uint8)
        value_of_index[: len(self._values)] = self._values
        return value_of_index[mask]

    @property
    def _values(self) -> Sequence[int]:
        """Value of each class."""
        return self.class_values or range(self.first_value, self.first_value + len(self.class_names))

    @cached_property
    def _index_of_value(self) -> np.ndarray:
        """Class index of each value from 0 on, 255 for void, -1 for a value that stands for nothing."""
        indices = np.full(max(VOID, *self._values, *self.void_values) + 1, -1, dtype=np.int16)
        indices[[*self.void_values, VOID]] = VOID
        indices[list(self._values)] = np.arange(len(self._values))
        return indices


@dataclass(frozen=True)
class SegmentationSamples:
    """Rows of one part of a data set.

    Args:
        ids: Name of each row, unique within the part.
        images: A path, or (H, W, 3) uint8, for each row.
        masks: A path, or (H, W) uint8 values as in a file, or None for a picture without labels, for each row; None if
            nothing is labelled.
    """

    ids: Sequence[str]
    images: Sequence[Path | np.ndarray]
    masks: Sequence[Path | np.ndarray | None] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | np.ndarray) -> "SegmentationSamples":
        """Return the given rows, in that order."""

        def column(values: Sequence) -> list:
            return [values[row] for row in rows]

        masks = None if self.masks is None else column(self.masks)
        return SegmentationSamples(column(self.ids), column(self.images), masks)

    @staticmethod
    def join(parts: "Sequence[SegmentationSamples]") -> "SegmentationSamples":
        """Return the rows of all parts, one part after the other."""
        masks = [mask for part in parts for mask in part.masks or [None] * len(part)]
        ids, images = ([value for part in parts for value in getattr(part, name)] for name in ("ids", "images"))
        return SegmentationSamples(ids, images, masks)


class SegmentationReader(Protocol):
    """One layout of pictures with masks."""

    @property
    def facts(self) -> SegmentationFacts:
        """Names and numbers; cheap, and the same on every rank."""

    def read(self) -> Mapping[str, SegmentationSamples]:
        """Return the parts ``train``, ``val``, ``test`` that the data set defines, or one part ``all``.

        Pictures without a mask that lists of other people may name are a part ``unlabeled``.
        """


def paired_masks(images: Sequence[Path], image_folder: Path, mask_folder: Path) -> list[Path]:
    """Return the mask of each picture: the png file of the same name below another folder.

    The suffix may have any case, as that of a picture; ``.png`` wins over others.

    Raises:
        FileNotFoundError: If any is missing; says how many, the first three and the folder.
    """
    names = [image.relative_to(image_folder).with_suffix(".png") for image in images]
    found = {  # the files are sorted, so .png comes after .PNG and stays
        mask.relative_to(mask_folder).with_suffix(".png"): mask
        for mask in list_images(mask_folder)
        if mask.suffix.lower() == ".png" and mask.is_file()
    }
    if missing := [str(mask_folder / name) for name in names if name not in found]:
        raise missing_masks(mask_folder, missing, len(names))
    return [found[name] for name in names]


def missing_masks(folder: Path, missing: Sequence[str], total: int) -> FileNotFoundError:
    """Build the error for pictures without a mask."""
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return FileNotFoundError(
        f"{len(missing)} of {total} pictures have no mask: {shown} is missing (searched {folder}); add the masks or "
        "take the pictures away"
    )


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """As many colours (red, green, blue), each far from the others of low index, and none black.

    The bits of an index, three at a time from the lowest, are the bits of the colours from the highest.
    """
    colours = []
    for index in range(1, count + 1):
        parts = [0, 0, 0]
        for bit in range(24):
            parts[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours.append(tuple(parts))
    return colours


def read_picture(picture: Path | np.ndarray, upright: bool = False) -> np.ndarray:
    """Decode a picture to (H, W, 3) uint8; one of more than 8 bits is stretched from its minimum and maximum.

    Args:
        picture: A file, or pixels.
        upright: Turn it as its file says (EXIF), as viewers do. Masks of data sets fit the pixels as they are stored.

    Raises:
        UnreadableImageError: If the file cannot be decoded.
    """
    if isinstance(picture, np.ndarray):
        return picture
    return _decode(picture, "RGB", upright)


def read_mask_values(mask: Path | np.ndarray) -> np.ndarray:
    """Decode a mask to (H, W) integers as stored; a palette picture gives its indices.

    Raises:
        UnreadableImageError: If the file cannot be decoded.
        ValueError: If it has colours instead of one value per pixel.
    """
    return mask if isinstance(mask, np.ndarray) else _decode(mask, None)


def _decode(path: Path, mode: str | None, upright: bool = False) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            if upright:
                ImageOps.exif_transpose(opened, in_place=True)
            pixels = np.array(to_mode(opened, mode) if mode else opened)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path}: cannot be decoded ({error}); replace the file") from error
    if mode is None and pixels.ndim != 2:
        raise ValueError(
            f"{path}: has {pixels.shape[2]} channels, expected one with a class index per pixel; convert colours to "
            "indices first"
        )
    return pixels


def _ranges(values: Iterable[int]) -> str:
    """Name integers in order, each run of neighbours as ``first..last``."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
