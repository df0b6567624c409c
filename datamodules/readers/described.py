"""Readers that stand for a data set which is not at hand: what a trained model has to know of it, and no samples."""

import json
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

    def __init__(self, description: str) -> None:
        content = _content(description, "id_column", "facts")
        self.id_column, self.facts = content["id_column"], _facts(Facts, content["facts"])

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

    def __init__(self, description: str) -> None:
        self.facts = _facts(SegmentationFacts, _content(description, "facts")["facts"])

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

    def __init__(self, description: str) -> None:
        content = _content(description, "class_names", "category_ids")
        self.class_names, self.category_ids = content["class_names"], content["category_ids"]

    def read(self, part: str) -> NoReturn:
        """There are no samples."""
        raise _nothing_to_read()


def describe_images(reader: Reader) -> str:
    """All that predictions for other images need, as JSON."""
    return json.dumps({"id_column": reader.id_column, "facts": asdict(reader.facts)})


def describe_pictures(reader: SegmentationReader) -> str:
    """All that predictions for other pictures need, as JSON."""
    return json.dumps({"facts": asdict(reader.facts)})


def describe_boxes(reader: BoxReader) -> str:
    """All that predictions for other images need, as JSON."""
    return json.dumps({"class_names": list(reader.class_names), "category_ids": list(reader.category_ids)})


def _content(description: str, *names: str) -> dict[str, Any]:
    content = json.loads(description)
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"description has {', '.join(content) or 'nothing'}, expected '{missing[0]}' in it")
    return content


def _facts(kind: type[AnyFacts], values: Mapping[str, Any]) -> AnyFacts:
    if unknown := sorted(set(values) - {field.name for field in fields(kind)}):
        raise ValueError(f"description has {', '.join(unknown)}, which {kind.__name__} does not know")
    return kind(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value


def _nothing_to_read() -> ValueError:
    return ValueError("the data set itself is not read: only its description is given, for predictions of other images")
