"""Vectors in clusters, one per class: data and modules small enough to check by hand."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    index: Tensor


class Rows(Dataset):
    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Batch:
        return Batch(self.x[row], self.labels[row], torch.tensor(row))


class Clusters(LightningDataModule):
    """Three clusters; under DDP each loader repeats samples to fill up, as PyTorch's own sampler does."""

    class_names = ("round", "long", "odd")
    num_classes = 3
    main_metric = "balanced_acc"

    def __init__(self, train: int = 61, val: int = 31, unlabelled: int = 5, noise: float = 1.5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        centres = 2 * torch.randn(3, 6, generator=generator)
        self.splits = {}
        for name, size in (("train", train), ("val", val)):
            labels = torch.randint(0, 3, (size,), generator=generator)
            x = centres[labels] + noise * torch.randn(size, 6, generator=generator)
            labels[:unlabelled] = -1
            self.splits[name] = Rows(x, labels)
        self.world: tuple[int, int] | None = None

    def _loader(self, split: str) -> DataLoader:
        rows = self.splits[split]
        sampler = None
        if self.trainer is not None and self.trainer.world_size > 1:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            sampler = DistributedSampler(rows, world, rank, shuffle=False)
        return DataLoader(rows, batch_size=8, sampler=sampler)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    test_dataloader = predict_dataloader = val_dataloader

    def probe_dataloader(self) -> DataLoader:
        return self._loader("train")


class Encoder(LightningModule):
    """An encoder whose features probes judge."""

    feature_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.ModuleDict()
        self.layer = nn.Linear(6, 4)

    def extract_features(self, images: Tensor) -> Tensor:
        return self.layer(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer(batch[0]) + 0.1 * torch.randn(len(batch[0]), 4)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"features": self.extract_features(batch[0]), "labels": batch.labels, "index": batch.index}

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"features": self.extract_features(batch[0]), "index": batch.index}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Classifier(Encoder):
    """Classifies by the first three features."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        probabilities = self.layer(batch[0])[:, :3].softmax(1)
        return {"probabilities": probabilities, "labels": batch.labels, "index": batch.index}

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"probabilities": self.layer(batch[0])[:, :3].softmax(1), "index": batch.index}
