import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.checkpoint_io import load_checkpoint
from callbacks.graceful_stop import GracefulStop
from tests.distributed import quick_processes, run_ranks
from tests.noisy_training import NoisyData, Record, equal, train

TWO_RANKS = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}


class Kick(Callback):
    """Send this process a signal in the middle of one batch."""

    def __init__(self, number, at, times=1, rank=0, validation=False):
        self.number, self.at, self.times, self.rank, self.validation = number, at, times, rank, validation

    def kick(self, trainer, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at and trainer.global_rank == self.rank:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_before_backward(self, trainer, pl_module, loss):
        if not self.validation:
            self.kick(trainer, trainer.fit_loop.batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.validation:
            self.kick(trainer, batch_idx)


def run(folder, *callbacks, resume=None, length=20, **options) -> Record:
    keeper = ModelCheckpoint(dirpath=folder, save_last=True)
    options = {"enable_checkpointing": True} | options
    return train(folder, NoisyData((length,)), callbacks=[GracefulStop(), *callbacks, keeper], resume=resume, **options)


def assert_continues(full: Record, stopped: Record, resumed: Record) -> None:
    if stopped.events[-1][0] == "batch start":
        # The run ends when the next batch is announced, which is not trained on.
        stopped.events.pop(), stopped.batches.pop()
    assert stopped.batches + resumed.batches == full.batches
    assert stopped.events + resumed.events == full.events
    assert stopped.logged | resumed.logged == full.logged
    assert not stopped.logged.keys() & resumed.logged.keys()
    assert equal(full.final, resumed.final)


@pytest.fixture(autouse=True)
def _handlers_are_handed_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("number", "at", "validation", "options", "step"),
    [
        (signal.SIGINT, (0, 2), False, {}, 3),
        (signal.SIGTERM, (0, 2), False, {}, 3),
        (signal.SIGTERM, (0, 4), False, {}, 5),
        (signal.SIGTERM, (1, 4), False, {}, 10),
        (signal.SIGTERM, (0, 1), True, {}, 5),
        (signal.SIGINT, (0, 2), False, {"accumulate_grad_batches": 2}, 2),
        (signal.SIGTERM, (0, 1), False, {"val_check_interval": 2}, 2),
    ],
    ids=["ctrl-c", "sigterm", "last batch", "last batch of all", "validation", "accumulation", "before validation"],
)
def test_a_signal_leaves_a_checkpoint_that_continues_exactly(tmp_path, capfd, number, at, validation, options, step):
    full = run(tmp_path / "full", **options)
    stopped = run(tmp_path, Kick(number, at, validation=validation), **options)
    assert stopped.exit_code == 128 + number
    assert f"{number.name}: finishing this step and saving; once more to stop at once." in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == step
    assert_continues(full, stopped, run(tmp_path, resume=tmp_path / "last.ckpt", **options))
    assert not list(tmp_path.glob("last-v*"))


def test_the_same_signal_twice_stops_at_once(tmp_path):
    stopped = run(tmp_path, Kick(signal.SIGINT, (0, 2), times=2))
    assert stopped.exit_code == 1
    assert stopped.events[-1][0] == "batch start"
    assert not (tmp_path / "last.ckpt").exists()


def test_a_file_of_an_earlier_run_stays(tmp_path):
    (tmp_path / "last.ckpt").write_text("precious")
    run(tmp_path, Kick(signal.SIGTERM, (0, 2)))
    assert (tmp_path / "last.ckpt").read_text() == "precious"
    assert load_checkpoint(tmp_path / "last-v1.ckpt")["global_step"] == 3


def test_a_linked_last_checkpoint_becomes_a_file(tmp_path):
    keeper = ModelCheckpoint(dirpath=tmp_path, save_last="link", filename="epoch-{epoch}")
    train(
        tmp_path,
        NoisyData(),
        callbacks=[GracefulStop(), Kick(signal.SIGTERM, (1, 2)), keeper],
        enable_checkpointing=True,
    )
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 8
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert load_checkpoint(tmp_path / "epoch-epoch=0.ckpt")["global_step"] == 5


def test_without_model_checkpoint_there_is_still_a_file(tmp_path):
    stopped = train(tmp_path, NoisyData(), callbacks=[GracefulStop(), Kick(signal.SIGTERM, (0, 2))])
    assert stopped.exit_code == 143
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


def stop_on_rank(rank, folder, resume, kicked_rank):
    folder = Path(folder)
    if resume:
        return run(folder, resume=folder / "last.ckpt", **TWO_RANKS)
    if kicked_rank is None:
        return run(folder / "full", **TWO_RANKS)
    return run(folder, Kick(signal.SIGTERM, (0, 1), rank=kicked_rank), **TWO_RANKS)


@pytest.mark.parametrize("kicked_rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, kicked_rank):
    full = run_ranks(stop_on_rank, 2, str(tmp_path), False, None)
    stopped = run_ranks(stop_on_rank, 2, str(tmp_path), False, kicked_rank)
    assert [record.exit_code for record in stopped] == [143, 0]
    resumed = run_ranks(stop_on_rank, 2, str(tmp_path), True, None)
    for records in zip(full, stopped, resumed, strict=True):
        assert_continues(*records)


class Slow(Callback):
    """Make each batch last, so that a kill can meet it, and count them."""

    def __init__(self, count):
        self.count = count

    def on_before_backward(self, trainer, pl_module, loss):
        self.count.value += 1
        time.sleep(0.05)


def train_until_killed(folder, count):
    keeper = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=0, save_last=True)
    train(folder, NoisyData(), callbacks=[GracefulStop(), Slow(count), keeper], enable_checkpointing=True)


@pytest.mark.parametrize("batches", [3, 6])
def test_a_killed_process_continues_exactly_from_its_last_checkpoint(tmp_path, batches):
    context = quick_processes()
    count = context.Value("i", 0)
    process = context.Process(target=train_until_killed, args=(tmp_path, count))
    process.start()
    while count.value < batches:
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    full = run(tmp_path / "full")
    resumed = run(tmp_path, resume=tmp_path / "last.ckpt")
    assert 0 < len(resumed.batches) < len(full.batches)
    assert resumed.batches == full.batches[-len(resumed.batches) :]
    assert equal(full.final, resumed.final)


class Die(Callback):
    """Kill rank 1 in its third batch."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def die_on_rank(rank, folder):
    run(Path(folder), Die(), **TWO_RANKS)


def test_a_rank_that_dies_is_explained_by_the_others(tmp_path):
    with pytest.raises(AssertionError, match="rank 1: died without a word, exit code -9") as error:
        run_ranks(die_on_rank, 2, str(tmp_path))
    assert re.search(r"Rank 0 lost the connection to another rank, which probably died", str(error.value))


def test_only_errors_about_connections_are_explained():
    trainer = SimpleNamespace(world_size=2, global_rank=0)
    lost, other = RuntimeError("Connection closed by peer [127.0.0.1]:3"), RuntimeError("shapes differ")
    for error in (lost, other):
        GracefulStop().on_exception(trainer, None, error)
    assert len(lost.__notes__) == 1
    assert not hasattr(other, "__notes__")


def launch(tmp_path: Path, *arguments: str) -> subprocess.Popen:
    """Start a script whose two ranks are launched by Lightning, in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, __file__, str(tmp_path), *arguments],
        stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["ctrl-c in a terminal", "kill of the main process"])
def test_signals_to_launched_ranks(tmp_path, whole_group):
    process = launch(tmp_path, "wait")
    for line in process.stdout:
        if "third batch" in line:
            break
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == (130 if whole_group else 143), output
    assert "continue with --ckpt_path" in output
    assert 3 <= load_checkpoint(tmp_path / "last.ckpt")["global_step"] < 20


@pytest.mark.slow
def test_a_launched_rank_that_dies_ends_the_run(tmp_path):
    process = launch(tmp_path, "die")
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "lost the connection to another rank" in output or "terminated with code -9" in output


class Wait(Callback):
    """Tell when the third batch begins, and be slow."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == 0 and trainer.global_step == 2:
            print("third batch", flush=True)
        time.sleep(0.3)


if __name__ == "__main__":
    record = run(Path(sys.argv[1]), Die() if sys.argv[2] == "die" else Wait(), length=80, **TWO_RANKS)
    sys.exit(record.exit_code)
