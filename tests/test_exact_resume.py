"""A run that is interrupted anywhere and resumed equals the uninterrupted one to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.noisy_training import NoisyData, NoisyRegression, Record, equal, train

SINGLE, COMBINED, SHORT_FIRST = (20,), (20, 8), (4, 20)
ONE_PROCESS = {
    "single": (SINGLE, {}),
    "combined": (COMBINED, {}),
    "combined, shorter loader first": (SHORT_FIRST, {}),
    "accumulation": (SINGLE, {"accumulate_grad_batches": 2}),
    "combined, accumulation": (COMBINED, {"accumulate_grad_batches": 2}),
    "validation twice an epoch": (SINGLE, {"val_check_interval": 2}),
    "validation every second epoch": (SINGLE, {"check_val_every_n_epoch": 2, "max_epochs": 3}),
    "no validation": (SINGLE, {"limit_val_batches": 0}),
    "reloaded loaders": (COMBINED, {"reload_dataloaders_every_n_epochs": 1}),
    "part of the data": (COMBINED, {"limit_train_batches": 4}),
    "limited by steps": (SINGLE, {"max_epochs": -1, "max_steps": 13}),
    "limited by steps, no validation": (COMBINED, {"max_epochs": -1, "max_steps": 13, "limit_val_batches": 0}),
}
TWO_RANKS = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}


def differences(full: Record, resumed: Record, place: str) -> list[str]:
    """Name what a run resumed at ``place`` did differently from the rest of the uninterrupted run."""
    batches, events = full.places[place]
    found = []
    if resumed.batches != full.batches[batches:]:
        found.append(f"batches {resumed.batches} instead of {full.batches[batches:]}")
    if resumed.events != full.events[events:]:
        found.append(f"events {resumed.events} instead of {full.events[events:]}")
    found += [
        f"logged {key} {value} instead of {full.logged.get(key)}"
        for key, value in resumed.logged.items()
        if value != full.logged.get(key)
    ]
    found += [name for name in full.final if not equal(full.final[name], resumed.final[name])]
    return [f"resumed at {place}: {text}" for text in found]


def unfinished_places(full: Record, options: dict[str, Any]) -> list[str]:
    """Places before the last allowed step: after it a run limited by steps does not even begin again."""
    last_step = options.get("max_steps", -1)
    return [place for place, (_, events) in full.places.items() if full.events[events - 1][2] != last_step]


def resume_everywhere(
    folder: Path, lengths: tuple[int, ...], workers: int, persistent: bool, **options: Any
) -> list[str]:
    """Compare a run with the runs that continue from each of its checkpoints."""

    def data() -> NoisyData:
        return NoisyData(lengths, workers=workers, persistent=persistent)

    full = train(folder, data(), save=True, **options)
    return [
        text
        for place in unfinished_places(full, options)
        for text in differences(full, train(folder, data(), resume=folder / f"{place}.ckpt", **options), place)
    ]


def die_everywhere(folder: Path, lengths: tuple[int, ...], workers: int, persistent: bool, **options: Any) -> list[str]:
    """Compare a run with one that dies after each checkpoint and is resumed from that one."""

    def data() -> NoisyData:
        return NoisyData(lengths, workers=workers, persistent=persistent)

    full = train(folder / "full", data(), save=True, **options)
    patched, resume = Record(), None
    for place in [*unfinished_places(full, options), None]:
        part = train(folder / "parts", data(), save=True, resume=resume, stop_after=place, **options)
        patched.batches += part.batches
        patched.events += part.events
        patched.logged |= part.logged
        resume = folder / "parts" / f"{place}.ckpt"
    return [
        f"{name} {getattr(patched, name)} instead of {getattr(full, name)}"
        for name in ("batches", "events", "logged")
        if getattr(patched, name) != getattr(full, name)
    ] + [name for name in full.final if not equal(full.final[name], part.final[name])]


@pytest.mark.parametrize(("lengths", "options"), ONE_PROCESS.values(), ids=ONE_PROCESS.keys())
def test_resume_from_every_checkpoint(tmp_path, lengths, options):
    assert resume_everywhere(tmp_path, lengths, 0, False, **options) == []


@pytest.mark.parametrize(("lengths", "options"), ONE_PROCESS.values(), ids=ONE_PROCESS.keys())
def test_interruption_after_every_checkpoint(tmp_path, lengths, options):
    assert die_everywhere(tmp_path, lengths, 0, False, **options) == []


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True], ids=["new workers", "persistent workers"])
@pytest.mark.parametrize("lengths", [(12,), (8, 4)], ids=["single", "combined"])
@pytest.mark.parametrize("compare", [resume_everywhere, die_everywhere])
def test_resume_with_workers(tmp_path, compare, lengths, persistent):
    assert compare(tmp_path, lengths, 2, persistent) == []


def resume_on_rank(
    rank: int, folder: str, lengths: tuple[int, ...], workers: int, options: dict[str, Any]
) -> list[str]:
    return resume_everywhere(Path(folder), lengths, workers, workers > 0, **TWO_RANKS, **options)


@pytest.mark.parametrize("lengths", [(24,), (24, 8)], ids=["single", "combined"])
def test_resume_on_two_ranks(tmp_path, lengths):
    assert run_ranks(resume_on_rank, 2, str(tmp_path), lengths, 0, {"accumulate_grad_batches": 2}) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(24,), (24, 8)], ids=["single", "combined"])
def test_resume_on_two_ranks_with_workers(tmp_path, lengths):
    assert run_ranks(resume_on_rank, 2, str(tmp_path), lengths, 2, {}, timeout=150) == [[], []]


def plain_run(rank: int, folder: str, options: dict[str, Any]) -> Record:
    model = NoisyRegression(dropout=0.0, momentum=0.0)
    return train(Path(folder), NoisyData((24,)), model=model, **options)


def test_two_ranks_equal_one_process_that_accumulates_two_batches(tmp_path):
    one = plain_run(0, str(tmp_path), {"accumulate_grad_batches": 2})
    first, second = run_ranks(plain_run, 2, str(tmp_path), TWO_RANKS)
    alternating = [batch[2] for pair in zip(first.batches, second.batches, strict=True) for batch in pair]
    assert alternating == [batch[2] for batch in one.batches]
    assert equal(first.final["weights"], second.final["weights"])
    for name, weight in one.final["weights"].items():
        if name != "batches_seen":
            torch.testing.assert_close(first.final["weights"][name], weight, rtol=1e-5, atol=1e-5)
    validation = {key: value for key, value in one.logged.items() if key[0] == "val/loss"}
    assert len(validation) == 2
    for key, value in validation.items():
        assert first.logged[key] == second.logged[key] == pytest.approx(value, rel=1e-5)
