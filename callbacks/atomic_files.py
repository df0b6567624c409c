"""Files that are either complete or as they were before, whatever interrupts the writing."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file in the folder of ``path`` that takes its place once everything is on the disk.

    If the body raises (or the process dies), ``path`` keeps its old content, or stays absent.

    Args:
        path: The file to write. Its folder is created.
        mode: ``"wb"`` or ``"w"``.
        options: Further arguments of ``open``, such as ``newline``; text is UTF-8 unless an ``encoding`` is given.

    Yields:
        The open file.

    Raises:
        ValueError: If the mode is not one that writes a new file.
        OSError: If the file cannot be written, naming ``path``; the temporary file is removed.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode is {mode!r}, expected 'w' or 'wb'")
    if mode == "w":
        options.setdefault("encoding", "utf-8")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{os.strerror(error.errno)} while writing", str(path)) from error
        raise
    _sync_folder(path.parent)


def atomic_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, all or nothing."""
    with atomic_write(path, "w") as file:
        file.write(text)


def atomic_table(path: str | os.PathLike[str], table: "DataFrame") -> None:
    """Write a table without its index, as parquet where ``path`` ends so, otherwise as CSV, all or nothing."""
    with atomic_write(path) as file:
        if Path(path).suffix == ".parquet":
            table.to_parquet(file, index=False)
        else:
            table.to_csv(file, index=False)


def atomic_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, all or nothing."""
    with atomic_write(path, "wb") as file:
        file.write(data)


def _remove_leftovers(path: Path) -> None:
    """Delete temporary files of this target that a killed process of this machine has left behind."""
    prefix = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.iterdir():
        process = leftover.name.removeprefix(prefix).removesuffix(".part")
        if leftover.name.startswith(prefix) and process.isdigit() and not _is_running(int(process)):
            with suppress(OSError):
                leftover.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
