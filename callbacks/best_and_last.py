"""Keep the best checkpoint and, after every epoch, the last one."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


class BestAndLastCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` whose ``last.ckpt`` is that of the last epoch.

    Lightning 2.6 writes its last checkpoint only where it also writes one of the best: a run that stops to improve and
    is killed later would lose every epoch since. Here each save point that is not among the best writes ``last.ckpt``.

    Args:
        monitor: Logged metric that the best checkpoint is chosen by; None keeps the latest.
        mode: ``min`` or ``max``.
        filename: Name of the best checkpoint.
        save_last: Keep ``last.ckpt``.
        **kwargs: See ``lightning.pytorch.callbacks.ModelCheckpoint``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BestAndLastCheckpoint(monitor="val/main", mode="max")], accelerator="cpu")
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: str = "min",
        filename: str = "best",
        save_last: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, filename=filename, save_last=save_last, **kwargs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, where there is no validation to wait for."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the metrics of this validation."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not self._should_save_on_train_epoch_end(trainer):
            self._save_last_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the monitored metric was never logged."""
        super().on_train_end(trainer, pl_module)
        if self.monitor and self.save_top_k and not self.best_model_path and not trainer.fast_dev_run:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            rank_zero_warn(
                f"checkpoint: '{self.monitor}' was never logged, so there is no best checkpoint; logged: {logged}"
            )

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Pass over epochs without the monitored metric: a probe may run every few epochs only."""
        if self.monitor is None or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_if_due(self, trainer: Trainer) -> None:
        due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
