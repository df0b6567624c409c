"""A stranger's classifier and its pictures, and what to ask of a network with bits, for the tests of quantization."""

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from callbacks import BitAllocation
from modules.quantization.attachment import input_quantizers, weight_quantizers
from tests.modules.quantization.small_networks import Residual, SmallNetwork, images

CLASSES = 5


def small_network(seed: int = 0) -> SmallNetwork:
    """Two residual blocks, the second with a shortcut of its own; all parameters are of layers or their norms."""
    torch.manual_seed(seed)
    network = SmallNetwork(Residual(8, 8), Residual(8, 12, 2), classes=CLASSES)
    network.head = nn.Linear(12, CLASSES)
    return network


class Classifier(LightningModule):
    """Takes (pictures, labels), has no datamodule and imports nothing of the suite."""

    def __init__(self, network: nn.Module | None = None, lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__()
        self.model = network or small_network()
        self.lr, self.momentum = lr, momentum
        self.losses: list[float] = []
        self.logits: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pictures, labels = batch
        loss = functional.cross_entropy(self.model(pictures), labels)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.logits.append(self.model(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def loader(count: int = 32, batch_size: int = 8, repeat: int = 1, seed: int = 0, **options: Any) -> DataLoader:
    """Smooth pictures of 16 x 16 in a fixed order; with ``repeat``, all batches can be alike."""
    pictures = images(count, seed).repeat(repeat, 1, 1, 1)
    labels = (torch.arange(count) % CLASSES).repeat(repeat)
    return DataLoader(TensorDataset(pictures, labels), batch_size=batch_size, **options)


def allocation(**options: Any) -> BitAllocation:
    """The callback for :class:`Classifier`, with few pictures."""
    return BitAllocation(**{"network": "model", "mean_bits": 5, "pictures": 16, **options})


def weight_bits(network: nn.Module) -> dict[str, int]:
    return {name: quantizer.width for name, quantizer in weight_quantizers(network).items()}


def input_bits(network: nn.Module) -> dict[str, int]:
    return {name: quantizer.width for name, quantizer in input_quantizers(network).items()}


def ranges(network: nn.Module) -> dict[str, tuple[float, float]]:
    """Least and largest input of each layer, as its quantizer remembers them."""
    return {name: (float(one.low), float(one.high)) for name, one in input_quantizers(network).items()}


def check_levels(network: nn.Module, bits: dict[str, int]) -> None:
    """Weights are whole multiples of a step that the largest of each channel gives, and so of few values."""
    for name, number in bits.items():
        layer, most = network.get_submodule(name), 2 ** (number - 1) - 1
        original = layer.parametrizations.weight.original.detach().flatten(1)
        step = original.abs().amax(1, keepdim=True) / most
        levels = (layer.weight.detach().flatten(1) / step).round()
        assert set(levels.unique().tolist()) <= set(range(-most, most + 1)), f"{name}: {number} bits"
        assert (levels.abs().amax(1) == most).all()
        torch.testing.assert_close(layer.weight.detach().flatten(1), (original / step).round() * step)


def check_budget(network: nn.Module, file: Path, mean_bits: float) -> None:
    """The bits of a file are those of the network, and spend of the budget not more than there is."""
    rows = yaml.safe_load(file.read_text())["layers"]
    found = weight_bits(network)
    assert {name: row["weight_bits"] for name, row in rows.items()} == found
    assert len(set(found.values())) > 1, "otherwise there was nothing to choose"
    spent = sum(row["parameters"] * found[name] for name, row in rows.items())
    total = sum(row["parameters"] for row in rows.values())
    assert mean_bits - 1 < spent / total <= mean_bits
