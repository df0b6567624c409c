"""Which classes a segmenter finds: IoU of each class as table and bars, and the confusion matrix."""

from collections.abc import Sequence

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.classification_report import class_names_of, confusion_figure, is_due
from callbacks.media import Media

COLUMNS = ["class", "iou", "accuracy", "precision", "pixels"]
MAX_DRAWN = 60  # classes up to which a confusion matrix can be read


def pixel_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Per class ``iou``, ``accuracy``, ``precision`` (NaN where undefined) and ``pixels``, from counts (C, C)."""
    hits, labels, predictions = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        return {
            "iou": hits / (labels + predictions - hits),
            "accuracy": hits / labels,
            "precision": hits / predictions,
            "pixels": labels,
        }


def show_segmentation(media: Media, prefix: str, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Show ``<prefix>/classes`` (table), ``<prefix>/iou`` (bars) and, of up to 60 classes, ``<prefix>/confusion``."""
    scores = pixel_scores(confusion)
    rows = [
        [name, *(round(float(scores[key][label]), 4) for key in COLUMNS[1:4]), int(scores["pixels"][label])]
        for label, name in enumerate(class_names)
    ]
    media.table(f"{prefix}/classes", COLUMNS, rows)
    media.bar(f"{prefix}/iou", list(class_names), scores["iou"].tolist(), title="IoU per class")
    if len(class_names) <= MAX_DRAWN:
        # Pixels are too many to be read as counts: percents of the true class.
        shares = np.rint(100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)).astype(np.int64)
        media.figure(f"{prefix}/confusion", confusion_figure(shares, class_names))


class SegmentationReport(Callback):
    """Shows IoU, accuracy and precision of each class and the confusion matrix after validation and test.

    The module has a method ``confusion(stage) -> (C, C)`` that returns the pixel counts of the evaluation so far over
    all processes (row = label, column = prediction; ``stage`` is ``val`` or ``test``) and is called by all of them
    before the module itself computes and resets its metrics. A module without it is left alone.

    Args:
        every_n_epochs: report after validation in every n-th epoch and in the last one; tests are always reported.

    Raises:
        ValueError: if ``every_n_epochs`` is below 1.

    Example::

        Trainer(callbacks=[SegmentationReport(every_n_epochs=5)]).fit(segmenter, datamodule=data)
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"SegmentationReport: every_n_epochs is {every_n_epochs}, expected >= 1")
        self.every_n_epochs = every_n_epochs

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the report of the validation split."""
        self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the report of the test split."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "confusion") or not is_due(trainer, self.every_n_epochs):
            return
        confusion = pl_module.confusion(stage).cpu().numpy()
        if not confusion.any():
            rank_zero_warn(f"SegmentationReport: no pixel of the {stage} split has a label, nothing to report")
            return
        media = Media(trainer)
        if media.active:
            show_segmentation(media, stage, confusion, class_names_of(trainer, pl_module, len(confusion)))
