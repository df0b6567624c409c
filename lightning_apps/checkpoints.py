"""What a checkpoint says of itself, read before anything is instantiated."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_apps.errors import UserError
from lightning_apps.run_folder import CHECKPOINT_KEY, NOT_CARRIED


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint says of itself.

    Args:
        path: The file.
        config: The configuration of the run that wrote it (`model`, `data`, `callbacks`, `trainer`, ...).
        facts: What the data said of itself.
        data_description: What predictions for other data need to know of it, as JSON; None where nothing is known.
        hyper_parameters: What its module was built with.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    data_description: str | None = None
    hyper_parameters: dict[str, Any] = field(default_factory=dict)

    def layer(self, subcommand: str) -> dict[str, Any]:
        """The part of the configuration that a command on this checkpoint starts from.

        A resumed `fit` takes everything; other commands take the model, the data and the callbacks, not the devices.
        """
        keys = [key for key in self.config if key not in NOT_CARRIED]
        if subcommand != "fit":
            keys = [key for key in keys if key in ("model", "data", "callbacks", "seed_everything")]
        return {key: self.config[key] for key in keys}


def read_checkpoint(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU, its tensors memory-mapped.

    Args:
        path: The file.
        weights_only: Refuse anything but tensors and plain values.

    Raises:
        UserError: Not a readable checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "It may be cut short: take another checkpoint of the same folder."
        if isinstance(error, pickle.UnpicklingError) and "eights" in str(error):
            hint = "If you trust who wrote it, load it with --weights_only false."
        raise UserError(f"--ckpt_path {path}: not a readable checkpoint ({reason}). {hint}") from error
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise UserError(f"--ckpt_path {path}: holds no 'state_dict'; it is not a Lightning checkpoint")
    return dict(content)


def describe_checkpoint(path: Path, app: str, weights_only: bool = True) -> CheckpointFacts:
    """Read what a checkpoint says of itself, and check that this app wrote it.

    Raises:
        UserError: Not readable, or a checkpoint of another app.
    """
    content = read_checkpoint(path, weights_only)
    mark = content.get(CHECKPOINT_KEY) or {}
    other = mark.get("app", app)
    if other != app:
        raise UserError(
            f"--ckpt_path {path}: was written by the app '{other}', not by '{app}'. "
            f"Use it with: python -m lightning_apps.{other}"
        )
    return CheckpointFacts(
        path,
        mark.get("config") or {},
        mark.get("facts") or {},
        mark.get("data_description"),
        dict(content.get("hyper_parameters") or {}),
    )


def conflicts(
    checkpoint: Mapping[str, Any],
    used: Mapping[str, Any],
    given: str = "given",
    kept: str = "checkpoint",
    prefix: str = "",
) -> list[str]:
    """Settings whose value in use differs from the checkpoint's, one line each.

    Args:
        checkpoint: What the checkpoint says; keys that it lacks are no conflict.
        used: The configuration in use.
        given: Name of what is in use.
        kept: Name of what it is compared with.
        prefix: Dotted key of both.
    """
    lines = []
    for key, before in checkpoint.items():
        if key not in used:
            continue
        after, name = used[key], f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += conflicts(before, after, given, kept, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {_brief(after)} ({given}) instead of {_brief(before)} ({kept})")
    return lines


def _brief(value: Any) -> str:
    return str(value.get("class_path", value)) if isinstance(value, Mapping) else repr(value)
