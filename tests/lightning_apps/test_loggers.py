"""Loggers write into the run folder and go on there."""

import csv

import pytest

from lightning_apps import loggers
from lightning_apps.bolt import APP
from lightning_apps.errors import UserError
from lightning_apps.loggers import MetricsFile, choose_loggers, make_logger, wandb_is_offline
from lightning_apps.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, "fit", resumed=False)


def rows(tmp_path):
    with (tmp_path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_a_resumed_run_follow_those_before_its_checkpoint(tmp_path):
    first = MetricsFile(tmp_path)
    for step in range(4):
        first.log_metrics({"loss": 10.0 - step}, step)
    first.finalize("killed")
    again = MetricsFile(tmp_path)
    again.experiment.truncate(2)
    again.log_metrics({"loss": 1.0, "other": 5.0}, 2)
    again.finalize("success")
    assert [(row["step"], row["loss"], row["other"]) for row in rows(tmp_path)] == [
        ("0", "10.0", ""),
        ("1", "9.0", ""),
        ("2", "1.0", "5.0"),
    ]


def test_no_logger_where_none_is_wanted(folder):
    assert choose_loggers(False, folder) is False


@pytest.mark.parametrize("name", ["csv", "CSVLogger"])
def test_the_metrics_file_alone(folder, name):
    chosen = choose_loggers(name, folder)
    assert [type(logger) for logger in chosen] == [MetricsFile]
    assert chosen[0].log_dir == str(folder.path)


@pytest.mark.parametrize("name", ["tensorboard", "TensorBoardLogger"])
def test_tensorboard_beside_the_metrics_file(folder, name):
    board, metrics = choose_loggers(name, folder)
    assert board.log_dir.startswith(str(folder.path))
    assert isinstance(metrics, MetricsFile)


def test_an_unknown_logger_lists_the_known(folder):
    with pytest.raises(UserError, match=r"--trainer\.logger mlflow: expected one of .*csv.*tensorboard.*wandb"):
        make_logger("mlflow", folder)


@pytest.mark.parametrize(
    ("environment", "offline"),
    [
        ({}, True),
        ({"WANDB_API_KEY": "k"}, False),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "online"}, False),
    ],
)
def test_wandb_is_offline_without_credentials(monkeypatch, tmp_path, environment, offline):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_is_offline() is offline


def test_credentials_in_netrc_count(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai\n login user\n password secret\n")
    netrc.chmod(0o600)
    assert not wandb_is_offline()


def test_offline_is_said_in_one_line(monkeypatch, tmp_path, folder):
    said = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(loggers, "rank_zero_info", said.append)
    make_logger("wandb", folder)
    assert said == ["W&B: no credentials found, logging offline (wandb login switches to online)."]


def test_a_command_closes_its_run_so_that_the_next_one_may_go_on_with_it(tmp_path):
    import wandb

    from lightning_apps.cli import main

    short = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1", "--callbacks.probes", "null"]
    short += ["--callbacks.checkpoint.monitor", "null", "--callbacks.pictures", "null", "--trainer.max_epochs", "1"]
    short += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    assert main(APP, ["fit", "--run.root", str(tmp_path), *short]) == 0
    assert wandb.run is None
    last = tmp_path / "bolt/bolt/checkpoints/last.ckpt"
    assert main(APP, ["fit", "--ckpt_path", str(last), "--trainer.max_epochs", "2"]) == 0
    assert wandb.run is None
