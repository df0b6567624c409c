"""What all datamodules of pictures share: loaders that a seed repeats, spread over ranks, and checks of options."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.image_dataset import quiet_worker, usable_cores
from datamodules.image_files import list_images
from datamodules.readers.samples import checked_folder
from datamodules.sampling import EvaluationBatchSampler, TrainBatchSampler


class RepeatableLoaders(LightningDataModule):
    """A datamodule whose training order is a function of (seed, epoch, pass), and whose evaluation sees each row once.

    Subclasses save the hyper-parameters ``batch_size``, ``eval_batch_size``, ``num_workers``, ``seed``,
    ``drop_last`` and ``predict_path``, and ``description`` where other images can be predicted without the data set.
    """

    @property
    def seed(self) -> int:
        """Seed of order and augmentation: the option, that of `seed_everything`, or 0."""
        if self.hparams.seed is not None:
            return self.hparams.seed
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))

    @property
    def _described(self) -> bool:
        """Whether a description stands for the data set, because other images are predicted."""
        return self.hparams.get("description") is not None and self.hparams.predict_path is not None

    @property
    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _drops_last(self, length: int) -> bool:
        """Whether the last training batch is left out; by itself only if it would hold a single sample."""
        if self.hparams.drop_last is not None:
            return self.hparams.drop_last
        return length > 1 and length % self.hparams.batch_size == 1

    def _workers(self, dataset: Dataset) -> int:
        """Loading processes for a data set."""
        if self.hparams.num_workers is not None:
            return self.hparams.num_workers
        return min(2, usable_cores())

    def _repeatable_training(self, dataset: Dataset, collate: Callable[[list], Any]) -> DataLoader:
        sampler = TrainBatchSampler(
            len(dataset),
            self.hparams.batch_size,
            seed=self.seed,
            drop_last=self._drops_last(len(dataset)),
            trainer=self.trainer if self.trainer is not None and self.trainer.training else None,
            **self._ranks,
        )
        return self._loader(dataset, sampler, collate)

    def _repeatable_evaluation(self, dataset: Dataset, collate: Callable[[list], Any]) -> DataLoader:
        batch_size = self.hparams.eval_batch_size or self.hparams.batch_size
        return self._loader(dataset, EvaluationBatchSampler(len(dataset), batch_size, **self._ranks), collate)

    def _loader(self, dataset: Dataset, sampler: Any, collate: Callable[[list], Any]) -> DataLoader:
        workers = self._workers(dataset)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=quiet_worker if workers else None,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own keeps the loader from drawing on the global one, which the model's noise uses.
            generator=torch.Generator().manual_seed(self.seed),
        )


def pictures_to_predict(
    path: str, option: str = "predict_path", purpose: str = "the pictures to predict"
) -> tuple[Path, list[Path]]:
    """The folder that an option names, and the pictures below it.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
        NotADirectoryError: If it is a file.
    """
    folder = checked_folder(path, option, purpose)
    files = list_images(folder)
    if not files:
        raise FileNotFoundError(f"--data.{option} '{path}': no image found")
    return folder, files


def check_at_least(options: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Raise a ValueError that names the first option below its least value; None is left to the data set."""
    for name, value in least.items():
        if options[name] is not None and options[name] < value:
            raise ValueError(f"{name} is {options[name]}, expected {value} or more")


def check_new_split(val_fraction: float, test_fraction: float) -> None:
    """Raise a ValueError unless the shares of validation and test leave something to train on."""
    if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction is {val_fraction} and test_fraction {test_fraction}, "
            "expected shares in (0, 1) that leave some"
        )


def check_normalisation(options: Mapping[str, Any], *counts: int) -> None:
    """Raise a ValueError unless ``mean`` and ``std`` have one of these numbers of values, and ``std`` is above 0."""
    for name in ("mean", "std"):
        if options[name] is not None and len(options[name]) not in counts:
            raise ValueError(f"{name} has {len(options[name])} values, expected one per channel ({counts[-1]})")
    if options["std"] is not None and min(options["std"]) <= 0:
        raise ValueError(f"std is {options['std']}, expected values above 0")
