"""One file of predictions or features from what all batches and ranks return."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.atomic_files import atomic_table, atomic_write
from callbacks.step_outputs import StepOutputs, batch_rows

if TYPE_CHECKING:
    from pandas import DataFrame

Format = Literal["csv", "npz", "parquet"]


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns into one file, in the order of the samples, each once.

    ``predict_step`` returns a mapping with ``index`` (B,), the row of each sample in its split, and ``probabilities``
    (B, C) or ``features`` (B, D). Rank zero writes the file once all is done, complete or not at all.

    Probabilities go through ``prediction_table(index, probabilities)`` of the datamodule, which knows the format that
    the data set's own evaluation reads; without it the columns are ``index`` and one per class. As npz they are the
    arrays ``id, index, probabilities``. Features are the arrays ``id, index, label, features`` (npz) or the columns
    ``id, label, feature_0, ...`` (parquet). Ids come from ``sample_ids(None)`` of the datamodule, else they are the
    index; the label is that of the batch, or -1.

    Args:
        output: file to write; None for ``predictions.<format>`` or ``features.<format>`` in the trainer's
            ``default_root_dir``.
        format: ``csv`` (probabilities only), ``npz`` or ``parquet``.

    Raises:
        ValueError: for an unknown format or an ``output`` whose ending says another one; after prediction, for
            outputs that cannot be written.

    Example::

        Trainer(callbacks=[PredictionWriter("answers.csv")]).predict(module, datamodule=data, return_predictions=False)
    """

    def __init__(self, output: str | None = None, format: Format = "csv") -> None:
        if format not in get_args(Format):
            raise ValueError(f"PredictionWriter: format is {format!r}, expected one of {', '.join(get_args(Format))}")
        if output is not None and Path(output).suffix != f".{format}":
            raise ValueError(
                f"PredictionWriter: output {output!r} does not end in .{format}; give both the file and its format"
            )
        self.output = output
        self.format: Format = format
        self._outputs = StepOutputs()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self._outputs.clear()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the rows of a batch."""
        if dataloader_idx > 0:
            raise ValueError("PredictionWriter: there are several predict dataloaders; predict one split at a time")
        fields = ("index", "probabilities", "features", "labels")
        known = {key: outputs[key] for key in fields if key in outputs} if isinstance(outputs, dict) else {}
        if "index" not in known or not {"probabilities", "features"} & known.keys():
            given = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(
                f"PredictionWriter: predict_step returned {given}, expected a dict with 'index' and 'probabilities' "
                f"or 'features'"
            )
        if "features" in known and self.format == "csv":
            raise ValueError("PredictionWriter: features are not written as csv; use format='npz' or format='parquet'")
        rows = {key: value for key, value in batch_rows(batch).items() if key == "labels"} | known
        self._outputs.add({key: value.float() if value.is_floating_point() else value for key, value in rows.items()})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the rows of all ranks together and write them."""
        gathered = self._outputs.take("PredictionWriter")
        if gathered is None:
            return
        rows = {key: value.numpy() for key, value in gathered.items()}
        path = self.path(trainer, "features" if "features" in rows else "predictions")
        if self.format == "npz":
            self._write_npz(path, trainer, rows)
        else:
            table = self._feature_table(trainer, rows) if "features" in rows else self._table(trainer, rows)
            atomic_table(path, table)
        rank_zero_info(f"Wrote {len(rows['index'])} rows to {path}")

    def path(self, trainer: Trainer, kind: str) -> Path:
        """File that is written; ``kind`` is ``predictions`` or ``features``."""
        return Path(self.output) if self.output else Path(trainer.default_root_dir) / f"{kind}.{self.format}"

    def _table(self, trainer: Trainer, rows: dict[str, np.ndarray]) -> "DataFrame":
        make_table = getattr(_datamodule(trainer), "prediction_table", None)
        if make_table is not None:
            return make_table(rows["index"], rows["probabilities"])
        import pandas as pd

        names = getattr(_datamodule(trainer), "class_names", None) or range(rows["probabilities"].shape[1])
        table = pd.DataFrame(rows["probabilities"], columns=[str(name) for name in names])
        table.insert(0, "index", rows["index"])
        return table

    def _feature_table(self, trainer: Trainer, rows: dict[str, np.ndarray]) -> "DataFrame":
        import pandas as pd

        table = pd.DataFrame(rows["features"], columns=[f"feature_{i}" for i in range(rows["features"].shape[1])])
        table.insert(0, "label", _labels(rows))
        table.insert(0, "id", _ids(trainer, rows["index"]))
        return table

    def _write_npz(self, path: Path, trainer: Trainer, rows: dict[str, np.ndarray]) -> None:
        arrays = {"id": np.array(_ids(trainer, rows["index"]), dtype=np.str_), "index": rows["index"]}
        if "features" in rows:
            arrays |= {"label": _labels(rows), "features": rows["features"]}
        else:
            arrays |= {"probabilities": rows["probabilities"]}
        with atomic_write(path) as file:
            np.savez(file, **arrays)


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _labels(rows: dict[str, np.ndarray]) -> np.ndarray:
    return rows.get("labels", np.full(len(rows["index"]), -1))


def _ids(trainer: Trainer, index: np.ndarray) -> list[str]:
    sample_ids = getattr(_datamodule(trainer), "sample_ids", None)
    if sample_ids is None:
        return [str(row) for row in index]
    ids = sample_ids(None)
    return [ids[row] for row in index]
