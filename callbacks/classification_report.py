"""Where a classifier errs: confusion matrix, scores of each class, bar chart of recall."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.media import Media
from callbacks.step_outputs import StepOutputs, batch_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED_CELLS = 20  # classes up to which a confusion matrix shows its counts


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class, from (N,) class indices each."""
    flat = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Per class ``precision``, ``recall``, ``f1`` (NaN where undefined) and ``support``, from counts (C, C)."""
    hits, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        return {
            "precision": hits / predicted,
            "recall": hits / support,
            "f1": 2 * hits / (support + predicted),
            "support": support,
        }


def show_confusion(media: Media, prefix: str, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Show a confusion matrix, its table and the recall of each class, under ``<prefix>/confusion`` and so on."""
    scores = class_scores(confusion)
    media.figure(f"{prefix}/confusion", confusion_figure(confusion, class_names))
    rows = [
        [name, *(round(float(scores[key][i]), 4) for key in ("precision", "recall", "f1")), int(scores["support"][i])]
        for i, name in enumerate(class_names)
    ]
    media.table(f"{prefix}/classes", ["class", "precision", "recall", "f1", "support"], rows)
    media.bar(f"{prefix}/recall", list(class_names), scores["recall"].tolist(), title="Recall per class")


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """Draw counts (C, C) coloured by the share of the true class."""
    from matplotlib.figure import Figure

    classes = len(class_names)
    side = float(np.clip(0.45 * classes + 2, 3.5, 14))
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = np.arange(classes)
    axis.set_xticks(ticks, class_names, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(ticks, class_names, fontsize=8, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if classes <= NUMBERED_CELLS:
        for (row, column), count in np.ndenumerate(confusion):
            colour = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure


def class_names_of(trainer: Trainer, pl_module: LightningModule, num_classes: int) -> list[str]:
    """Names that the datamodule or the module gives to the classes, else their numbers."""
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        names = getattr(owner, "class_names", None)
        if names and len(names) == num_classes:
            return [str(name) for name in names]
    return [str(i) for i in range(num_classes)]


class ClassificationReport(Callback):
    """Shows confusion matrix, class-wise table and recall chart after validation and test.

    It reads what the evaluation steps return: a mapping with ``probabilities`` (B, C), and ``labels`` (B,) and
    ``index`` (B,) there or in the batch. Samples without label (-1) are left out, samples that a distributed sampler
    repeats count once. Modules that return no probabilities are left alone.

    Args:
        every_n_epochs: report after validation in every n-th epoch and in the last one; tests are always reported.

    Raises:
        ValueError: if ``every_n_epochs`` is below 1.

    Example::

        Trainer(callbacks=[ClassificationReport(every_n_epochs=5)]).fit(classifier, datamodule=data)
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"ClassificationReport: every_n_epochs is {every_n_epochs}, expected >= 1")
        self.every_n_epochs = every_n_epochs
        self._outputs = StepOutputs()
        self._due = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self._outputs.clear()
        self._due = is_due(trainer, self.every_n_epochs)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take predicted class, label and index of each sample."""
        if not self._due or dataloader_idx > 0 or not isinstance(outputs, dict) or "probabilities" not in outputs:
            return
        rows = batch_rows(batch) | {key: outputs[key] for key in ("labels", "index") if key in outputs}
        if "labels" not in rows:
            return
        self._num_classes = outputs["probabilities"].shape[1]
        self._outputs.add(rows | {"predictions": outputs["probabilities"].argmax(1)})

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take predicted class, label and index of each sample."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the report of the validation split."""
        self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the report of the test split."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._due:
            return
        rows = self._outputs.gather()
        self._outputs.clear()
        if not rows:
            return
        labelled = (rows["labels"] >= 0).numpy()
        if not labelled.any():
            rank_zero_warn(f"ClassificationReport: no sample of the {stage} split has a label, nothing to report")
            return
        confusion = confusion_matrix(
            rows["labels"].numpy()[labelled], rows["predictions"].numpy()[labelled], self._num_classes
        )
        media = Media(trainer)
        if media.active:
            show_confusion(media, stage, confusion, class_names_of(trainer, pl_module, self._num_classes))


def is_due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Whether something done every n epochs, at the first and at the last validation, is to be done now.

    That is at the first validation in each run of n epochs, which need not all be validated; never in the sanity check.
    """
    if trainer.sanity_checking:
        return False
    if trainer.state.fn != "fit":
        return True
    epoch, step = trainer.current_epoch, trainer.check_val_every_n_epoch or 1
    ends = trainer.should_stop or (0 < trainer.max_steps <= trainer.global_step)
    no_further = trainer.max_epochs not in (None, -1) and epoch + step >= trainer.max_epochs
    return epoch % every_n_epochs < step or ends or no_further
