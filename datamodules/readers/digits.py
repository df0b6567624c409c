"""The 1,797 hand-written digits that scikit-learn carries: nothing to download."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from datamodules.readers.samples import Facts, Samples, class_columns

if TYPE_CHECKING:
    from pandas import DataFrame


class DigitsReader:
    """Digits of 8x8 pixels, one channel, ten classes, values 0..16 stretched to 0..255."""

    id_column = "id"
    published_split = False
    facts = Facts(
        class_names=tuple("0123456789"),
        image_size=8,
        channels=1,
        subject="digits",
        mean=(0.3053,),
        std=(0.3759,),
    )

    def prepare(self) -> None:
        """Nothing to do: the data is part of an installed package."""

    def read(self) -> dict[str, Samples]:
        """Return all digits as one part."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        ids = np.array([f"digit-{row:04d}" for row in range(len(pixels))])
        return {"all": Samples(ids=ids, labels=digits.target.astype(np.int64), pixels=pixels)}

    def predictions(self, ids: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """Return ``id`` and one column per digit."""
        return class_columns(self.id_column, ids, self.facts.class_names, probabilities)
