import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import MaskWriter
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.segmenter import (
    PALETTE,
    SIDES,
    DoubtfulPainter,
    NumberedStreets,
    Painter,
    Streets,
    doubt,
    predicted_mask,
)
from tests.distributed import run_ranks

IDS = ["a", "b", "deep/c", "d", "e"]


def predict(folder, writer, data=None, module=None, **options):
    trainer = quiet_trainer(folder, callbacks=[writer], **options)
    trainer.predict(module or Painter(), datamodule=data or Streets(), return_predictions=False)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_class_indices_and_colours_of_every_picture(tmp_path):
    predict(tmp_path, MaskWriter())
    assert files(tmp_path / "masks") == sorted(f"{name}{kind}.png" for name in IDS for kind in ("", "_colour"))
    for row, name in enumerate(IDS):
        expected = predicted_mask(row).numpy()
        picture = Image.open(tmp_path / "masks" / f"{name}.png")
        assert picture.mode == "L"
        assert np.asarray(picture).tolist() == expected.tolist()
        colours = np.asarray(Image.open(tmp_path / "masks" / f"{name}_colour.png"))
        assert colours.shape == (SIDES[row], SIDES[row] + 1, 3)
        assert colours[1, 2].tolist() == PALETTE[expected[1, 2]]
        assert len(np.unique(colours.reshape(-1, 3), axis=0)) == len(np.unique(expected))


def test_uncertainty_is_written_in_65536_steps_and_in_colours_from_least_to_largest(tmp_path):
    predict(tmp_path, MaskWriter(), module=DoubtfulPainter())
    kinds = ("", "_colour", "_uncertainty", "_uncertainty_colour")
    assert files(tmp_path / "masks") == sorted(f"{name}{kind}.png" for name in IDS for kind in kinds)
    for row, name in enumerate(IDS):
        values = doubt(row).numpy().astype(np.float64)
        grey = Image.open(tmp_path / "masks" / f"{name}_uncertainty.png")
        assert grey.mode == "I;16"
        found = np.asarray(grey)
        assert found.shape == values.shape
        assert np.abs(found - 65535 * values).max() <= 0.5 + 65535 * 1e-7, "rounded to the nearest"
        colours = np.asarray(Image.open(tmp_path / "masks" / f"{name}_uncertainty_colour.png"))
        assert colours.shape == (*values.shape, 3)
        first, last = (colours[0, 0].tolist(), colours[-1, -1].tolist())
        assert first == [0, 0, 3], "inferno's darkest"
        assert last == (first if row == len(IDS) - 1 else [252, 254, 164]), "and brightest; no spread, no colour"


def test_uncertainty_without_colours_leaves_the_numbers(tmp_path):
    predict(tmp_path, MaskWriter(colour=False), module=DoubtfulPainter())
    assert files(tmp_path / "masks") == sorted(f"{name}{kind}.png" for name in IDS for kind in ("", "_uncertainty"))


class Overconfident(Painter):
    def predict_step(self, batch, batch_idx):
        maps = [torch.tensor([[-0.5, 0.0], [1.0, 1.5]]) for _ in batch.index]
        return {**super().predict_step(batch, batch_idx), "uncertainty": maps}


def test_uncertainty_outside_its_range_is_clipped_not_wrapped(tmp_path):
    predict(tmp_path, MaskWriter(colour=False), module=Overconfident())
    assert np.asarray(Image.open(tmp_path / "masks/a_uncertainty.png")).tolist() == [[0, 0], [65535, 65535]]


def test_the_data_set_s_own_values_and_folder(tmp_path):
    predict(tmp_path, MaskWriter(str(tmp_path / "submission"), colour=False), NumberedStreets())
    assert files(tmp_path / "submission") == sorted(f"{name}.png" for name in IDS)
    written = np.asarray(Image.open(tmp_path / "submission/b.png"))
    assert written.tolist() == (predicted_mask(1).numpy() + 1).tolist()
    assert not (tmp_path / "masks").exists()


def test_without_names_the_row_is_the_name(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[MaskWriter(colour=False)])
    data = Streets()
    data.trainer = trainer
    trainer.predict(Painter(), data.predict_dataloader(), return_predictions=False)
    assert files(tmp_path / "masks") == [f"{row}.png" for row in range(5)]


class Named(Streets):
    def __init__(self, *names):
        super().__init__()
        self.names = names

    def sample_ids(self, split=None):
        return list(self.names)


@pytest.mark.parametrize(
    ("kind", "module", "colour"),
    [
        ("_colour", Painter, True),
        ("_uncertainty", DoubtfulPainter, False),
        ("_uncertainty_colour", DoubtfulPainter, True),
    ],
)
def test_two_pictures_of_one_file_are_refused_before_any_is_written(tmp_path, kind, module, colour):
    data = Named(f"y{kind}", "y", f"x{kind}", "x", "z")
    with pytest.raises(ValueError, match=f"the file x{kind}.png would be that of 'x' and that of 'x{kind}'; rename"):
        predict(tmp_path, MaskWriter(colour=colour), data, module())
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("names", "module", "colour"),
    [
        (("a", "a_colour", "a_uncertainty", "b", "b_uncertainty_colour"), Painter, False),
        (("a", "a_uncertainty", "b", "b_uncertainty_colour", "c"), Painter, True),
        (("a", "a_colour", "b", "b_uncertainty_colour", "c"), DoubtfulPainter, False),
    ],
)
def test_names_of_files_that_are_not_written_are_free(tmp_path, names, module, colour):
    predict(tmp_path, MaskWriter(colour=colour), Named(*names), module())
    assert {f"{name}.png" for name in names} <= set(files(tmp_path / "masks"))
    for row, name in enumerate(names):
        assert np.asarray(Image.open(tmp_path / f"masks/{name}.png")).tolist() == predicted_mask(row).tolist()


class OwnPalette(Painter):
    palette = PALETTE


class Colourless(Streets):
    palette = None


def test_the_module_may_bring_the_palette(tmp_path):
    predict(tmp_path, MaskWriter(), Colourless(), OwnPalette())
    assert len(files(tmp_path / "masks")) == 10


def test_no_palette_is_told(tmp_path):
    with pytest.raises(ValueError, match="neither the data nor the module has a palette; set colour to false"):
        predict(tmp_path, MaskWriter(), Colourless())


class Classifier(Painter):
    def predict_step(self, batch, batch_idx):
        return {"index": batch.index, "probabilities": torch.ones(len(batch.index), 3)}


def test_outputs_that_are_no_masks_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"returned \['index', 'probabilities'\], expected a dict with 'index' and"):
        predict(tmp_path, MaskWriter(), module=Classifier())


class Interrupted(Painter):
    def predict_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise RuntimeError("interrupted")
        return super().predict_step(batch, batch_idx)


def test_what_is_complete_stays_when_prediction_is_interrupted(tmp_path):
    with pytest.raises(RuntimeError, match="interrupted"):
        predict(tmp_path, MaskWriter(colour=False), module=Interrupted())
    assert files(tmp_path / "masks") == ["a.png", "b.png"]


def predict_on_a_rank(rank, folder):
    writer = MaskWriter(folder)
    own = []
    original = writer.on_predict_batch_end

    def record(trainer, module, outputs, *args, **kwargs):
        own.extend(outputs["index"].tolist())
        original(trainer, module, outputs, *args, **kwargs)

    writer.on_predict_batch_end = record
    predict(folder, writer, strategy="ddp", devices=2, use_distributed_sampler=False)
    return own


def test_each_rank_writes_its_own_pictures(tmp_path):
    first, second = run_ranks(predict_on_a_rank, 2, str(tmp_path))
    assert first
    assert second
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert [name for name in files(tmp_path) if "_colour" not in name] == sorted(f"{name}.png" for name in IDS)
    for row, name in enumerate(IDS):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).tolist() == predicted_mask(row).tolist()
