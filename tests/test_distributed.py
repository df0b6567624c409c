import os
import time

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from tests.distributed import run_ranks


def add_ranks(rank: int, offset: int) -> torch.Tensor:
    value = torch.tensor([float(rank + offset)])
    dist.all_reduce(value)
    return value


def fail_on_second_rank(rank: int) -> None:
    if rank == 1:
        raise ValueError("this rank is out of luck")
    dist.barrier()


def die_on_second_rank(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def sleep_forever(rank: int) -> None:
    time.sleep(1000)


def fit(rank: int, folder: str) -> tuple[int, int, torch.Tensor]:
    model = BoringModel()
    torch.manual_seed(rank)
    with torch.no_grad():
        model.layer.weight.normal_()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.fit(model)
    return trainer.global_rank, trainer.world_size, model.layer.weight.detach()


def test_each_rank_returns_its_own_result():
    assert run_ranks(add_ranks, 2, 10) == [torch.tensor([21.0])] * 2


def test_a_lightning_trainer_finds_the_ranks(tmp_path):
    (rank0, world0, weight0), (rank1, world1, weight1) = run_ranks(fit, 2, str(tmp_path))
    assert (rank0, world0, rank1, world1) == (0, 2, 1, 2)
    assert torch.equal(weight0, weight1)


def test_an_error_of_one_rank_is_shown():
    with pytest.raises(AssertionError, match=r"(?s)rank 1: Traceback.*ValueError: this rank is out of luck"):
        run_ranks(fail_on_second_rank)


def test_a_rank_that_dies_is_reported():
    with pytest.raises(AssertionError, match="rank 1: died without a word, exit code 7"):
        run_ranks(die_on_second_rank)


def test_a_rank_that_hangs_is_stopped_and_its_stack_shown():
    with pytest.raises(AssertionError, match=r"(?s)rank 0: still running.*timeout 4 s.*in sleep_forever"):
        run_ranks(sleep_forever, timeout=4.0)
