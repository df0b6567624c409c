import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.step_seed import StepSeed
from tests.distributed import run_ranks


class Draws(Callback):
    """Numbers drawn in each batch and loop."""

    def __init__(self):
        self.train, self.other = [], []

    def draw(self):
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    def on_train_batch_start(self, *args):
        self.train.append(self.draw())

    def on_validation_start(self, *args):
        self.other.append(self.draw())

    on_test_start = on_predict_start = on_validation_start


def draws(folder, seed, function="fit", **options):
    record = Draws()
    arguments = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[StepSeed(seed), record],
        **(arguments | options),
    )  # fmt: skip
    getattr(trainer, function)(BoringModel())
    return record


def draws_of_rank(rank, folder):
    return draws(folder, 1, devices=2, strategy="ddp").train


def test_numbers_are_a_function_of_the_seed_and_the_step(tmp_path):
    first = draws(tmp_path, 1)
    torch.rand(5), np.random.rand(5), random.random()
    again, other = draws(tmp_path, 1), draws(tmp_path, 2)
    assert first.train == again.train
    assert first.other == again.other
    assert not set(first.train) & set(other.train)
    for numbers in zip(*first.train, *first.other, strict=False):
        assert len(set(numbers)) == len(numbers)
    assert len(set(first.train)) == 6
    assert len(set(first.other)) == 2


def test_batches_of_one_step_differ(tmp_path):
    assert len(set(draws(tmp_path, 1, accumulate_grad_batches=3).train)) == 6


def test_ranks_draw_different_numbers(tmp_path):
    first, second = run_ranks(draws_of_rank, 2, str(tmp_path))
    assert first == draws(tmp_path, 1, devices=1).train
    assert not set(first) & set(second)


@pytest.mark.parametrize("function", ["test", "predict"])
def test_evaluation_loops_are_seeded(tmp_path, function):
    assert draws(tmp_path, 1, function).other == draws(tmp_path, 1, function).other


def test_no_seed_means_that_of_lightning(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    seed_everything(5, verbose=False)
    assert draws(tmp_path, None).train == draws(tmp_path, 5).train


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="StepSeed: seed is -3, expected 0 or more"):
        StepSeed(-3)
