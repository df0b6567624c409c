"""ISIC 2019, the skin lesion challenge, as its own files lie on disk."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.image_files import locate
from datamodules.readers.label_tables import check_unique, read_table, row_name
from datamodules.readers.samples import Facts, Samples, class_columns, existing_folder

if TYPE_CHECKING:
    from pandas import DataFrame

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
UNKNOWN = "UNK"
IMAGES = "ISIC_2019_Training_Input"
LABELS = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"
TRUTH_VALUES = {"0": False, "0.0": False, "1": True, "1.0": True}


class Isic2019Reader:
    """Reads ``ISIC_2019_Training_{Input/,GroundTruth.csv,Metadata.csv}``; the class UNK is left out when it is empty.

    Two thirds of the images share their lesion with another image, so the lesion ids are needed for an honest split.

    Args:
        root: Folder that holds the three.
        with_lesions: Read the lesion ids; False for a split that ignores them.

    Raises:
        FileNotFoundError: If a file or an image is missing.
        ValueError: If a row is not one-hot; names the row, the image and the values.
    """

    id_column = "image"
    published_split = False

    def __init__(self, root: str | None, with_lesions: bool = True) -> None:
        self.root = existing_folder(root, "isic2019")
        self.with_lesions = with_lesions
        if with_lesions and not (self.root / METADATA).is_file():
            raise FileNotFoundError(
                f"{self.root / METADATA} does not exist; it has the lesion ids that keep images of one lesion in one "
                "split. Add it, or set --data.split random to split without it"
            )

    @cached_property
    def labels(self) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Image ids, class indices and class names, from the label table alone."""
        path = self.root / LABELS
        table = read_table(path, ("image", *CLASSES))
        unknown = [column for column in table.columns if column not in ("image", *CLASSES)]
        if unknown:
            raise ValueError(
                f"{path}: unknown column(s) {', '.join(unknown)} (in {row_name(0, path)}, image "
                f"{table['image'].iloc[0]}: {', '.join(table[unknown].iloc[0])}); expected image, {', '.join(CLASSES)}"
            )
        check_unique(table["image"], path)
        one_hot = _one_hot(table, path)
        names = CLASSES if one_hot[:, CLASSES.index(UNKNOWN)].any() else CLASSES[:-1]
        return table["image"].to_numpy(dtype=str), one_hot.argmax(axis=1), names

    @cached_property
    def facts(self) -> Facts:
        """Class names from the label table."""
        return Facts(
            class_names=self.labels[2],
            image_size=224,
            channels=3,
            subject="colour",
            main_metric="balanced_acc",
            crop_ratio=0.875,
            in_memory=False,
        )

    def prepare(self) -> None:
        """Nothing to do: the challenge's files need a registration and are fetched by hand."""

    def read(self) -> dict[str, Samples]:
        """Return all labelled images as one part."""
        ids, labels, _ = self.labels
        folder = self.root / IMAGES
        nested = folder / IMAGES
        paths = locate(nested if nested.is_dir() else folder, ids.tolist(), LABELS)
        groups = self.lesions(ids) if self.with_lesions else None
        return {"all": Samples(ids=ids, labels=labels, paths=np.array([str(path) for path in paths]), groups=groups)}

    def lesions(self, ids: np.ndarray) -> np.ndarray:
        """Return the lesion id of each image, empty where it is not known."""
        path = self.root / METADATA
        table = read_table(path, ("image", "lesion_id"))
        check_unique(table["image"], path)
        lesion_of = dict(zip(table["image"], table["lesion_id"], strict=True))
        return np.array([lesion_of.get(name, "") for name in ids.tolist()], dtype=str)

    def predictions(self, ids: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """See :meth:`table`."""
        return self.table(ids, self.facts.class_names, probabilities)

    @staticmethod
    def table(ids: Sequence[str], class_names: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """Return ``image`` and the nine class columns of the challenge; UNK is 0 where it is not a class."""
        table = class_columns(Isic2019Reader.id_column, ids, class_names, probabilities)
        return table.reindex(columns=["image", *CLASSES], fill_value=0.0)


def _one_hot(table: "DataFrame", path: Path) -> np.ndarray:
    values = table[list(CLASSES)].apply(lambda column: column.str.strip().map(TRUTH_VALUES))
    bad = values.isna().any(axis=1).to_numpy() | (values.fillna(False).astype(bool).sum(axis=1).to_numpy() != 1)
    if bad.any():
        row = int(np.argmax(bad))
        shown = ", ".join(f"{name}={table[name].iloc[row]}" for name in CLASSES)
        raise ValueError(
            f"{path}: {row_name(row, path)}, image {table['image'].iloc[row]}: expected exactly one 1 and otherwise 0, "
            f"found {shown} ({int(bad.sum())} such row(s))"
        )
    return values.to_numpy(dtype=bool)
