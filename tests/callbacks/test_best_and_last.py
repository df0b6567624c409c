"""The last checkpoint is that of the last epoch, the best one that of the best."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks import BestAndLastCheckpoint


class Counting(LightningModule):
    """Its metric is best after the second epoch."""

    def __init__(self, validates=True):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        if not validates:
            self.validation_step = None

    def training_step(self, batch, batch_idx):
        self.log("score", -abs(self.current_epoch - 1.0))
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("score", -abs(self.current_epoch - 1.0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, validates=True, ckpt_path=None, epochs=4, **options):
    options = {"monitor": "score", "mode": "max", **options}
    keeper = BestAndLastCheckpoint(dirpath=folder, **options)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[keeper],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        limit_val_batches=1 if validates else 0,
    )
    loader = DataLoader(torch.ones(3, 1), batch_size=1)
    trainer.fit(Counting(), loader, loader if validates else None, ckpt_path=ckpt_path)
    return keeper


def epoch_of(path):
    return torch.load(path, weights_only=True)["global_step"] // 3


@pytest.mark.parametrize("validates", [True, False])
def test_last_is_last_and_best_is_best(tmp_path, validates):
    keeper = fit(tmp_path, validates)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert epoch_of(tmp_path / "best.ckpt") == 2
    assert epoch_of(tmp_path / "last.ckpt") == 4
    assert keeper.best_model_path == str(tmp_path / "best.ckpt")


def test_a_resumed_run_goes_on_with_the_same_two_files(tmp_path):
    fit(tmp_path, epochs=3)
    fit(tmp_path, ckpt_path=tmp_path / "last.ckpt", epochs=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert epoch_of(tmp_path / "best.ckpt") == 2
    assert epoch_of(tmp_path / "last.ckpt") == 5


def test_only_every_nth_epoch_is_kept(tmp_path):
    fit(tmp_path, epochs=5, every_n_epochs=2)
    assert epoch_of(tmp_path / "last.ckpt") == 4


def test_without_last(tmp_path):
    fit(tmp_path, save_last=False)
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_a_metric_that_comes_late_is_waited_for_and_one_that_never_comes_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"'scoer' was never logged, so there is no best checkpoint; logged: score"):
        fit(tmp_path, monitor="scoer")
    assert epoch_of(tmp_path / "last.ckpt") == 4
