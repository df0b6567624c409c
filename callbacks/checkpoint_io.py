"""Checkpoints that are never half-written, and are read without running foreign code."""

import errno
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from callbacks.atomic_files import atomic_write


class CheckpointError(RuntimeError):
    """A checkpoint file that cannot be used, with the path and a way out in the message."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints through a temporary file in the target folder; load plain values and tensors only.

    Lightning's own plugin collects the file in memory and passes it through the system's temporary folder, which may
    be small and on another disk. Here it is streamed to its folder, synced, and renamed. Remote addresses
    (``s3://...``) go the way of the base class.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``, all or nothing.

        Args:
            checkpoint: What Lightning's ``dump_checkpoint`` returns.
            path: Target file.
            storage_options: Unsupported, as in the base class.

        Raises:
            OSError: If the disk is full or the folder cannot be written. Older checkpoints are as they were.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_write(path) as file:
                _save(checkpoint, file)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno or 0)}: checkpoint not written, older checkpoints are untouched; "
                "free some space or choose another folder, then resume from the last one",
                str(path),
            ) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; see :func:`load_checkpoint`. ``weights_only`` of None means True."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only is not False)
        return load_checkpoint(path, map_location, weights_only is not False)


def load_checkpoint(
    path: str | os.PathLike[str],
    map_location: str | torch.device | Callable[..., Any] = "cpu",
    weights_only: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint file.

    Args:
        path: The file.
        map_location: Where tensors go, as for ``torch.load``.
        weights_only: Accept numbers, strings, lists, dictionaries and tensors only, nothing that runs code.

    Returns:
        The dictionary in the file.

    Raises:
        FileNotFoundError: If there is no such file, with those that are in its folder.
        CheckpointError: If the file is damaged, holds other objects, or is no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; {_siblings(path)}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path}: holds a Python object ({foreign[1]}) besides plain values and tensors, and reading such a "
                "file can run code. If you trust its origin, pass weights_only=False"
            ) from error
        raise _damaged(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # Sought beyond the end of a file that was cut off.
        if error.errno == errno.EINVAL:
            raise _damaged(path, error) from error
        raise
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, expected the dictionary of a checkpoint")
    return checkpoint


def _save(checkpoint: dict[str, Any], file: Any) -> None:
    """``torch.save``, which hides an error of the disk behind one of its own bookkeeping."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__} {error}".split(". ")[0].strip()
    return CheckpointError(
        f"{path}: not a readable checkpoint ({path.stat().st_size} bytes; {reason}); "
        f"it may be cut off or of another kind. Use another one: {_siblings(path)}"
    )


def _siblings(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = sorted(entry.name for entry in folder.glob("*.ckpt") if entry.name != path.name)
    return f"{folder} has {', '.join(names[:10])}" if names else f"{folder} has no other .ckpt file"
