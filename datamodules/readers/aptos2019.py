"""APTOS 2019, the diabetic retinopathy challenge, as its own files lie on disk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from datamodules.image_files import locate
from datamodules.readers.label_tables import check_unique, class_index, read_table
from datamodules.readers.samples import Facts, Samples, existing_folder

if TYPE_CHECKING:
    from pandas import DataFrame

LABELS = "train.csv"
IMAGES = "train_images"
GRADES = ("No DR", "Mild", "Moderate", "Severe", "Proliferative DR")


class Aptos2019Reader:
    """Reads ``train.csv`` (``id_code,diagnosis``) and ``train_images/<id_code>.png``.

    The challenge's own test images have no labels; give their folder as ``predict_path``.

    Args:
        root: Folder that holds both.

    Raises:
        FileNotFoundError: If a file or an image is missing.
        ValueError: If a diagnosis is no whole number in 0..4; names the row and the value.
    """

    id_column = "id_code"
    published_split = False
    facts = Facts(
        class_names=GRADES,
        image_size=224,
        channels=3,
        subject="colour",
        main_metric="kappa",
        crop_ratio=0.875,
        in_memory=False,
        crop_border=True,
    )

    def __init__(self, root: str | None) -> None:
        self.root = existing_folder(root, "aptos2019")
        if not (self.root / LABELS).is_file():
            raise FileNotFoundError(
                f"{self.root / LABELS} does not exist; layout 'aptos2019' needs it next to {IMAGES}/"
            )

    def prepare(self) -> None:
        """Nothing to do: the challenge's files need a registration and are fetched by hand."""

    def read(self) -> dict[str, Samples]:
        """Return all labelled images as one part."""
        path = self.root / LABELS
        table = read_table(path, ("id_code", "diagnosis"))
        check_unique(table["id_code"], path)
        labels = class_index(table["diagnosis"], len(GRADES), path)
        ids = table["id_code"].to_numpy(dtype=str)
        paths = locate(self.root / IMAGES, ids.tolist(), LABELS)
        return {"all": Samples(ids=ids, labels=labels, paths=np.array([str(path) for path in paths]))}

    def predictions(self, ids: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """See :meth:`table`."""
        return self.table(ids, self.facts.class_names, probabilities)

    @staticmethod
    def table(ids: Sequence[str], class_names: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """Return ``id_code,diagnosis`` with the most probable grade, as the challenge takes it."""
        import pandas as pd

        return pd.DataFrame({"id_code": list(ids), "diagnosis": np.asarray(probabilities).argmax(axis=1)})
