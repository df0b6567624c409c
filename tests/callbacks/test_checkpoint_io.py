import errno
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks import checkpoint_io
from callbacks.checkpoint_io import AtomicCheckpointIO, CheckpointError, load_checkpoint
from tests.distributed import quick_processes


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "good.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(3000.0), "epoch": 3}, path)
    return path


def fit(folder, **options):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_train_batches=2, limit_val_batches=0, default_root_dir=folder, plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip
    trainer.fit(BoringModel())
    return trainer


def test_what_is_saved_is_loaded(saved):
    checkpoint = AtomicCheckpointIO().load_checkpoint(saved)
    assert checkpoint["epoch"] == 3
    assert torch.equal(checkpoint["weights"], torch.arange(3000.0))
    assert torch.equal(torch.load(saved, weights_only=True)["weights"], torch.arange(3000.0))
    assert os.listdir(saved.parent) == ["good.ckpt"]


def test_a_trainer_saves_and_resumes_through_it(tmp_path):
    trainer = fit(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)])
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == trainer.global_step == 2
    assert not list(tmp_path.rglob("*.part"))


def test_saving_goes_through_the_target_folder_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "no such folder"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt") == {"epoch": 1}


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@pytest.mark.parametrize("room", [0, 700, 5000])
def test_a_full_disk_is_reported_and_changes_nothing(saved, monkeypatch, room):
    before = saved.read_bytes()
    save = torch.save
    monkeypatch.setattr(checkpoint_io.torch, "save", lambda obj, file: save(obj, FullDisk(file, room)))
    message = rf"No space left on device: checkpoint not written, older checkpoints are untouched; .*{saved}"
    with pytest.raises(OSError, match=message) as error:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(3000)}, saved)
    assert error.value.errno == errno.ENOSPC
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["good.ckpt"]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_training_on_a_disk_that_runs_full_keeps_its_last_checkpoint(small_disk):
    room = AtomicCheckpointIO()
    room.save_checkpoint({"filler": torch.zeros(50_000)}, small_disk / "filler.bin")
    with pytest.raises(OSError, match="checkpoint not written") as error:
        fit(small_disk, max_epochs=30, callbacks=[ModelCheckpoint(dirpath=small_disk, save_top_k=-1, save_last=True)])
    assert error.value.errno == errno.ENOSPC
    files = sorted(small_disk.iterdir())
    assert [path for path in files if path.suffix not in (".ckpt", ".bin")] == []
    checkpoints = [path for path in files if path.suffix == ".ckpt"]
    assert len(checkpoints) >= 2
    assert all(load_checkpoint(path)["global_step"] > 0 for path in checkpoints)


def test_a_missing_file_names_what_there_is(saved):
    with pytest.raises(FileNotFoundError, match=r"lost.ckpt: no such checkpoint; .* has good.ckpt"):
        AtomicCheckpointIO().load_checkpoint(saved.with_name("lost.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        load_checkpoint(saved.parent / "nowhere" / "a.ckpt")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello", lambda b: b[:-90]])
def test_a_damaged_file_is_named_with_another_one(saved, damage):
    path = saved.with_name("damaged.ckpt")
    path.write_bytes(damage(saved.read_bytes()))
    size = path.stat().st_size
    with pytest.raises(CheckpointError, match=rf"damaged.ckpt: not a readable checkpoint \({size} bytes; .*good.ckpt"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_foreign_objects_are_refused_unless_asked_for(tmp_path):
    torch.save({"path": Path("x")}, tmp_path / "objects.ckpt")
    with pytest.raises(
        CheckpointError, match=r"objects.ckpt: holds a Python object \(pathlib.*pass weights_only=False"
    ):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "objects.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "objects.ckpt", weights_only=False)
    assert loaded == {"path": Path("x")}


def test_something_that_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match=r"list.ckpt: holds a list, expected the dictionary of a checkpoint"):
        load_checkpoint(tmp_path / "list.ckpt")


def save_forever(path, count):
    for step in range(1_000_000):
        AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.full((300_000,), float(step))}, path)
        count.value = step


def test_a_kill_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    context = quick_processes()
    count = context.Value("i", 0)
    process = context.Process(target=save_forever, args=(path, count))
    process.start()
    while count.value < 3:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    checkpoint = load_checkpoint(path)
    assert checkpoint["step"] >= 3
    assert torch.equal(checkpoint["weights"], torch.full((300_000,), float(checkpoint["step"])))
