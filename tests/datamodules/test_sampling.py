from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.sampling import (
    EvaluationBatchSampler,
    SampleKey,
    StreamBatchSampler,
    TrainBatchSampler,
    resume_position,
)


def rows(batches):
    return [[key.index for key in batch] for batch in batches]


def flat(batches):
    return [row for batch in batches for row in batch]


def trainer_at(*, ready: int, processed: int, batches: int, last: bool) -> SimpleNamespace:
    """The counters of a trainer, as Lightning keeps them."""
    epochs = SimpleNamespace(current=SimpleNamespace(ready=ready, processed=processed))
    progress = SimpleNamespace(current=SimpleNamespace(processed=batches), is_last_batch=last)
    return SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_progress=epochs, epoch_loop=SimpleNamespace(batch_progress=progress))
    )


class Echo(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, key: SampleKey):
        return torch.tensor(key)


def test_each_epoch_and_pass_has_its_own_order_of_all_rows():
    sampler = TrainBatchSampler(12, 3, seed=1)
    first, second = list(sampler), list(sampler)
    sampler.set_epoch(1)
    third = list(sampler)
    orders = [flat(rows(batches)) for batches in (first, second, third)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [(batches[0][0].epoch, batches[0][0].pass_) for batches in (first, second, third)] == [
        (0, 0),
        (0, 1),
        (1, 0),
    ]
    assert rows(TrainBatchSampler(12, 3, seed=1)) == rows(first)
    assert rows(TrainBatchSampler(12, 3, seed=2)) != rows(first)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_take_turns_over_the_batches_of_one_process(world_size, drop_last):
    whole = rows(TrainBatchSampler(50, 4, seed=3, drop_last=drop_last))
    parts = [
        rows(TrainBatchSampler(50, 4, seed=3, drop_last=drop_last, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    together = [batch for turn in zip(*parts, strict=True) for batch in turn]
    if drop_last:
        assert together == whole[: len(whole) // world_size * world_size]
    else:
        assert together == (whole + whole)[: -(-len(whole) // world_size) * world_size]
        assert {row for batch in together for row in batch} == set(range(50))


def test_orders_are_those_of_numpy():
    order = np.random.default_rng((5, 2, 0)).permutation(9).tolist()
    assert rows(TrainBatchSampler(9, 4, seed=5, start_epoch=2, drop_last=False)) == [order[:4], order[4:8], order[8:]]
    assert rows(TrainBatchSampler(9, 4, seed=5, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_start_in_the_middle_leaves_out_what_is_done_and_keeps_the_length():
    whole = TrainBatchSampler(20, 4, seed=0)
    passes = [list(whole), list(whole)]
    late = TrainBatchSampler(20, 4, seed=0, start_epoch=0, start_batch=7)
    assert len(late) == 5
    assert list(late) == passes[1][2:]
    assert next(iter(late))[0].pass_ == 2


@pytest.mark.parametrize(
    ("counters", "position"),
    [
        ({"ready": 0, "processed": 0, "batches": 0, "last": False}, (0, 0)),
        ({"ready": 3, "processed": 2, "batches": 4, "last": False}, (2, 4)),
        ({"ready": 3, "processed": 2, "batches": 9, "last": True}, (3, 0)),
        ({"ready": 3, "processed": 3, "batches": 9, "last": True}, (3, 0)),
    ],
    ids=["fresh", "mid-epoch", "last batch", "epoch end"],
)
def test_the_position_comes_from_the_trainer(counters, position):
    trainer = trainer_at(**counters)
    assert resume_position(trainer) == position
    epoch, done = position
    sampler = TrainBatchSampler(20, 4, seed=0, trainer=trainer)
    expected = list(TrainBatchSampler(20, 4, seed=0, start_epoch=epoch, start_batch=done))
    # An iterator that is thrown away changes nothing.
    iter(sampler)
    assert list(sampler) == expected
    sampler.set_epoch(17)
    assert list(sampler) == expected


def test_no_trainer_means_the_beginning():
    assert resume_position(None) == (0, 0)


def test_lightning_finds_set_epoch():
    sampler = TrainBatchSampler(8, 2, seed=0)
    assert DataLoader(Echo(), batch_sampler=sampler).batch_sampler.sampler is sampler


def test_data_sets_get_keys():
    loader = DataLoader(Echo(), batch_sampler=TrainBatchSampler(10, 5, seed=0, start_epoch=3, shuffle=False))
    assert next(iter(loader)).tolist() == [[3, 0, row] for row in range(5)]


def stream_row(seed, stream, length, sample):
    """Row of one sample of the stream, as it is defined."""
    return int(np.random.default_rng((seed, stream, sample // length)).permutation(length)[sample % length])


@pytest.mark.parametrize(("length", "batch_size", "steps"), [(5, 2, 4), (7, 3, 1), (3, 7, 2), (50, 4, 3)])
def test_a_stream_goes_on_from_epoch_to_epoch(length, batch_size, steps):
    sampler = StreamBatchSampler(length, batch_size, steps, seed=4, stream=1)
    batches = [list(sampler) for _ in range(3)]
    assert [len(epoch) for epoch in batches] == [len(sampler)] * 3 == [steps] * 3
    assert flat(rows(batch for epoch in batches for batch in epoch)) == [
        stream_row(4, 1, length, sample) for sample in range(3 * steps * batch_size)
    ]
    for epoch, its_batches in enumerate(batches):
        for key_number, key in enumerate(flat(its_batches)):
            sample = epoch * steps * batch_size + key_number
            assert (key.epoch, key.pass_) == (epoch, sample // length)
    assert {len(batch) for epoch in batches for batch in epoch} == {batch_size}


def test_streams_and_seeds_differ_in_their_order():
    orders = [
        flat(rows(StreamBatchSampler(30, 30, 1, seed=seed, stream=stream))) for seed, stream in ((0, 0), (0, 1), (1, 0))
    ]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_stream_of_one_process_with_as_many_times_the_steps(world_size):
    for epoch in (0, 2):
        whole = rows(StreamBatchSampler(11, 2, 4 * world_size, seed=3, start_epoch=epoch))
        parts = [
            rows(StreamBatchSampler(11, 2, 4, seed=3, rank=rank, world_size=world_size, start_epoch=epoch))
            for rank in range(world_size)
        ]
        assert [batch for turn in zip(*parts, strict=True) for batch in turn] == whole


def test_a_stream_starts_in_the_middle_of_an_epoch():
    whole = StreamBatchSampler(7, 2, 5, seed=0)
    first, second = list(whole), list(whole)
    late = StreamBatchSampler(7, 2, 5, seed=0, start_epoch=0, start_batch=3)
    assert len(late) == 5
    assert list(late) == first[3:]
    assert list(late) == second
    late.set_epoch(0)
    assert list(late) == first
    late.set_epoch(1)
    assert list(late) == second
    assert late.sampler is late


@pytest.mark.parametrize(
    ("counters", "position"),
    [
        ({"ready": 3, "processed": 2, "batches": 4, "last": False}, (2, 4)),
        ({"ready": 3, "processed": 2, "batches": 5, "last": True}, (3, 0)),
    ],
)
def test_the_position_of_a_stream_comes_from_the_trainer(counters, position):
    epoch, done = position
    sampler = StreamBatchSampler(7, 2, 5, seed=0, trainer=trainer_at(**counters))
    expected = list(StreamBatchSampler(7, 2, 5, seed=0, start_epoch=epoch, start_batch=done))
    iter(sampler)
    assert list(sampler) == expected
    sampler.set_epoch(17)
    assert list(sampler) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length is 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"stream": -1}, "stream is -1, expected 0 or more"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0..1"),
        ({"trainer": SimpleNamespace(), "start_batch": 1}, "pass either trainer or start_epoch/start_batch"),
    ],
)
def test_a_stream_refuses_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        StreamBatchSampler(**{"length": 4, "batch_size": 2, "steps": 3, "seed": 0, **settings})


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_has_each_row_once_and_equal_counts(world_size):
    for length in range(world_size, 40):
        for batch_size in range(1, 7):
            parts = [
                rows(EvaluationBatchSampler(length, batch_size, rank=rank, world_size=world_size))
                for rank in range(world_size)
            ]
            samplers = [
                EvaluationBatchSampler(length, batch_size, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            assert {len(sampler) for sampler in samplers} == {len(parts[0])} == {len(part) for part in parts}
            together = [batch for turn in zip(*parts, strict=True) for batch in turn]
            assert flat(together) == list(range(length))
            sizes = [len(batch) for batch in together]
            assert min(sizes) >= 1
            assert max(sizes) <= max(batch_size, 2)


def test_evaluation_of_one_process_has_plain_batches():
    assert rows(EvaluationBatchSampler(7, 3)) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TrainBatchSampler(0, 4, seed=0), "length is 0, expected 1 or more"),
        (lambda: TrainBatchSampler(9, 0, seed=0), "batch_size is 0, expected 1 or more"),
        (lambda: TrainBatchSampler(9, 4, seed=-1), "seed is -1, expected 0 or more"),
        (lambda: TrainBatchSampler(9, 4, seed=0, rank=2, world_size=2), r"rank is 2, expected 0\.\.1 \(world_size 2\)"),
        (lambda: TrainBatchSampler(9, 4, seed=0, trainer=trainer_at(ready=0, processed=0, batches=0, last=False),
                                   start_epoch=1), "either trainer or start_epoch/start_batch"),
        (lambda: TrainBatchSampler(7, 4, seed=0, world_size=2),
         r"7 training samples make no batch of batch_size 4 for each of 2 rank\(s\); lower batch_size to at most 3"),
        (lambda: EvaluationBatchSampler(1, 4, world_size=2),
         r"1 evaluation sample\(s\) cannot be shared by 2 ranks; set trainer.devices to at most 1"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
