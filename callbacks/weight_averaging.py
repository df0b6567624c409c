"""Averaged weights for evaluation, with a warm-up for short runs."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

HORIZONS = 3  # of 1 / (1 - decay) steps, after which 95 % of the average is newer than the start


def warmup_decay(step: int, decay: float) -> float:
    """Decay of the average at an update: ``min(decay, (1 + step) / (10 + step))``.

    Args:
        step: Updates done before this one.
        decay: Final value, in [0, 1).
    """
    return min(decay, (1 + step) / (10 + step))


class WarmupWeightAveraging(WeightAveraging):
    """Exponential moving average of weights and float buffers, which evaluation and checkpoints use.

    After every optimizer step ``average = d * average + (1 - d) * weights`` with ``d = min(decay, (1 + t) / (10 + t))``
    for the t-th step, counted from 0; integer buffers are copied. Validation runs with the averaged weights. A module
    with a method ``evaluation_scores(stage) -> dict[str, Tensor]``, which computes and resets the metrics that its
    validation steps have updated, is evaluated with the raw weights too; those scores are logged as ``raw/<name>``.
    A checkpoint holds the averaged weights as ``state_dict``, which ``test``, ``predict`` and ``export`` use, and the
    raw ones for resuming.

    Under DDP all ranks keep the same average of the weights. BatchNorm statistics are each rank's own; for evaluation
    all ranks use the average of the first rank's, which is what its checkpoint holds.

    Args:
        decay: In [0, 1).
        warmup: False for the constant decay from the first step on.
        use_buffers: Average BatchNorm statistics as well; otherwise they are those of the raw network.
        log_raw: Validate the raw weights too, which doubles the time of validation.

    Raises:
        ValueError: If decay is outside [0, 1).

    Example::

        Trainer(callbacks=[WarmupWeightAveraging(decay=0.999)]).fit(module, datamodule=data)
    """

    def __init__(
        self, decay: float = 0.9998, warmup: bool = True, use_buffers: bool = True, log_raw: bool = True
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"WarmupWeightAveraging: decay is {decay}, expected a value in [0, 1)")
        super().__init__(use_buffers=use_buffers, multi_avg_fn=self._average)
        self.decay, self.warmup, self.log_raw = decay, warmup, log_raw
        self._swapped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new average at the weights that training starts from, also where they came from a file."""
        if int(self._average_model.n_averaged) == 0:
            self._average_model.module.load_state_dict(pl_module.state_dict())
            self._average_model.n_averaged.fill_(1)  # torch would take the first weights after this for the average
        steps, horizon = trainer.estimated_stepping_batches, 1 / (1 - self.decay)
        if not self.warmup and steps < HORIZONS * horizon:
            rank_zero_warn(
                f"WarmupWeightAveraging: decay {self.decay} averages over {horizon:.0f} steps, but the run has only "
                f"{steps}; the averaged weights stay close to the random start. Lower decay or set warmup: true"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averaged weights in place."""
        if self._average_model is None or trainer.sanity_checking:
            return
        self._share_buffers(trainer)
        self._swap_models(pl_module)
        self._swapped = True
        self._average_model.module.eval()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate the batch with the raw weights as well, which the copy of the module holds meanwhile."""
        if self._evaluates_raw(pl_module) and dataloader_idx == 0:
            with trainer.precision_plugin.val_step_context():
                self._average_model.module.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores of the raw weights, and put these back in place."""
        if not self._swapped:
            return
        if self._evaluates_raw(pl_module):
            scores = self._average_model.module.evaluation_scores("val")
            pl_module.log_dict({f"raw/{name}": score for name, score in scores.items()}, sync_dist=True)
        self._swap_models(pl_module)
        self._swapped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module with the averaged weights."""
        self._share_buffers(trainer)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Averaged weights as ``state_dict``, raw ones as ``current_model_state``, also in the middle of validation."""
        if self._average_model is None:
            return
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            raw, averaged = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = averaged, raw

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both sets of weights where training goes on; elsewhere the averaged ones are already in place."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _evaluates_raw(self, pl_module: LightningModule) -> bool:
        return self._swapped and self.log_raw and hasattr(pl_module, "evaluation_scores")

    def _share_buffers(self, trainer: Trainer) -> None:
        """Give all ranks the averaged buffers of the first one."""
        if trainer.world_size > 1:
            for buffer in self._average_model.module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _average(self, averaged: list[Tensor], current: list[Tensor], count: Any) -> None:
        """Move one group of averaged tensors; ``count`` - 1 updates were done before."""
        decay = warmup_decay(int(count) - 1, self.decay) if self.warmup else self.decay
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)
