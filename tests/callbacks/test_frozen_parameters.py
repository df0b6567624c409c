"""Frozen parts are compared bit for bit, and never in an optimizer."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import FrozenParameters
from tests.callbacks.byol import quiet_trainer
from tests.distributed import run_ranks


class OnFrozenFeatures(LightningModule):
    """A head on frozen layers; ``harm`` is what a mistake does to these in the second step."""

    def __init__(self, harm=None, trained=("head",), frozen=("features",)):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.tables = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 1)
        self.harm, self.trained = harm, trained
        for name in frozen:
            self.get_submodule(name).requires_grad_(False).eval()

    def training_step(self, batch, batch_idx):
        self.features.eval()
        if self.harm is not None and batch_idx == 1:
            with torch.no_grad():
                self.harm(self)
        return self.head(self.features(batch[0])).square().mean()

    def configure_optimizers(self):
        parameters = [value for name in self.trained for value in self.get_submodule(name).parameters()]
        return torch.optim.SGD(parameters, lr=0.1)


def fit(folder, module, parts=("features",), **options):
    data = DataLoader(TensorDataset(torch.randn(12, 3, generator=torch.Generator().manual_seed(0))), batch_size=4)
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[FrozenParameters(list(parts))], **options)
    trainer.fit(module, data)


def test_a_part_that_stays_is_no_error(tmp_path):
    module = OnFrozenFeatures(frozen=("features", "tables"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(tmp_path, module, ("features", "tables"))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("head")), name


def nudge(module):
    """The smallest step that there is."""
    weight = module.features[0].weight
    weight[1, 1] = torch.nextafter(weight[1, 1], torch.tensor(torch.inf))


def count(module):
    module.features[1].num_batches_tracked += 1


@pytest.mark.parametrize(("harm", "name"), [(nudge, "0.weight"), (count, "1.num_batches_tracked")])
def test_a_parameter_or_buffer_that_changed_is_told(tmp_path, harm, name):
    with pytest.raises(RuntimeError, match=rf"FrozenParameters: features\.{name} changed in training"):
        fit(tmp_path, OnFrozenFeatures(harm))
    fit(tmp_path, OnFrozenFeatures(harm), parts=())


@pytest.mark.parametrize(
    "module",
    [
        OnFrozenFeatures(trained=("head", "features"), frozen=()),
        OnFrozenFeatures(trained=("head", "features")),
        OnFrozenFeatures(frozen=()),
    ],
    ids=["trained", "frozen but in the optimizer", "not frozen"],
)
def test_a_part_that_is_trained_is_told_before_the_first_step(tmp_path, module):
    module.harm = lambda _: pytest.fail("training began")
    with pytest.raises(RuntimeError, match=r"features\.0\.weight is trained; freeze it, or leave it out of 'parts'"):
        fit(tmp_path, module)


def test_a_part_that_is_not_there_is_told(tmp_path):
    with pytest.raises(AttributeError, match="backbone"):
        fit(tmp_path, OnFrozenFeatures(), ("backbone",))


def test_a_second_training_compares_anew(tmp_path):
    module = OnFrozenFeatures()
    fit(tmp_path, module)
    with torch.no_grad():
        nudge(module)
    fit(tmp_path, module)


def on_a_rank(rank, folder):
    def train(harm=None):
        fit(folder, OnFrozenFeatures(harm, frozen=("features", "tables")), strategy="ddp", devices=2)

    train()
    with pytest.raises(RuntimeError, match=r"features\.0\.weight changed in training"):
        train(nudge)
    return rank


def test_two_ranks(tmp_path):
    assert run_ranks(on_a_rank, 2, str(tmp_path)) == [0, 1]
