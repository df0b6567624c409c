"""The folder of a run: fixed before anything is instantiated, the same for loggers, checkpoints and all processes."""

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from callbacks.atomic_files import atomic_text
from lightning_apps.config_errors import init_arguments
from lightning_apps.errors import UserError

ENVIRONMENT = "LIGHTNING_APPS_RUN_FOLDER"
RECORD = "run.json"
OUTER = "part_of"  # the run that an inner one, whose record has this key, is part of
CONFIG = "config.yaml"
CHECKPOINT_KEY = "lightning_apps"
# What belongs to one call and not to the run.
NOT_CARRIED = ("ckpt_path", "run", "app", "weights_only")
_LAUNCH_WAIT_S = 60.0
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


@dataclass(frozen=True)
class RunFolder:
    """Where a command writes.

    Args:
        path: Folder of the run.
        subcommand: `fit` writes into the run itself, every other command into a folder of its own name inside it.
        resumed: Whether the run was there before and goes on.
    """

    path: Path
    subcommand: str
    resumed: bool

    @property
    def output(self) -> Path:
        """Where this command puts what it makes."""
        return self.path if self.subcommand == "fit" else self.path / self.subcommand

    @property
    def checkpoints(self) -> Path:
        """Where `fit` keeps its checkpoints."""
        return self.path / "checkpoints"

    def record(self) -> dict[str, Any]:
        """What the run noted of itself; empty where it could not be read."""
        try:
            return json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def discard_if_empty(self) -> None:
        """Remove a new folder in which nothing but its record was written."""
        if self.resumed or not is_main_process():
            return
        if {entry.name for entry in self.path.iterdir()} <= {RECORD}:
            (self.path / RECORD).unlink(missing_ok=True)
            self.path.rmdir()


def is_main_process() -> bool:
    """Whether this process is rank zero, as far as the environment tells before any trainer exists."""
    return all(int(os.environ.get(name, "0") or 0) == 0 for name in _RANKS)


def run_of_checkpoint(checkpoint: Path, app: str) -> Path | None:
    """The run folder a checkpoint lies in, if it lies in one of this app."""
    folder = checkpoint.resolve().parent.parent
    record = folder / RECORD
    if checkpoint.parent.name != "checkpoints" or not record.is_file():
        return None
    return folder if RunFolder(folder, "fit", True).record().get("app") == app else None


def resolve_checkpoint(given: str, root: Path, app: str, name: str | None) -> Path:
    """Turn what was given as `ckpt_path` into a file.

    Args:
        given: A file, the folder of a run, or `last` or `best` (of the newest run, or of the run called `name`).
        root: Folder of all runs.
        app: Name of the app.
        name: Name of the run, where one was given.

    Raises:
        UserError: No such checkpoint.
    """
    if given not in ("last", "best"):
        path = Path(given)
        if path.is_dir():
            path = path / "checkpoints" / "last.ckpt"
        if not path.is_file():
            inner = _inner_run(Path(given).glob("*/checkpoints/last.ckpt"), app)
            raise UserError(f"--ckpt_path {given}: no such file: {path.resolve()}{inner}")
        return path
    pattern = f"{name or '*'}/checkpoints/{given}.ckpt"
    found = sorted((root / app).glob(pattern), key=lambda file: file.stat().st_mtime)
    if not found:
        inner = _inner_run((root / app).glob(f"{name or '*'}/*/checkpoints/last.ckpt"), app)
        raise UserError(
            f"--ckpt_path {given}: no checkpoint {root / app / pattern}; give the path of a .ckpt file{inner}"
        )
    return found[-1]


def _inner_run(checkpoints: Iterable[Path], app: str) -> str:
    """What to do where a run was stopped in another one that it began with, such as that of its base model."""
    inner = [file for file in checkpoints if _is_inner(file.parent.parent, app)]
    if not inner:
        return ""
    folder = max(inner, key=lambda file: file.stat().st_mtime).parent.parent
    return (
        f". The run was stopped in the one it began with: finish that with `fit --ckpt_path {folder}`, then start the "
        f"run again with `--model.{folder.name} {folder}`"
    )


def _is_inner(folder: Path, app: str) -> bool:
    record = RunFolder(folder, "fit", True).record()
    return record.get("app") == app and OUTER in record


def open_run_folder(
    root: Path, app: str, name: str, subcommand: str, checkpoint: Path | None, named: bool = False
) -> RunFolder:
    """Fix the run folder of a command.

    A resumed `fit` and every command on a checkpoint of a run use that run's folder, unless another name was asked for
    explicitly (`named`); anything else gets a new folder
    `<root>/<app>/<name>`, with a number behind it where that exists. Processes that Lightning starts get the folder by
    environment variable; processes that a launcher such as torchrun or SLURM starts wait for rank zero's choice.

    Raises:
        UserError: The folder cannot be made.
    """
    given = os.environ.get(ENVIRONMENT)
    if given:
        return RunFolder(Path(given), subcommand, resumed=True)
    existing = run_of_checkpoint(checkpoint, app) if checkpoint else None
    if named and existing is not None and existing.name != name:
        existing = None
    if not is_main_process():
        return RunFolder(existing or _await_choice(root / app), subcommand, resumed=True)
    path = existing or _make_folder(root / app, name)
    os.environ[ENVIRONMENT] = str(path)
    _announce_choice(root / app, path)
    folder = RunFolder(path, subcommand, resumed=existing is not None)
    if existing is None:
        _write_record(path, app, path.name)
    return folder


def open_inner_folder(path: Path, app: str, subcommand: str) -> RunFolder:
    """The folder of a run that is part of another one, in whose folder it lies: it can be resumed as one of its own."""
    if is_main_process():
        _write_record(path, app, f"{path.parent.name}-{path.name}", **{OUTER: path.parent.name})
    return RunFolder(path, subcommand, resumed=False)


def _write_record(path: Path, app: str, name: str, **more: str) -> None:
    record = {"app": app, "name": name, **more, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    atomic_text(path / RECORD, json.dumps({**record, "command": shlex.join(sys.argv)}, indent=2) + "\n")


def _make_folder(parent: Path, name: str) -> Path:
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(
                f"cannot make the run folder {path}: {error.strerror}; choose another --run.root"
            ) from error
        else:
            return path.resolve()


def _launch_key() -> str | None:
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")
    found = [os.environ[name].replace("/", "_") for name in names if os.environ.get(name)]
    return "-".join(found) or None


def _announce_choice(parent: Path, path: Path) -> None:
    key = _launch_key()
    if key:
        choice = {"path": str(path), "host": socket.gethostname(), "launcher": os.getppid()}
        atomic_text(parent / f".launch-{key}", json.dumps(choice))


def _await_choice(parent: Path) -> Path:
    pointer = parent / f".launch-{_launch_key()}"
    start = time.time()
    while time.time() - start < _LAUNCH_WAIT_S:
        if pointer.is_file() and pointer.stat().st_mtime > start - _LAUNCH_WAIT_S:
            choice = json.loads(pointer.read_text(encoding="utf-8"))
            # A launcher uses the same address again, but the processes of one launch have one parent on each host.
            if choice["host"] != socket.gethostname() or choice["launcher"] == os.getppid():
                return Path(choice["path"])
        time.sleep(0.1)
    raise UserError(f"rank zero did not announce its run folder in {pointer} within {_LAUNCH_WAIT_S:.0f} s")


def package_versions() -> dict[str, str]:
    """Version of every installed package that the suite stands on, and of Python."""
    versions = {"python": sys.version.split()[0]}
    wanted = {"lightning-apps", "lightning", "torch", "torchvision", "torchmetrics", "timm", "albumentations", "numpy"}
    wanted |= {"wandb", "jsonargparse", "scikit-learn", "pandas", "safetensors", "torch-geometric"}
    for name in sorted(wanted):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    versions["installed packages"] = str(sum(1 for _ in distributions()))
    return versions


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_CARRIED}


def _moved(value: Any, before: str, now: str) -> Any:
    """Plain values in which paths below one folder are paths below another."""
    if isinstance(value, dict):
        return {_moved(key, before, now): _moved(item, before, now) for key, item in value.items()}
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return now + value[len(before) :]
    return value


class RunRecorder(Callback):
    """Write the configuration and the versions into the run folder, and mark checkpoints with their app.

    Args:
        folder: The run folder.
        app: Name of the app.
        config: The configuration in use, as plain values.
        facts: What the data said of itself (class names, image size, normalisation), kept in checkpoints so that
            `export` needs no data.
        data_description: What predictions for other data need to know of it, as JSON, kept likewise for `predict`.
    """

    def __init__(
        self,
        folder: RunFolder,
        app: str,
        config: dict[str, Any],
        facts: dict[str, Any],
        data_description: str | None = None,
    ) -> None:
        self.folder = folder
        self.app = app
        self.config = config
        self.facts = facts
        self.data_description = data_description

    @rank_zero_only
    def _write(self) -> None:
        text = yaml.safe_dump(self.config, sort_keys=False)
        target = self.folder.output / CONFIG
        if self.folder.subcommand == "fit" and target.exists():
            if _settings(yaml.safe_load(target.read_text(encoding="utf-8"))) == _settings(self.config):
                return
            number = 1 + len(list(self.folder.path.glob("config.resume-*.yaml")))
            target = self.folder.path / f"config.resume-{number}.yaml"
        self.folder.output.mkdir(parents=True, exist_ok=True)
        atomic_text(target, text)
        atomic_text(self.folder.output / "versions.json", json.dumps(package_versions(), indent=2) + "\n")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record what is about to run."""
        if not trainer.fast_dev_run:
            self._write()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a run whose folder was moved go on with its own best and last checkpoint, instead of new ones."""
        if self.folder.subcommand == "fit" and self.folder.resumed:
            for state in checkpoint.get("callbacks", {}).values():
                if isinstance(state, dict) and Path(state.get("dirpath") or "").name == self.folder.checkpoints.name:
                    state.update(_moved(state, str(state["dirpath"]), str(self.folder.checkpoints)))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint which app and which configuration wrote it.

        Facts of the data that the module does not take are no hyper-parameters, so that `load_from_checkpoint` works.
        """
        checkpoint[CHECKPOINT_KEY] = {
            "app": self.app,
            "config": self.config,
            "facts": self.facts,
            "data_description": self.data_description,
        }
        known = init_arguments(f"{type(pl_module).__module__}.{type(pl_module).__qualname__}")
        settings = checkpoint.get("hyper_parameters", {})
        for name in (self.facts.keys() & settings.keys()) - set(known) if known else ():
            del settings[name]
