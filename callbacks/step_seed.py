"""Random numbers that depend on where training is, not on how it got there."""

import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seed torch, NumPy and Python at every training batch from (seed, rank, global step, batch index).

    Dropout and token perturbations of a resumed run are then those of the uninterrupted one without any generator state
    in the checkpoint, and the ranks draw different numbers. Each validation, test and prediction loop is seeded once,
    so that what it draws does not depend on what ran before.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StepSeed(seed=1)], logger=False, accelerator="cpu")

    Args:
        seed: At least 0. None takes the seed of ``lightning.seed_everything``, or 0 if that was not called.

    Raises:
        ValueError: If the seed is negative.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"StepSeed: seed is {seed}, expected 0 or more")
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed this training batch."""
        self._reseed(pl_module.device, trainer.global_rank, trainer.global_step, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed this validation loop."""
        self._reseed(pl_module.device, trainer.global_rank, trainer.global_step)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed this test loop."""
        self._reseed(pl_module.device, trainer.global_rank)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed this prediction loop."""
        self._reseed(pl_module.device, trainer.global_rank)

    def _reseed(self, device: torch.device, *position: int) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED") or 0) if self.seed is None else self.seed
        # The length tells loops from batches; without it SeedSequence ignores zeros at the end.
        words = np.random.SeedSequence((seed, len(position), *position)).generate_state(3, np.uint64)
        torch_seed = int(words[0] >> np.uint64(1))
        # torch.manual_seed visits every kind of device there could be, which costs a hundred times as much.
        torch.default_generator.manual_seed(torch_seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(torch_seed)
        np.random.seed(int(words[1] & np.uint64(0xFFFFFFFF)))
        random.seed(int(words[2]))
