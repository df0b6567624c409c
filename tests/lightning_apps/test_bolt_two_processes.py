"""BOLT through the command line on two gloo processes, watched by a callback of the user's own."""

import csv
from pathlib import Path

import pytest
import torch

from tests.lightning_apps.commands import last, run, run_python

pytestmark = pytest.mark.slow

WATCH = '''
import torch
from lightning.pytorch import Callback

class Watch(Callback):
    """Note what this rank saw: its permutations, its images, and its weights at the end."""

    def on_fit_start(self, trainer, pl_module):
        self.permutations, self.rows, self.steps = [], [], []
        sample = pl_module.online.perturbation.sample
        def noted(*args, **kwargs):
            found = sample(*args, **kwargs)
            self.permutations.append(found)
            return found
        pl_module.online.perturbation.sample = noted

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append(batch.index)

    def on_train_end(self, trainer, pl_module):
        torch.save({"permutations": torch.stack(self.permutations[:5]), "rows": torch.stack(self.rows),
                    "state": pl_module.state_dict()}, f"rank-{trainer.global_rank}.pt")
'''
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "watch.py").write_text(WATCH)
    short = ["--trainer.limit_train_batches", "5", "--callbacks.probes.every_n_epochs", "1", "--data.batch_size", "64"]
    run_python(folder, "fit", *TWO, *short, "--trainer.max_epochs", "1", "--trainer.callbacks+=watch.Watch")
    return folder


@pytest.fixture(scope="module")
def ranks(work):
    return [torch.load(work / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_processes_write_into_one_run_folder(work):
    runs = [path.name for path in (work / "runs/bolt").iterdir() if path.is_dir()]
    assert runs == ["bolt"]
    assert len(list((work / "runs/bolt/bolt/wandb").glob("offline-run-*"))) == 1


def test_weights_and_target_are_the_same_on_both_ranks(ranks):
    first, second = (rank["state"] for rank in ranks)
    moved = [name for name in first if name.startswith("target.") and "running" not in name and "num_b" not in name]
    assert len(moved) > 20
    for name in [*moved, *(name for name in first if name.startswith("online.encoder"))]:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def test_images_and_perturbations_differ_between_ranks(ranks):
    first, second = ranks
    assert not set(first["rows"].flatten().tolist()) & set(second["rows"].flatten().tolist())
    assert first["permutations"].shape == second["permutations"].shape
    assert not torch.equal(first["permutations"], second["permutations"])


def test_the_probe_counts_each_sample_once(work):
    table = sorted((work / "runs/bolt/bolt/media/val/probe/classes").glob("*.csv"))[-1]
    with table.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert sum(int(float(row["support"])) for row in found) == 179


def test_metrics_on_two_processes_equal_those_on_one(work):
    trained = last(work / "runs/bolt/bolt/metrics.csv", "val/main")
    one = work / "runs/bolt/bolt/validate/metrics.csv"
    run(work, "validate", "--ckpt_path", "last")
    assert last(one, "val/main") == pytest.approx(trained, abs=1e-6)
    knn = last(one, "val/knn_acc")
    run_python(work, "validate", "--ckpt_path", "last", *TWO)
    assert last(one, "val/main") == pytest.approx(trained, abs=1e-6)
    assert last(one, "val/knn_acc") == pytest.approx(knn, abs=1e-6)
