"""Batches and trainers for the tests of image modules."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

TINY = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


class Batch(NamedTuple):
    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor

    @property
    def images(self) -> Tensor:
        return self.views[0]


def batch(size: int = 6, views: int = 1, side: int = 8, channels: int = 1, classes: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = tuple(torch.randn(size, channels, side, side, generator=generator) for _ in range(views))
    return Batch(images, torch.arange(size) % classes, torch.arange(size) + seed * size)


def batches(count: int, **kwargs: Any) -> list[Batch]:
    return [batch(seed=seed, **kwargs) for seed in range(count)]


def loader(items: Iterable[Batch]) -> DataLoader:
    return DataLoader(list(items), batch_size=None)


def quiet_trainer(**kwargs: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(**{**quiet, **kwargs})


def silence(module: LightningModule) -> LightningModule:
    """Let the steps of a module be called without a trainer."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module
