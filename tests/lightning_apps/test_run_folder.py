"""The run folder: one per run, the same for every process, reused by what continues the run."""

import json
import os
import time

import pytest

from lightning_apps import run_folder
from lightning_apps.errors import UserError
from lightning_apps.run_folder import ENVIRONMENT, RunFolder, open_inner_folder, open_run_folder, resolve_checkpoint


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch):
    for name in (ENVIRONMENT, "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def start(root, name="run", subcommand="fit", checkpoint=None, named=False):
    os.environ.pop(ENVIRONMENT, None)
    return open_run_folder(root, "bolt", name, subcommand, checkpoint, named)


def checkpoint_of(folder):
    folder.checkpoints.mkdir(exist_ok=True)
    path = folder.checkpoints / "last.ckpt"
    path.write_bytes(b"")
    return path


def test_a_second_run_gets_a_suffix(tmp_path):
    names = [start(tmp_path).path.name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]
    assert json.loads((tmp_path / "bolt/run-2/run.json").read_text())["app"] == "bolt"


def test_a_resume_reuses_the_folder_of_its_checkpoint(tmp_path):
    first = start(tmp_path)
    again = start(tmp_path, name="other", checkpoint=checkpoint_of(first))
    assert again.path == first.path
    assert again.resumed


def test_a_name_asked_for_starts_a_run_of_its_own_from_a_checkpoint(tmp_path):
    first = start(tmp_path)
    branch = start(tmp_path, name="branch", checkpoint=checkpoint_of(first), named=True)
    assert branch.path == tmp_path / "bolt/branch"
    assert not branch.resumed
    assert start(tmp_path, name="run", checkpoint=checkpoint_of(first), named=True).path == first.path


def test_commands_on_a_checkpoint_write_into_a_folder_of_their_own(tmp_path):
    first = start(tmp_path)
    predict = start(tmp_path, subcommand="predict", checkpoint=checkpoint_of(first))
    assert predict.path == first.path
    assert predict.output == first.path / "predict"


def test_a_checkpoint_outside_a_run_does_not_draw_the_run_to_its_folder(tmp_path):
    stray = tmp_path / "checkpoints" / "last.ckpt"
    stray.parent.mkdir()
    stray.write_bytes(b"")
    assert start(tmp_path / "runs", checkpoint=stray).path == tmp_path / "runs/bolt/run"


def test_started_processes_get_the_folder_by_environment(tmp_path):
    first = start(tmp_path)
    os.environ["LOCAL_RANK"] = "1"
    assert open_run_folder(tmp_path, "bolt", "run", "fit", None).path == first.path


def test_processes_of_a_launcher_wait_for_rank_zero(tmp_path, monkeypatch):
    os.environ.update(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1234", TORCHELASTIC_RUN_ID="x/y")
    first = start(tmp_path)
    os.environ["RANK"] = "1"
    assert start(tmp_path).path == first.path
    pointer = next((tmp_path / "bolt").glob(".launch-*"))
    monkeypatch.setattr(run_folder.os, "getppid", lambda: -1)
    monkeypatch.setattr(run_folder, "_LAUNCH_WAIT_S", 1.0)
    with pytest.raises(UserError, match="rank zero did not announce"):
        start(tmp_path)  # what another launch from the same address has left
    monkeypatch.undo()
    os.environ.update(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1234", TORCHELASTIC_RUN_ID="x/y")
    long_ago = time.time() - 3600
    os.utime(pointer, (long_ago, long_ago))
    monkeypatch.setattr(run_folder, "_LAUNCH_WAIT_S", 0.2)
    with pytest.raises(UserError, match="rank zero did not announce its run folder"):
        start(tmp_path)


def test_last_is_the_newest_run_or_the_named_one(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    paths = [checkpoint_of(first), checkpoint_of(second)]
    os.utime(paths[0], (1, 1))
    assert resolve_checkpoint("last", tmp_path, "bolt", None) == tmp_path / "bolt/run-2/checkpoints/last.ckpt"
    assert resolve_checkpoint("last", tmp_path, "bolt", "run") == tmp_path / "bolt/run/checkpoints/last.ckpt"
    assert resolve_checkpoint(str(first.path), tmp_path, "bolt", None) == paths[0]


@pytest.mark.parametrize("given", ["best", "nowhere.ckpt"])
def test_a_missing_checkpoint_says_where_it_looked(tmp_path, given):
    with pytest.raises(UserError, match=rf"--ckpt_path {given}: no "):
        resolve_checkpoint(given, tmp_path, "bolt", None)


def test_a_run_that_was_stopped_in_the_one_it_began_with(tmp_path):
    begun = start(tmp_path)
    inner = open_inner_folder(begun.path / "base", "bolt", "fit").path
    checkpoint_of(RunFolder(inner, "fit", resumed=False))
    for given, name in (("last", begun.path.name), ("last", None), (str(begun.path), None)):
        with pytest.raises(UserError) as told:
            resolve_checkpoint(given, tmp_path, "bolt", name)
        assert f"finish that with `fit --ckpt_path {inner}`, then" in str(told.value)
        assert str(told.value).endswith(f"start the run again with `--model.base {inner}`")
    assert resolve_checkpoint(str(inner), tmp_path, "bolt", None) == inner / "checkpoints/last.ckpt"


def test_only_what_a_run_began_with_is_taken_for_it(tmp_path):
    """Neither a run in the folder of all runs nor another app's, nor any folder with a checkpoint."""
    begun = start(tmp_path)
    checkpoint_of(begun)
    other = begun.path / "other"
    checkpoint_of(open_inner_folder(other / "base", "ankge", "fit"))
    (other / "stray/checkpoints").mkdir(parents=True)
    (other / "stray/checkpoints/last.ckpt").write_bytes(b"")
    for folder in (begun.path.parent, other):
        with pytest.raises(UserError) as told:
            resolve_checkpoint(str(folder), tmp_path, "bolt", None)
        assert str(told.value).endswith(f"no such file: {folder / 'checkpoints/last.ckpt'}")


def test_a_folder_that_cannot_be_made_names_the_remedy(tmp_path):
    (tmp_path / "bolt").write_text("a file")
    with pytest.raises(UserError, match=r"cannot make the run folder .*bolt.*choose another --run\.root"):
        start(tmp_path)


def test_a_new_folder_without_content_goes_away(tmp_path):
    folder = start(tmp_path)
    folder.discard_if_empty()
    assert not folder.path.exists()
    kept = start(tmp_path)
    (kept.path / "config.yaml").write_text("x")
    kept.discard_if_empty()
    assert kept.path.exists()
