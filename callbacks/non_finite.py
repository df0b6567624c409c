"""Stop at the first NaN or infinite loss, before it reaches the weights."""

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

SHOWN_SAMPLES = 8


class NonFiniteLossError(FloatingPointError):
    """The training loss or its gradient became NaN or infinite."""


class _Seen(NamedTuple):
    """What is kept of a batch until the step that it is part of."""

    batch_idx: int
    loss: Tensor
    terms: dict[str, Tensor]
    rows: dict[str, Tensor]


class NonFiniteGuard(Callback):
    """Stop training on all ranks before an optimiser step whose loss or gradients are NaN or infinite.

    The check costs one synchronisation per optimiser step. Gradients are left to the gradient scaler where there is
    one (``precision: 16-mixed``), as it meets and skips infinite ones in a healthy run.

    A module that keeps the terms of its last loss as ``loss_terms: dict[str, Tensor]`` has those that are not finite
    named; where the batch has ``index`` and the datamodule ``sample_ids(split)``, so are its samples.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NonFiniteGuard()], logger=False, accelerator="cpu")

    Args:
        gradients: Look at the gradients as well, not only at the loss.
    """

    def __init__(self, gradients: bool = True) -> None:
        self.gradients = gradients
        self._seen: list[_Seen] = []
        self._rows: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the rows of the batch, or of each batch in a dictionary."""
        parts = batch if isinstance(batch, dict) else {"train": batch}
        rows = {split: getattr(part, "index", None) for split, part in parts.items()}
        self._rows = {split: index for split, index in rows.items() if isinstance(index, Tensor)}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss of each batch that goes into the coming step, without waiting for the device."""
        terms = dict(getattr(pl_module, "loss_terms", {}))
        whole = loss.detach().float() * trainer.accumulate_grad_batches
        self._seen.append(_Seen(trainer.fit_loop.batch_idx, whole, terms, self._rows))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check what has been remembered.

        Raises:
            NonFiniteLossError: On every rank, if one of them met a loss or a gradient that is not finite.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return
        # Sums keep NaN and infinity, so one number per rank tells.
        values = [torch.stack([batch.loss for batch in seen]).sum()]
        if self.gradients and getattr(trainer.precision_plugin, "scaler", None) is None:
            values.append(_gradient_norm(optimizer, values[0]))
        found = torch.stack(values)
        if torch.isfinite(pl_module.all_gather(found)).all():
            return
        _stop(trainer, pl_module, seen, found)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an interrupted run has left."""
        self._seen = []


def _stop(trainer: Trainer, pl_module: LightningModule, seen: list[_Seen], found: Tensor) -> None:
    batch = next((batch for batch in seen if not torch.isfinite(batch.loss)), seen[-1])
    told = torch.tensor([batch.batch_idx, batch.loss.item()], dtype=torch.float64, device=found.device)
    rows = pl_module.all_gather(told).reshape(-1, 2).tolist()
    rank = next((rank for rank, (_, loss) in enumerate(rows) if not math.isfinite(loss)), None)
    what = f"the loss is {rows[rank][1]:g}" if rank is not None else "the loss is finite but its gradient is not,"
    where = f"epoch {trainer.current_epoch}, batch {int(rows[rank or 0][0])}"
    if trainer.world_size > 1 and rank is not None:
        where += f", rank {rank}"
    where += trainer.strategy.broadcast(_details(trainer, batch), src=rank or 0)
    raise NonFiniteLossError(
        f"{what} at step {trainer.global_step} ({where}); training stopped before the weights were "
        f"updated with it. {_last_good_checkpoint(trainer)} Try a lower learning rate, a longer warm-up or "
        "trainer.gradient_clip_val, and look for bad values in that batch."
    )


def _details(trainer: Trainer, batch: _Seen) -> str:
    """Terms of the loss that are not finite, and the first samples of each part of the batch."""
    bad = [name for name, value in batch.terms.items() if not torch.isfinite(value).all()]
    told = [f"not finite: {', '.join(bad)}"] if bad else []
    told += [f"samples of {split}: {names}" for split, names in _samples(trainer, batch.rows)]
    return "".join(f", {part}" for part in told)


def _samples(trainer: Trainer, rows: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Names where the datamodule knows them; a failure to find them must not hide what is being told."""
    sample_ids = getattr(getattr(trainer, "datamodule", None), "sample_ids", None)
    found = []
    for split, index in rows.items() if sample_ids is not None else ():
        with contextlib.suppress(Exception):
            ids = sample_ids(split)
            names = [str(ids[row]) for row in index.tolist()[:SHOWN_SAMPLES]]
            found.append((split, ", ".join(names) + (", ..." if len(index) > SHOWN_SAMPLES else "")))
    return found


def _gradient_norm(optimizer: torch.optim.Optimizer, like: Tensor) -> Tensor:
    gradients: list[Any] = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).to(like) if gradients else torch.zeros_like(like)


def _last_good_checkpoint(trainer: Trainer) -> str:
    paths = {
        Path(path)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        for path in (callback.last_model_path, callback.best_model_path, callback._last_checkpoint_saved)
        if path and Path(path).is_file()
    }
    if not paths:
        return "No checkpoint has been written yet."
    return f"The last good checkpoint is {max(paths, key=lambda path: path.stat().st_mtime)}."
