"""A tiny segmentation module and its data, for the tests of callbacks."""

from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from datamodules.sampling import EvaluationBatchSampler

NAMES = ["road", "sky", "car"]
PALETTE = [[128, 64, 128], [70, 130, 180], [0, 0, 142]]
SIDES = (4, 6, 8, 5, 7)


class Street(NamedTuple):
    masks: list[Tensor]
    index: Tensor


def true_mask(row: int) -> Tensor:
    """Class indices (side, side + 1) with void in a corner."""
    side = SIDES[row]
    mask = torch.from_numpy(np.random.RandomState(row).randint(0, 3, (side, side + 1)))
    mask[0, 0] = 255
    return mask


def predicted_mask(row: int) -> Tensor:
    mask = true_mask(row).clone()
    mask[mask == 255] = 0
    mask[1] = (mask[1] + row) % 3
    return mask


class Streets(LightningDataModule):
    """Five masks of different sizes, with names of which one lies in a folder."""

    class_names, palette = NAMES, PALETTE

    def sample_ids(self, split: str | None = None) -> list[str]:
        return ["a", "b", "deep/c", "d", "e"]

    def _loader(self) -> DataLoader:
        ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        sampler = EvaluationBatchSampler(len(SIDES), 2, **ranks)
        return DataLoader(Rows(), batch_sampler=sampler, collate_fn=join)

    val_dataloader = test_dataloader = predict_dataloader = _loader


class Rows:
    def __len__(self) -> int:
        return len(SIDES)

    def __getitem__(self, key: Any) -> int:
        return key.index


def join(rows: list[int]) -> Street:
    return Street([true_mask(row) for row in rows], torch.tensor(rows))


class NumberedStreets(Streets):
    """Its files count classes from 1, as those of ADE20K."""

    def mask_to_file(self, mask: np.ndarray) -> np.ndarray:
        return (mask + 1).astype(np.uint8)


class Painter(LightningModule):
    """Predicts fixed masks and counts pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.counts = MulticlassConfusionMatrix(3, ignore_index=255)

    def validation_step(self, batch: Street, batch_idx: int) -> dict[str, Any]:
        for row, mask in zip(batch.index.tolist(), batch.masks, strict=True):
            self.counts.update(predicted_mask(row), mask)
        return self.predict_step(batch, batch_idx)

    test_step = validation_step

    def predict_step(self, batch: Street, batch_idx: int) -> dict[str, Any]:
        return {"index": batch.index, "masks": [predicted_mask(row) for row in batch.index.tolist()]}

    def confusion(self, stage: str) -> Tensor:
        return self.counts.compute()

    def on_validation_epoch_end(self) -> None:
        self.counts.reset()


class DoubtfulPainter(Painter):
    """Its predictions bring an uncertainty that rises along the rows."""

    def predict_step(self, batch: Street, batch_idx: int) -> dict[str, Any]:
        outputs = super().predict_step(batch, batch_idx)
        return {**outputs, "uncertainty": [doubt(row) for row in batch.index.tolist()]}


def doubt(row: int) -> Tensor:
    """Uncertainty (side, side + 1) from 0.2 to 0.6; of the last row the same throughout."""
    side = SIDES[row]
    if row == len(SIDES) - 1:
        return torch.full((side, side + 1), 0.25)
    return torch.linspace(0.2, 0.6, side * (side + 1)).reshape(side, side + 1)
