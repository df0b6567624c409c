import os
import socket
import stat
import time

import pytest

from callbacks.atomic_files import atomic_bytes, atomic_text, atomic_write
from tests.distributed import quick_processes


def test_files_appear_complete_and_alone(tmp_path):
    atomic_text(tmp_path / "new" / "a.txt", "größer\n")
    atomic_bytes(tmp_path / "new" / "b.bin", b"\x00\x01")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "größer\n".encode()
    assert (tmp_path / "new" / "b.bin").read_bytes() == b"\x00\x01"
    assert sorted(os.listdir(tmp_path / "new")) == ["a.txt", "b.bin"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    atomic_text(tmp_path / "atomic", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")]
    assert modes[0] == modes[1]


def test_an_error_in_the_body_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "w") as file:
        print("new", 1 / 0, file=file, flush=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_readers_see_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_an_unwritable_target_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"Is a directory while writing: '.*folder'"):
        atomic_text(tmp_path / "folder", "x")


def test_only_modes_that_write_a_new_file():
    with pytest.raises(ValueError, match="mode is 'a', expected 'w' or 'wb'"), atomic_write("x", "a"):
        pass


def write_half(path, writing):
    with atomic_write(path, "w") as file:
        file.write("half")
        file.flush()
        writing.set()
        time.sleep(60)


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    context = quick_processes()
    writing = context.Event()
    process = context.Process(target=write_half, args=(path, writing))
    process.start()
    assert writing.wait(60)
    process.kill()
    process.join()
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    atomic_text(path, "new")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "new"


def test_temporary_files_of_living_or_foreign_processes_stay(tmp_path):
    living = tmp_path / f".a.txt.{socket.gethostname()}.{os.getppid()}.part"
    foreign = tmp_path / ".a.txt.another-machine.999999999.part"
    for path in (living, foreign):
        path.write_text("")
    atomic_text(tmp_path / "a.txt", "new")
    assert living.exists()
    assert foreign.exists()
