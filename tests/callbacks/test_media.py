import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from callbacks import EMATarget, Media
from callbacks.media import bar_chart, contact_sheet, to_pixels
from tests.callbacks.byol import Byol, loader, quiet_trainer
from tests.callbacks.wandb_files import history
from tests.distributed import run_ranks

PICTURE = torch.linspace(0, 1, 3 * 4 * 5).reshape(3, 4, 5)


class Everything(Callback):
    """Shows one of each after the first batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        from matplotlib.figure import Figure

        pl_module.log("train/loss", outputs["loss"])
        if batch_idx == 0:
            media = Media(trainer)
            media.image("val/one", PICTURE, "a $picture")
            media.images("val/several", [(PICTURE, "first"), (PICTURE[:1], "second")])
            media.table("val/scores", ["class", "score"], [["round, or so", 0.5], ["long", torch.tensor(2)]])
            media.bar("val/recall", ["round", "long"], [0.25, float("nan")], title="Recall")
            figure = Figure()
            figure.subplots().plot([0, 1])
            media.figure("val/curve", figure)


class OneTable(Callback):
    """Shows little, quickly."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        Media(trainer).table("val/steps", ["step"], [[trainer.global_step]])


def show(folder, callback=Everything, **options):
    trainer = quiet_trainer(folder, max_steps=2, callbacks=[EMATarget("online", "target"), callback()], **options)
    trainer.fit(Byol(), loader())
    return trainer


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_everything_lands_on_the_disk_without_a_logger(tmp_path):
    show(tmp_path)
    assert files(tmp_path / "media") == [
        "val/curve/step-00000001.png",
        "val/one/step-00000001.png",
        "val/recall/step-00000001.csv",
        "val/recall/step-00000001.png",
        "val/scores/step-00000001.csv",
        "val/several/step-00000001.png",
    ]
    with Image.open(tmp_path / "media/val/one/step-00000001.png") as image:
        assert image.info["Description"] == "a $picture"
        expected = (PICTURE * 255).round().permute(1, 2, 0).byte().numpy()
        assert np.array_equal(np.asarray(image), expected)
    with open(tmp_path / "media/val/scores/step-00000001.csv", newline="") as file:
        assert list(csv.reader(file)) == [["class", "score"], ["round, or so", "0.5"], ["long", "2"]]


def test_an_offline_wandb_run_holds_media_and_metrics(tmp_path):
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    show(tmp_path, logger=logger)
    logger.experiment.finish()
    rows = history(tmp_path)
    by_key = {key: value for row in rows for key, value in row.items()}
    losses = [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert [step for step, _ in losses] == [0, 1]
    assert all(0 < loss < 8 for _, loss in losses)
    assert by_key["val/one/captions"] == ["a $picture"]
    assert (by_key["val/one/width"], by_key["val/one/height"], by_key["val/several/count"]) == (5, 4, 2)
    assert by_key["val/several/captions"] == ["first", "second"]
    assert (by_key["val/scores/_type"], by_key["val/scores/nrows"]) == ("table-file", 2)
    assert any(key.startswith("val/recall") and value == "table-file" for key, value in by_key.items())
    assert by_key["val/curve/_type"] == "images/separated"
    stored = next(tmp_path.glob("wandb/offline-run-*/files")) / by_key["val/one/filenames"][0]
    with Image.open(stored) as image:
        assert np.array_equal(np.asarray(image)[..., :3], to_pixels(PICTURE))


def test_tensorboard_gets_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = show(tmp_path, logger=TensorBoardLogger(tmp_path, name="board"))
    trainer.logger.experiment.flush()
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["val/curve", "val/one", "val/recall", "val/several"]
    (table,) = events.Tensors("val/scores/text_summary")
    assert table.step == 1
    text = table.tensor_proto.string_val[0].decode()
    assert text.splitlines() == ["| class | score |", "| --- | --- |", "| round, or so | 0.5 |", "| long | 2 |"]


def test_a_trial_run_writes_nothing(tmp_path):
    show(tmp_path, fast_dev_run=True)
    assert files(tmp_path) == []


def show_rank(rank, folder):
    show(f"{folder}/rank{rank}", OneTable, devices=2, strategy="ddp")


def test_only_rank_zero_writes(tmp_path):
    run_ranks(show_rank, 2, str(tmp_path))
    assert files(tmp_path / "rank0/media") == [f"val/steps/step-{step:08d}.csv" for step in (1, 2)]
    assert not (tmp_path / "rank1/media").exists()


def test_a_given_folder(tmp_path):
    trainer = quiet_trainer(tmp_path)
    Media(trainer, tmp_path / "elsewhere").image("a/b", PICTURE)
    assert files(tmp_path) == ["elsewhere/a/b/step-00000000.png"]


def test_pixels():
    assert to_pixels(torch.tensor([[-1.0, 0.5, 2.0, float("nan")]]))[0, :, 0].tolist() == [0, 128, 255, 0]
    assert to_pixels(np.full((1, 2, 2), 7, np.uint8)).tolist() == np.full((2, 2, 3), 7).tolist()
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\), expected \(H, W\), \(1, H, W\) or \(3, H, W\)"):
        to_pixels(np.zeros((4, 5, 3)))


def test_contact_sheet_enlarges_small_pictures_above_their_captions():
    pixels = to_pixels(PICTURE)
    sheet = contact_sheet([pixels] * 10, ["a caption"] * 10)
    factor = 32  # the longer side of 5 pixels fills 160
    enlarged = np.kron(pixels, np.ones((factor, factor, 1), np.uint8))
    assert np.array_equal(sheet[6 : 6 + 4 * factor, 6:166], enlarged)
    assert np.array_equal(sheet[6 : 6 + 4 * factor, 172:332], enlarged)
    assert sheet.shape == (6 + 2 * (160 + 16 + 6), 6 + 8 * 166, 3)
    below = sheet[6 + 4 * factor : 6 + 4 * factor + 16, 6:166]
    assert below.min() < 100  # ink of the caption
    assert sheet[-100:, 400:].min() == 255  # the second row holds two pictures
    wrapped = contact_sheet([pixels], ["word " * 20])
    assert wrapped.shape[0] > 6 + 160 + 3 * 16
    large = contact_sheet([np.zeros((300, 200, 3), np.uint8)], [""])
    assert large.shape == (6 + 300 + 16 + 6, 6 + 200 + 6, 3)


def test_bar_chart_shows_what_it_is_given():
    (axis,) = bar_chart(["a", "b"], [1.0, 3.0], "T").axes
    assert [bar.get_width() for bar in axis.patches] == [1.0, 3.0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_wrong_sizes_are_named(tmp_path):
    media = Media(quiet_trainer(tmp_path))
    with pytest.raises(ValueError, match="table 'k': row 1 has 1 cells, expected 2"):
        media.table("k", ["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="bar 'k': 1 values for 2 labels"):
        media.bar("k", ["a", "b"], [1.0])


def test_wide_pictures_stand_below_each_other():
    wide = contact_sheet([np.zeros((90, 700, 3), np.uint8)] * 4, [""] * 4)
    assert wide.shape[1] < 2000
    assert wide.shape[0] > 2 * 90
    very_wide = contact_sheet([np.zeros((90, 3000, 3), np.uint8)] * 2, [""] * 2)
    assert 3000 < very_wide.shape[1] < 3020
    assert very_wide.shape[0] > 2 * 90
