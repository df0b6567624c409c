"""Loggers that write into the run folder: W&B by default, offline by itself where there are no credentials."""

import csv
import netrc
import os
import sys
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricWriter
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_info

from lightning_apps.errors import UserError
from lightning_apps.run_folder import RunFolder

PROJECT = "lightning_apps"
NAMES = {
    "wandb": "wandb",
    "csv": "csv",
    "tensorboard": "tensorboard",
    "WandbLogger": "wandb",
    "CSVLogger": "csv",
    "TensorBoardLogger": "tensorboard",
}


class _ContinuingWriter(ExperimentWriter):
    """Metrics file that goes on where a resumed run left it."""

    def _check_log_dir_exists(self) -> None:
        if os.path.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def truncate(self, step: int) -> None:
        """Drop rows at or after a step: a resumed run writes them again."""
        if not os.path.isfile(self.metrics_file_path):
            return
        with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        kept = [row for row in rows if row.get("step") and int(row["step"]) < step]
        temporary = f"{self.metrics_file_path}.tmp"
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(temporary, self.metrics_file_path)


class MetricsFile(CSVLogger):
    """One `metrics.csv` in the run folder, continued by a resumed run.

    Args:
        folder: Folder of the file.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=str(folder), name="", version="", flush_logs_every_n_steps=20)

    @property
    @rank_zero_experiment
    def experiment(self) -> FabricWriter:
        """The writer of the file."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _ContinuingWriter(log_dir=self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run folder holds the whole configuration."""

    @property
    def log_dir(self) -> str:
        """The run folder itself, without a version below it."""
        return self.save_dir


def wandb_is_offline() -> bool:
    """Whether W&B would find no credentials: then it runs offline by itself."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] != "online"
    if os.environ.get("WANDB_API_KEY"):
        return False
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    return host not in known


def make_logger(kind: str, folder: RunFolder) -> Logger:
    """Build a logger that writes into the run folder.

    Args:
        kind: `wandb`, `csv` or `tensorboard`, or the class name of Lightning's logger.
        folder: The run folder.

    Raises:
        UserError: Unknown kind, or its package is not installed.
    """
    if kind not in NAMES:
        raise UserError(f"--trainer.logger {kind}: expected one of {', '.join(sorted(NAMES))}, true or false")
    output = folder.output
    if NAMES[kind] == "csv":
        return MetricsFile(output)
    if NAMES[kind] == "tensorboard":
        return _tensorboard(output)
    return _wandb(folder)


def _tensorboard(output: Path) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(save_dir=str(output), name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise UserError("--trainer.logger tensorboard: pip install 'lightning-apps[tensorboard]'") from error


def _wandb(folder: RunFolder) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    offline = wandb_is_offline()
    if offline and not os.environ.get("WANDB_MODE"):
        rank_zero_info("W&B: no credentials found, logging offline (wandb login switches to online).")
    record = folder.record()
    app, name = record.get("app", "run"), record.get("name", folder.path.name)
    created = "".join(character for character in record.get("created", "") if character.isdigit())
    folder.output.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        name=f"{app}/{name}",
        save_dir=str(folder.output),
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=f"{app}-{name}-{created}"[:120],
        resume="allow",
        offline=offline,
        job_type=folder.subcommand,
        group=app,
    )


def choose_loggers(choice: Any, folder: RunFolder) -> list[Logger] | bool:
    """Turn the configuration's choice into loggers.

    Args:
        choice: None or True for W&B beside `metrics.csv`; False for none; a name or list of names; ready loggers.
        folder: The run folder.
    """
    if choice is False:
        return False
    if choice is None or choice is True:
        choice = ["wandb", "csv"]
    given = choice if isinstance(choice, (list, tuple)) else [choice]
    loggers = [make_logger(item, folder) if isinstance(item, str) else item for item in given]
    if not any(isinstance(logger, CSVLogger) for logger in loggers):
        loggers.append(MetricsFile(folder.output))
    return loggers


def finish_wandb() -> None:
    """Close the W&B run of this process, so that a later command, also in this process, may go on with it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
