import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

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


def fit(model, folder, guard=None, **options):
    arguments = {"max_epochs": 2, "limit_train_batches": 4, "limit_val_batches": 0, "devices": 1} | options
    checkpoints = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=0, save_last=True)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[guard or NonFiniteGuard(), checkpoints], **arguments,
    )  # fmt: skip
    trainer.fit(model)


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
