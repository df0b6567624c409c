"""What a checkpoint brings to a command: settings below the explicit ones, and clear refusals."""

import pickle

import pytest
import torch
import yaml

from lightning_apps.bolt import APP
from lightning_apps.checkpoints import conflicts, describe_checkpoint
from lightning_apps.cli import AppCLI
from lightning_apps.config_files import SHIPPED
from lightning_apps.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint written with settings that differ from the shipped ones in three places."""
    config = yaml.safe_load((SHIPPED / "bolt.yaml").read_text())
    config["model"]["init_args"] |= {"lr": 0.25, "mix": 0.75}
    config["trainer"]["max_epochs"] = 7
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": {}, "lightning_apps": {"app": "bolt", "config": config, "facts": {}}}, path)
    return path


def composed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        AppCLI(APP, [*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_checkpoint_wins_over_shipped_defaults(capsys, checkpoint):
    for config in ([], ["--config", "bolt.yaml"]):
        used = composed(capsys, "test", "--ckpt_path", str(checkpoint), *config)
        assert used["model"]["init_args"]["lr"] == 0.25
        assert used["model"]["init_args"]["mix"] == 0.75
        assert used["ckpt_path"] == str(checkpoint)


def test_the_command_line_and_a_users_file_win_over_the_checkpoint(capsys, checkpoint, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {init_args: {mix: 0.5}}\n")
    arguments = ["--ckpt_path", str(checkpoint), "--model.lr", "0.5", "--config", "bolt.yaml", "--config", str(mine)]
    used = composed(capsys, "test", *arguments)
    assert used["model"]["init_args"]["lr"] == 0.5
    assert used["model"]["init_args"]["mix"] == 0.5


def test_only_fit_takes_the_training_settings_of_a_checkpoint(capsys, checkpoint):
    assert composed(capsys, "fit", "--ckpt_path", str(checkpoint))["trainer"]["max_epochs"] == 7
    assert composed(capsys, "validate", "--ckpt_path", str(checkpoint))["trainer"]["max_epochs"] is None


def test_without_config_fit_uses_the_apps_own_default(capsys):
    shipped = yaml.safe_load((SHIPPED / "bolt.yaml").read_text())
    used = composed(capsys, "fit")
    for key, value in shipped["model"]["init_args"].items():
        assert used["model"]["init_args"][key] == value
    assert used["trainer"]["max_epochs"] == shipped["trainer"]["max_epochs"]


def test_conflicts_are_named():
    before = {"model": {"init_args": {"lr": 0.1, "mix": 0.5}}, "data": {"init_args": {"root": None}}}
    after = {"model": {"init_args": {"lr": 0.2, "mix": 0.5}}, "data": {"init_args": {"root": "x"}}}
    assert conflicts(before, after) == [
        "model.init_args.lr: 0.2 (given) instead of 0.1 (checkpoint)",
        "data.init_args.root: 'x' (given) instead of None (checkpoint)",
    ]


def test_a_callback_that_comes_or_goes_is_a_conflict():
    before = {"callbacks": {"ranking": {"class_path": "callbacks.DifficultyRanking"}, "ema": None}}
    after = {"callbacks": {"ranking": None, "ema": {"class_path": "callbacks.EMATarget"}}}
    assert conflicts(before, after) == [
        "callbacks.ranking: None (given) instead of callbacks.DifficultyRanking (checkpoint)",
        "callbacks.ema: callbacks.EMATarget (given) instead of None (checkpoint)",
    ]


def test_a_partial_file_stands_on_the_shipped_default(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {init_args: {batch_size: 7}}\n")
    used = composed(capsys, "fit", "--config", str(mine), "--callbacks.ranking.weight", "0.7")
    assert used["data"]["init_args"]["batch_size"] == 7
    assert used["model"]["class_path"] == "modules.bolt.BOLT"
    assert used["callbacks"]["ranking"]["init_args"]["weight"] == 0.7


def test_options_may_stand_before_the_command(capsys):
    assert composed(capsys, "--config", "bolt/byol.yaml", "fit")["model"]["init_args"]["perturb"] is False


def test_a_file_of_the_same_name_here_is_used_only_when_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bolt.yaml").write_text("model: {init_args: {lr: 9.0}}\n")
    assert composed(capsys, "fit")["model"]["init_args"]["lr"] != 9.0


def test_last_is_looked_for_where_the_configuration_puts_runs(checkpoint, tmp_path, capsys):
    folder = tmp_path / "elsewhere/bolt/run/checkpoints"
    folder.mkdir(parents=True)
    checkpoint.rename(folder / "last.ckpt")
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"run: {{root: {tmp_path}/elsewhere}}\n")
    used = composed(capsys, "test", "--ckpt_path", "last", "--config", str(mine))
    assert used["ckpt_path"] == str(folder / "last.ckpt")


def test_a_checkpoint_of_another_app_names_that_app(tmp_path):
    path = tmp_path / "emo.ckpt"
    torch.save({"state_dict": {}, "lightning_apps": {"app": "emo"}}, path)
    with pytest.raises(UserError, match=r"was written by the app 'emo', not by 'bolt'.*lightning_apps\.emo"):
        describe_checkpoint(path, "bolt")


def test_a_checkpoint_of_another_model_of_the_app_points_to_init_from(checkpoint, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {class_path: modules.classification.ImageClassifier}\n")
    with pytest.raises(UserError, match=r"holds a modules\.bolt\.BOLT, but .* asks for a .*--model\.init_from instead"):
        AppCLI(APP, ["fit", "--ckpt_path", str(checkpoint), "--config", str(mine)])


def test_a_truncated_checkpoint_is_refused(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"some\.ckpt: not a readable checkpoint .*cut short"):
        describe_checkpoint(checkpoint, "bolt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Dangerous:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    path = tmp_path / "dangerous.ckpt"
    torch.save({"state_dict": {}, "x": Dangerous()}, path, pickle_module=pickle)
    with pytest.raises(UserError, match=r"not a readable checkpoint.*--weights_only false"):
        describe_checkpoint(path, "bolt")


def test_a_file_without_weights_is_refused(tmp_path):
    path = tmp_path / "list.ckpt"
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no 'state_dict'"):
        describe_checkpoint(path, "bolt")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("false", False),
        ("true", True),
        ("null", None),
        ("csv", "csv"),
        ("CSVLogger", "csv"),
        ("WandbLogger", "wandb"),
        ("[csv,tensorboard]", ["csv", "tensorboard"]),
    ],
)
def test_loggers_by_name_or_none(capsys, given, read):
    assert composed(capsys, "fit", "--trainer.logger", given)["trainer"]["logger"] == read
