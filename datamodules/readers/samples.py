"""What a reader of a data set returns: cheap facts, and samples as pixels or as paths."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from pandas import DataFrame

Metric = Literal["acc", "balanced_acc", "kappa"]
Subject = Literal["digits", "photographs", "colour", "grey"]

COLUMNS = ("ids", "labels", "pixels", "paths", "groups")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Facts:
    """What is known of a data set from labels and headers, without reading a pixel.

    Args:
        class_names: Name of each class index; empty for a folder of unlabelled images.
        image_size: Natural side length in pixels.
        channels: Natural number of channels, 1 or 3.
        subject: What the images show; decides which augmentations keep the label.
        main_metric: The metric that the data set is judged by.
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
        crop_ratio: Share of the shorter side that evaluation keeps, 1 for images that come in their final size.
        in_memory: Whether the reader returns pixels instead of paths.
        crop_border: Whether the images have black borders that are better cut away.
    """

    class_names: tuple[str, ...]
    image_size: int
    channels: int
    subject: Subject
    main_metric: Metric = "acc"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_ratio: float = 1.0
    in_memory: bool = True
    crop_border: bool = False


@dataclass(frozen=True)
class Samples:
    """Rows of one part of a data set.

    Args:
        ids: Name of each row, unique within the data set.
        labels: (N,) int64 class indices, -1 for unlabelled.
        pixels: (N, H, W, C) uint8, or None if the rows are files.
        paths: Path of each row, or None if the rows are pixels.
        groups: Rows with the same non-empty name belong together (the same lesion); None if nothing is known.
    """

    ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | None = None
    paths: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "Samples":
        """Return the given rows (indices or a mask), in that order."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        return replace(self, **{name: None if column is None else column[rows] for name, column in columns.items()})

    @classmethod
    def concatenate(cls, parts: Sequence["Samples"]) -> "Samples":
        """Put parts of one data set back together."""

        def column(name: str) -> np.ndarray | None:
            columns = [getattr(part, name) for part in parts]
            return None if any(values is None for values in columns) else np.concatenate(columns)

        return cls(**{name: column(name) for name in COLUMNS})


class Reader(Protocol):
    """One data set layout on disk."""

    id_column: str
    """Name of the first column of a table of predictions."""

    published_split: bool
    """Whether the parts are those that the publisher fixed, in files whose checksum is known."""

    @property
    def facts(self) -> Facts:
        """Labels and headers only; cheap, and the same on every rank."""

    def prepare(self) -> None:
        """Download what is missing; called on one process, safe on several."""

    def read(self) -> dict[str, Samples]:
        """Return the parts ``train``, ``val``, ``test`` that the data set defines, or one part ``all``."""

    def predictions(self, ids: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """Put probabilities (N, classes) into the table that the data set's own evaluation reads."""


def class_columns(
    id_column: str, ids: Sequence[str], class_names: Sequence[str], probabilities: np.ndarray
) -> "DataFrame":
    """Build the plain table of predictions: the id, then one column of probabilities per class."""
    import pandas as pd

    table = pd.DataFrame(np.asarray(probabilities), columns=list(class_names))
    table.insert(0, id_column, list(ids), allow_duplicates=True)
    return table


def existing_folder(root: str | None, layout: str) -> Path:
    """Return ``root`` as a path to a folder that is there; see :func:`checked_folder`.

    Raises:
        ValueError: If no root is given.
    """
    if root is None:
        raise ValueError(f"layout '{layout}' reads a folder: set --data.root to it")
    return checked_folder(root, "root", f"the data set in layout '{layout}'")


def checked_folder(path: str, option: str, content: str) -> Path:
    """Return a path to a folder that is there.

    Args:
        path: As the user wrote it.
        option: Name of the option, for the message.
        content: What the folder should hold, for the message.

    Raises:
        FileNotFoundError: If it does not exist.
        NotADirectoryError: If it is a file.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise FileNotFoundError(
            f"--data.{option} '{path}' does not exist (looked for {folder.absolute()}); "
            f"set it to the folder of {content}"
        )
    if not folder.is_dir():
        raise NotADirectoryError(f"--data.{option} '{path}' is a file; set it to the folder of {content}")
    return folder


def check_distinct(source: Path, names: Sequence[str], remedy: str = "keep one line each") -> None:
    """Refuse pictures of one name.

    Args:
        source: The list or folder that holds them, for the message.
        names: Their names.
        remedy: What to do, for the message.

    Raises:
        ValueError: If a name occurs more than once; says how many do, and the first three.
    """
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        shown = ", ".join(repeated[:3]) + (", ..." if len(repeated) > 3 else "")
        raise ValueError(f"{source}: names {len(repeated)} picture(s) twice: {shown}; {remedy}")


def text_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file (with or without byte order mark) that are not blank, without outer blanks.

    Raises:
        ValueError: If it is no such text; names the file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
