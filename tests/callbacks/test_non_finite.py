import math
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.checkpoint_io import load_checkpoint
from callbacks.non_finite import NonFiniteGuard, NonFiniteLossError
from tests.distributed import run_ranks


class Fragile(BoringModel):
    """Breaks at one batch of one rank, in the loss or in the gradient alone."""

    def __init__(self, at, loss=math.nan, rank=0, in_gradient=False):
        super().__init__()
        self.at, self.bad_loss, self.bad_rank, self.in_gradient = at, loss, rank, in_gradient
        self.before = None

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).pow(2).mean()
        if (self.current_epoch, batch_idx) == self.at and self.global_rank == self.bad_rank:
            self.before = {name: value.clone() for name, value in self.layer.state_dict().items()}
            # The derivative of a square root at 0 is infinite, times 0 not a number.
            loss = loss + (0 * self.layer.weight).sqrt().sum() if self.in_gradient else loss * self.bad_loss
        return loss


def fit(model, folder, guard=None, data=None, **options):
    arguments = {"max_epochs": 2, "limit_train_batches": 4, "limit_val_batches": 0, "devices": 1} | options
    checkpoints = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=0, save_last=True)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[guard or NonFiniteGuard(), checkpoints], **arguments,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)


def message_on_rank(rank, folder, at_rank):
    with pytest.raises(NonFiniteLossError) as error:
        fit(Fragile((0, 2), rank=at_rank), folder, devices=2, strategy="ddp")
    return str(error.value)


@pytest.mark.parametrize(("loss", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_bad_loss_stops_before_the_update_and_names_the_last_checkpoint(tmp_path, loss, text):
    model = Fragile((1, 2), loss)
    message = (
        rf"the loss is {text} at step 6 \(epoch 1, batch 2\); training stopped before the weights were updated "
        rf"with it. The last good checkpoint is {tmp_path}/last.ckpt. Try a lower learning rate"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        fit(model, tmp_path)
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 6
    for name, value in model.layer.state_dict().items():
        assert torch.equal(value, model.before[name])
        assert torch.equal(value, checkpoint["state_dict"][f"layer.{name}"])


def test_a_bad_gradient_under_a_good_loss_stops(tmp_path):
    model = Fragile((0, 1), in_gradient=True)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss is finite but its gradient is not, at step 1 \(epoch 0, batch"
    ):
        fit(model, tmp_path)
    assert torch.isfinite(model.layer.weight).all()
    free = Fragile((0, 1), in_gradient=True)
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 2"):
        fit(free, tmp_path, NonFiniteGuard(gradients=False))


def test_the_batch_is_named_under_accumulation(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 1 \(epoch 0, batch 2\)"):
        fit(Fragile((0, 2)), tmp_path, accumulate_grad_batches=2)


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    with pytest.raises(NonFiniteLossError, match="No checkpoint has been written yet"):
        fit(Fragile((0, 0)), tmp_path)


@pytest.mark.parametrize("at_rank", [0, 1])
def test_all_ranks_stop_and_name_the_rank(tmp_path, at_rank):
    first, second = run_ranks(message_on_rank, 2, str(tmp_path), at_rank)
    assert first == second
    assert f"the loss is nan at step 2 (epoch 0, batch 2, rank {at_rank})" in first


def test_a_healthy_run_is_left_alone(tmp_path):
    fit(Fragile(None), tmp_path)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 8


class Rows(NamedTuple):
    vectors: Tensor
    index: Tensor


class Data(LightningDataModule):
    """Batches of rows, alone or two streams side by side."""

    def __init__(self, streams=(), size=2):
        super().__init__()
        self.streams, self.size = streams, size

    def train_dataloader(self):
        batches = [Rows(torch.ones(self.size, 32), torch.arange(self.size) + self.size * number) for number in range(3)]
        if self.streams:
            batches = [dict.fromkeys(self.streams, batch) for batch in batches]
        return DataLoader(batches, batch_size=None)


class NamedData(Data):
    def sample_ids(self, split=None):
        return [f"{split}/{row}.png" for row in range(99)]


class LostNames(Data):
    def sample_ids(self, split=None):
        raise KeyError(split)


class TooFewNames(Data):
    def sample_ids(self, split=None):
        return ["only"]


class Terms(Fragile):
    """Has two terms of its loss, of which the second breaks."""

    def __init__(self, at):
        super().__init__(at)
        self.loss_terms = {}

    def training_step(self, batch, batch_idx):
        rows = next(iter(batch.values())) if isinstance(batch, dict) else batch
        loss = super().training_step(rows.vectors, batch_idx)
        self.loss_terms = {"supervised_loss": torch.tensor(1.0), "contrast_loss": loss.detach()}
        return loss


def message_of(folder, data, model=None):
    with pytest.raises(NonFiniteLossError) as error:
        fit(model or Terms((0, 1)), folder, data=data, limit_train_batches=1.0)
    return str(error.value).partition("; training")[0]


def test_the_term_and_the_samples_are_named(tmp_path):
    assert message_of(tmp_path, NamedData()) == (
        "the loss is nan at step 1 (epoch 0, batch 1, not finite: contrast_loss, samples of train: train/2.png, "
        "train/3.png)"
    )


def test_the_samples_of_each_stream_are_named(tmp_path):
    assert message_of(tmp_path, NamedData(("labeled", "unlabeled"))).endswith(
        "not finite: contrast_loss, samples of labeled: labeled/2.png, labeled/3.png, samples of unlabeled: "
        "unlabeled/2.png, unlabeled/3.png)"
    )


def test_of_many_samples_the_first_are_named(tmp_path):
    names = ", ".join(f"train/{row}.png" for row in range(12, 20))
    assert message_of(tmp_path, NamedData(size=12)).endswith(f"samples of train: {names}, ...)")


@pytest.mark.parametrize("data", [Data, LostNames, TooFewNames])
@pytest.mark.parametrize("streams", [(), ("labeled", "unlabeled")])
def test_names_that_cannot_be_had_hide_nothing(tmp_path, data, streams):
    message = message_of(tmp_path, data(streams))
    assert message == "the loss is nan at step 1 (epoch 0, batch 1, not finite: contrast_loss)"


def test_a_module_without_terms_has_its_samples_named(tmp_path):
    class Plain(Fragile):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch.vectors, batch_idx)

    assert message_of(tmp_path, NamedData(), Plain((0, 0))).endswith(
        "(epoch 0, batch 0, samples of train: train/0.png, train/1.png)"
    )


def test_under_accumulation_the_bad_batch_s_own_terms_and_samples_are_named(tmp_path):
    with pytest.raises(NonFiniteLossError) as error:
        fit(Terms((0, 0)), tmp_path, data=NamedData(), limit_train_batches=1.0, accumulate_grad_batches=2)
    assert "batch 0, not finite: contrast_loss, samples of train: train/0.png, train/1.png)" in str(error.value)


def named_message_on_rank(rank, folder):
    model = Terms((0, 1))
    model.bad_rank = 1
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "limit_train_batches": 1.0}
    with pytest.raises(NonFiniteLossError) as error:
        fit(model, folder, data=RankedData(rank), **options)
    return str(error.value)


class RankedData(NamedData):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def sample_ids(self, split=None):
        return [f"rank {self.rank}, row {row}" for row in range(99)]


def test_all_ranks_name_the_samples_of_the_rank_that_failed(tmp_path):
    first, second = run_ranks(named_message_on_rank, 2, str(tmp_path))
    assert first == second
    assert "rank 1, not finite: contrast_loss, samples of train: rank 1, row 2, rank 1, row 3)" in first
