"""A tiny training run that shows every source of randomness and every kind of state, recorded step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.exact_resume import ExactResume
from callbacks.step_seed import StepSeed
from datamodules.sampling import EvaluationBatchSampler, SampleKey, TrainBatchSampler

FEATURES = 6


class NoisyRows(Dataset):
    """Rows with augmentation noise that depends on the sample's key alone."""

    def __init__(self, length: int, noise: float = 0.1) -> None:
        self.length, self.noise = length, noise
        self.rows = torch.from_numpy(np.random.default_rng(5).standard_normal((length, FEATURES)).astype(np.float32))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Tensor, Tensor]:
        noise = np.random.default_rng((*key,)).standard_normal(FEATURES).astype(np.float32)
        row = self.rows[key.index]
        return row + self.noise * torch.from_numpy(noise), row.sum(), torch.tensor(list(key))


class SaveAtStep(Callback):
    """Write a checkpoint once so many optimiser steps are done."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class NoisyData(LightningDataModule):
    """One or two training loaders (the second is shorter and passes several times) and one for validation."""

    def __init__(self, lengths: Sequence[int] = (20,), batch_size: int = 4, workers: int = 0, persistent: bool = False):
        super().__init__()
        self.lengths, self.batch_size, self.workers, self.persistent = lengths, batch_size, workers, persistent

    def _loader(self, dataset: Dataset, sampler: Any) -> DataLoader:
        persistent = self.persistent and self.workers > 0
        return DataLoader(dataset, batch_sampler=sampler, num_workers=self.workers, persistent_workers=persistent)

    def train_dataloader(self) -> DataLoader | dict[str, DataLoader]:
        ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        loaders = {
            f"part{position}": self._loader(
                NoisyRows(length), TrainBatchSampler(length, self.batch_size, seed=7, trainer=self.trainer, **ranks)
            )
            for position, length in enumerate(self.lengths)
        }
        return loaders if len(loaders) > 1 else loaders["part0"]

    def val_dataloader(self) -> DataLoader:
        ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        sampler = EvaluationBatchSampler(7, 3, **ranks)
        return DataLoader(NoisyRows(7, noise=0.0), batch_sampler=sampler)


class NoisyRegression(LightningModule):
    """Regression with dropout; momentum, an epoch-wise schedule and a buffer give it state beyond its weights."""

    def __init__(self, dropout: float = 0.3, momentum: float = 0.9) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.momentum = momentum
        self.validation_loss = MeanMetric()
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        losses = [((self.layers(x).squeeze(1) - y) ** 2).mean() for x, y, _ in parts]
        loss = torch.stack(losses).mean() + 0.01 * torch.rand(()) + 0.01 * float(np.random.rand())
        self.batches_seen += 1
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        # A metric, because Lightning's own mean over ranks rounds the number of samples per rank.
        self.validation_loss.update((self.layers(x).squeeze(1) - y) ** 2)
        self.log("val/loss", self.validation_loss)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=self.momentum)
        # Most schedules ask for the number of steps, for which Lightning makes the loaders before it restores anything.
        gamma = 0.1 ** (1 / self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)}


class MovingAverage(Callback):
    """Weights averaged at each optimiser step, kept as callback state."""

    def __init__(self) -> None:
        self.step, self.average = 0, None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            weights = nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()
            self.average = weights if self.average is None else torch.lerp(self.average, weights, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.average = state_dict["step"], state_dict["average"]


class MemoryLogger(Logger):
    """Logged values by (name, step)."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, int], list[float]] = {}

    name = "memory"
    version = 0

    def log_hyperparams(self, params: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.values.setdefault((name, int(step or 0)), []).append(value)


@dataclass
class Record:
    """What happened in a run, in comparable form."""

    batches: list[Any] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    logged: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # how much had happened when a file was saved
    exit_code: int | str | None = None


class Recorder(Callback):
    """Write down each batch and each beginning and end, and save at every place where Lightning saves.

    ``stop_after`` names the place whose file is the last one before the run dies.
    """

    def __init__(self, record: Record, folder: Path | None, stop_after: str | None = None) -> None:
        self.record, self.folder, self.stop_after = record, folder, stop_after
        self.doomed = False

    def _live(self) -> None:
        if self.doomed:
            raise RunStoppedError

    def _event(self, trainer: Trainer, name: str) -> None:
        self._live()
        self.record.events.append((name, trainer.current_epoch, trainer.global_step, trainer.fit_loop.batch_idx))

    def _save(self, trainer: Trainer, name: str) -> None:
        place = f"{name}-{trainer.current_epoch}-{trainer.fit_loop.batch_idx}"
        if self.folder is not None:
            self.record.places[place] = (len(self.record.batches), len(self.record.events))
            trainer.save_checkpoint(self.folder / f"{place}.ckpt", weights_only=False)
        # The next event is fatal, so that Lightning can still log this batch.
        self.doomed = place == self.stop_after

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._event(trainer, "batch start")
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        keys = [keys.tolist() for _, _, keys in parts]
        self.record.batches.append((trainer.current_epoch, batch_idx, keys))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._event(trainer, "epoch start")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._event(trainer, "batch end")
        if not trainer.fit_loop._should_accumulate():
            self._save(trainer, "batch")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not an event, because a validation that was interrupted starts again.
        self._live()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking and trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready == 1:
            self._save(trainer, "in_validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._event(trainer, "validation end")
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._event(trainer, "epoch end")
        self._save(trainer, "epoch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._live()


class RunStoppedError(Exception):
    """Raised in the place of a kill."""


def train(
    folder: Path,
    data: NoisyData,
    *,
    save: bool = False,
    resume: Path | None = None,
    stop_after: str | None = None,
    model: NoisyRegression | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Record:
    """Train for two epochs (or as ``options`` say) and return what happened."""
    record, logger, average = Record(), MemoryLogger(), MovingAverage()
    model = model or NoisyRegression()
    arguments: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "plugins": [AtomicCheckpointIO()],
        "logger": logger,
        "default_root_dir": folder,
    }
    recorder = Recorder(record, folder if save else None, stop_after)
    trainer = Trainer(
        **(arguments | options), callbacks=[ExactResume(), StepSeed(seed=11), average, *callbacks, recorder]
    )
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume)
    except RunStoppedError:
        return record
    except SystemExit as stop:
        record.exit_code = stop.code
        return record
    finally:
        record.logged = {key: values for key, values in logger.values.items() if key[0].endswith("loss")}
    record.final = {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "average": average.state_dict(),
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
    }
    return record


def equal(first: Any, second: Any) -> bool:
    """Whether two nested structures are the same to the last bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second
