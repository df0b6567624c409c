"""Commands of the apps in processes of their own, outside the checkout, and what they leave."""

import atexit
import csv
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from lightning_apps.checkpoints import read_checkpoint
from tests.fresh_process import Starter

TIMEOUT = 240.0


def clean_environment() -> dict[str, str]:
    """The environment without what would let the checkout, this run's folder or its W&B service in."""
    foreign = ("PYTHONPATH", "LIGHTNING_APPS_RUN_FOLDER", "WANDB_SERVICE")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return {**kept, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


@cache
def starter() -> Starter:
    """What starts the commands of this test process."""
    started = Starter(clean_environment())
    atexit.register(started.close)
    return started


def run(
    folder: Path, *arguments: str, check: bool = True, app: str = "bolt", **environment: str
) -> subprocess.CompletedProcess:
    """A command from a folder of its own, in a new process that has the imports behind it."""
    every = {**clean_environment(), **environment}
    done = starter().run(folder, f"lightning_apps.{app}", *arguments, environment=every, timeout=TIMEOUT)
    return _checked(done, check)


def run_python(folder: Path, *arguments: str, check: bool = True, app: str = "bolt") -> subprocess.CompletedProcess:
    """`python -m lightning_apps.<app> ...` word for word: what is not imported in time fails here."""
    command = [sys.executable, "-m", f"lightning_apps.{app}", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    return _checked(done, check)


def _checked(done: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def last(path: Path, key: str) -> float:
    """The last value that a metrics file holds of a metric."""
    return float([row[key] for row in rows(path) if row.get(key)][-1])


def restored(cls: type, checkpoint: Path) -> torch.nn.Module:
    """The module with the weights of a checkpoint, built from its hyper-parameters alone."""
    content = read_checkpoint(checkpoint)
    module = cls(**{key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")})
    module.load_state_dict(content["state_dict"])
    return module.eval()
