"""Plain BYOL on an MLP: the project of a stranger who follows the documented protocol and imports nothing of ours."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Pair(NamedTuple):
    online: Tensor
    target: Tensor
    online_difficulty: Tensor
    target_difficulty: Tensor


class Byol(LightningModule):
    """The two branches see the same vector under noise of different strength; strength is difficulty."""

    def __init__(self, inputs: int = 8, width: int = 16, lr: float = 0.05) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
        self.target = copy.deepcopy(self.online)
        self.predictor = nn.Linear(width, width)
        self.auxiliary = nn.ModuleDict()
        self.feature_dim = width
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        strengths = torch.rand(2, len(x), device=x.device)
        views = [x + 3 * r[:, None] * torch.randn_like(x) for r in strengths]
        features = [self.online(view) for view in views]
        with torch.no_grad():
            targets = [self.target(view) for view in views]
        loss = sum(2 - 2 * F.cosine_similarity(self.predictor(features[i]), targets[1 - i]).mean() for i in (0, 1))
        pairs = [Pair(features[i], targets[1 - i], strengths[i], strengths[1 - i]) for i in (0, 1)]
        objectives = {name: entry for name, entry in self.auxiliary.items() if getattr(entry, "is_objective", False)}
        for name, objective in objectives.items():
            output = objective(pairs)
            loss = loss + output.weight * output.loss
            self.log_dict({f"train/{name}_loss": output.loss, **{f"train/{k}": v for k, v in output.metrics.items()}})
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loader(rows: int = 32, batch_size: int = 8, inputs: int = 8, repeat: int = 1) -> DataLoader:
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).repeat(repeat, 1)
    return DataLoader(TensorDataset(x), batch_size=batch_size)


def quiet_trainer(folder: Any, **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in options.get("callbacks", ())),
        "default_root_dir": str(folder),
        "log_every_n_steps": 1,
    }
    return Trainer(**(defaults | options))
