"""Histories of metrics by name: which epochs they hold, however and whenever a module logs them."""

import csv

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

from callbacks import BestAndLastCheckpoint, MetricHistory
from callbacks.checkpoint_io import load_checkpoint

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}


class Logs(BoringModel):
    """Logs ``variance/<name>`` at the end of an epoch, and ``step/mean`` twice in each."""

    def training_step(self, batch, batch_idx):
        self.log("step/mean", 10.0 * self.current_epoch + batch_idx, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.log("variance/road", 100.0 + self.current_epoch)
        if self.current_epoch != 1:
            self.log("variance/sky", 200.0 + self.current_epoch)
        self.log("other/road", 0.0)

    def on_validation_epoch_end(self):
        self.log("val/score", float(self.current_epoch))


def fit(folder, history, epochs, ckpt_path=None, **options):
    checkpoint = BestAndLastCheckpoint(dirpath=str(folder / "checkpoints"))
    arguments = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 1, **QUIET, **options}
    trainer = Trainer(
        default_root_dir=folder, max_epochs=epochs, logger=False, callbacks=[history, checkpoint], **arguments
    )
    trainer.fit(Logs(), ckpt_path=ckpt_path)
    return history


def lines(history, prefix):
    return history.state_dict()["values"][prefix]


def drawn(folder, prefix):
    return sorted(path.name for path in (folder / f"media/history/{prefix}").glob("*.png"))


def test_each_epoch_has_the_value_that_was_logged_at_its_end(tmp_path):
    history = fit(tmp_path, MetricHistory(["variance", "step"]), 4)
    assert lines(history, "variance")["road"] == [[epoch, 100.0 + epoch] for epoch in range(4)]
    assert lines(history, "variance")["sky"] == [[0, 200.0], [2, 202.0], [3, 203.0]], "not logged in epoch 1"
    assert set(history.state_dict()["values"]) == {"variance", "step"}


def test_a_metric_logged_in_every_step_counts_once_in_an_epoch(tmp_path):
    history = fit(tmp_path, MetricHistory(["step"]), 3)
    assert lines(history, "step") == {"mean": [[epoch, 10.0 * epoch + 0.5] for epoch in range(3)]}


def test_epochs_without_validation_repeat_no_value(tmp_path):
    history = fit(tmp_path, MetricHistory(["val"]), 5, check_val_every_n_epoch=2)
    assert lines(history, "val") == {"score": [[1, 1.0], [3, 3.0]]}


def test_a_picture_and_its_numbers_every_few_epochs_and_at_the_end(tmp_path):
    fit(tmp_path, MetricHistory(["variance"], every_n_epochs=3), 6)
    assert drawn(tmp_path, "variance") == [f"step-{steps:08d}.png" for steps in (2, 8, 12)]
    with Image.open(tmp_path / "media/history/variance/step-00000012.png") as picture:
        assert picture.convert("L").getextrema() != (255, 255)
    with (tmp_path / "media/history/variance_values/step-00000012.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["name"], int(row["epoch"]), float(row["value"])) for row in rows]
    road = [("road", epoch, 100.0 + epoch) for epoch in range(6)]
    assert found == road + [("sky", epoch, 200.0 + epoch) for epoch in (0, 2, 3, 4, 5)]


def test_one_line_for_each_name(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("callbacks.media._encode_figure", lambda figure: figures.append(figure) or b"")
    fit(tmp_path, MetricHistory(["variance"], every_n_epochs=10), 3)
    shown = {line.get_label(): line.get_xydata().tolist() for line in figures[-1].axes[0].get_lines()}
    assert shown == {"road": [[0, 100], [1, 101], [2, 102]], "sky": [[0, 200], [2, 202]]}


def test_each_of_many_lines_has_a_look_of_its_own_and_the_axis_a_name(tmp_path, monkeypatch):
    """As many as the classes of ADE20K; of few lines no two have one colour."""
    figures = []
    monkeypatch.setattr("callbacks.media._encode_figure", lambda figure: figures.append(figure) or b"")

    def drawn_lines(count):
        lines = {f"class {row}": [[0, float(row)], [1, float(row)]] for row in range(count)}
        history = MetricHistory(["variance"])
        history.load_state_dict({"values": {"variance": lines}})
        fit(tmp_path, history, 1)
        return figures[-1].axes[0]

    axis = drawn_lines(150)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axis.get_lines()}
    assert len(looks) == len(axis.get_lines()) >= 150
    assert axis.get_ylabel() == "variance"
    assert len({line.get_color() for line in drawn_lines(10).get_lines()}) >= 10


@pytest.mark.parametrize(("interval", "known"), [(1, 3), (3, 2)])
def test_a_resumed_run_goes_on_with_the_values(tmp_path, interval, known):
    """Saved at the end of an epoch, or within it after validation, when the module logs again after the resume."""
    fit(tmp_path, MetricHistory(["variance"]), 3, check_val_every_n_epoch=interval)
    saved = load_checkpoint(tmp_path / "checkpoints/last.ckpt")["callbacks"]["MetricHistory"]["values"]
    assert saved["variance"]["road"] == [[epoch, 100.0 + epoch] for epoch in range(known)]
    last = tmp_path / "checkpoints/last.ckpt"
    history = fit(tmp_path, MetricHistory(["variance"]), 5, last, check_val_every_n_epoch=interval)
    assert lines(history, "variance")["road"] == [[epoch, 100.0 + epoch] for epoch in range(5)]
    assert lines(history, "variance")["sky"] == [[epoch, 200.0 + epoch] for epoch in (0, 2, 3, 4)]


def test_a_fast_run_draws_nothing(tmp_path):
    fit(tmp_path, MetricHistory(["variance"]), 2, fast_dev_run=True)
    assert not (tmp_path / "media").exists()


def test_a_run_without_such_metrics_draws_nothing(tmp_path):
    history = fit(tmp_path, MetricHistory(["precision"]), 2)
    assert lines(history, "precision") == {}
    assert not (tmp_path / "media").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefixes": []}, "MetricHistory: prefixes is empty, expected names such as variance"),
        ({"prefixes": ["a"], "every_n_epochs": 0}, "MetricHistory: every_n_epochs is 0, expected 1 or more"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        MetricHistory(**arguments)


def test_the_state_is_loaded_by_weights_only(tmp_path):
    fit(tmp_path, MetricHistory(["variance"]), 2)
    content = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert content["callbacks"]["MetricHistory"]["values"]["variance"]["road"] == [[0, 100.0], [1, 101.0]]
