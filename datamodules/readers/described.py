"""Readers that stand for a data set which is not at hand: what a trained model has to know of it, and no samples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from datamodules.readers.aptos2019 import Aptos2019Reader
from datamodules.readers.boxes import BoxReader
from datamodules.readers.isic2019 import Isic2019Reader
from datamodules.readers.samples import Facts, Reader, class_columns
from datamodules.readers.segmentation_samples import SegmentationFacts, SegmentationReader

if TYPE_CHECKING:
    from pandas import DataFrame

TABLES = {reader.id_column: reader.table for reader in (Aptos2019Reader, Isic2019Reader)}  # others have a plain one
AnyFacts = TypeVar("AnyFacts", Facts, SegmentationFacts)


class DescribedImages:
    """Stands for labelled images.

    Args:
        description: what :func:`describe_images` gave.

    Raises:
        ValueError: If it is the description of something else.
    """

    published_split = False

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.id_column = str(_entry(description, "id_column"))
        self.facts = _facts(Facts, description)

    def prepare(self) -> None:
        """Nothing to do."""

    def read(self) -> NoReturn:
        """There are no samples."""
        raise _nothing_to_read()

    def predictions(self, ids: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """The table that the data set's own evaluation reads."""
        if self.id_column in TABLES:
            return TABLES[self.id_column](ids, self.facts.class_names, probabilities)
        return class_columns(self.id_column, ids, self.facts.class_names, probabilities)


class DescribedPictures:
    """Stands for pictures with masks.

    Args:
        description: what :func:`describe_pictures` gave.

    Raises:
        ValueError: If it is the description of something else.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.facts = _facts(SegmentationFacts, description)

    def read(self) -> NoReturn:
        """There are no samples."""
        raise _nothing_to_read()


class DescribedBoxes:
    """Stands for images with boxes.

    Args:
        description: what :func:`describe_boxes` gave.

    Raises:
        ValueError: If it is the description of something else.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.class_names = list(_entry(description, "class_names"))
        self.category_ids = list(_entry(description, "category_ids"))

    def read(self, part: str) -> NoReturn:
        """There are no samples."""
        raise _nothing_to_read()


def describe_images(reader: Reader) -> dict[str, Any]:
    """All that predictions for other images need, as plain values."""
    return {"id_column": reader.id_column, "facts": _plain(asdict(reader.facts))}


def describe_pictures(reader: SegmentationReader) -> dict[str, Any]:
    """All that predictions for other pictures need, as plain values."""
    return {"facts": _plain(asdict(reader.facts))}


def describe_boxes(reader: BoxReader) -> dict[str, Any]:
    """All that predictions for other images need, as plain values."""
    return {"class_names": list(reader.class_names), "category_ids": list(reader.category_ids)}


def _facts(kind: type[AnyFacts], description: Mapping[str, Any]) -> AnyFacts:
    values = _entry(description, "facts")
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"description has {', '.join(unknown)}, which {kind.__name__} does not know")
    return kind(**{name: _frozen(value) for name, value in values.items()})


def _entry(description: Mapping[str, Any], name: str) -> Any:
    if name not in description:
        raise ValueError(f"description has {', '.join(description) or 'nothing'}, expected '{name}' in it")
    return description[name]


def _plain(value: Any) -> Any:
    """Lists for tuples, so that the values are the same in a checkpoint and in YAML."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value


def _nothing_to_read() -> ValueError:
    return ValueError("the data set itself is not read: only its description is given, for predictions of other images")
