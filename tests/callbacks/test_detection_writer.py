import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch.utils.data import DataLoader

from callbacks import DetectionWriter
from tests.distributed import run_ranks
from tests.modules.toy_images import quiet_trainer

COUNT = 5


def found(row):
    """Row 3 has no detection; the others as many as a remainder tells, the first one weak."""
    count = 0 if row == 3 else 1 + row % 2
    corner = torch.arange(count * 2, dtype=torch.float32).view(count, 2) + row
    boxes = torch.cat([corner, corner + 8], dim=1)
    return {"boxes": boxes, "labels": torch.full((count,), 1 + row % 2), "scores": torch.linspace(0.1, 0.9, count)}


class Finder(LightningModule):
    def predict_step(self, batch, batch_idx):
        return {"index": batch, "detections": [found(row) for row in batch.tolist()]}


class Pictures(LightningDataModule):
    """The protocol that the writer needs, for five black pictures."""

    class_names = ("cat", "dog")

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def predict_dataloader(self):
        return DataLoader([torch.tensor(rows) for rows in self.batches], batch_size=None)

    def coco_results(self, index, detections):
        return [
            {"image_id": 100 + row, "category_id": label, "bbox": box, "score": score}
            for row, one in zip(index, detections, strict=True)
            for box, label, score in zip(*(one[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
        ]

    def sample_ids(self, split):
        return [f"picture_{row}.jpg" for row in range(COUNT)]

    def picture(self, row):
        return torch.zeros(3, 32, 32, dtype=torch.uint8)


def predict(folder, batches, **options):
    writer = DetectionWriter(**options)
    trainer = quiet_trainer(callbacks=[writer], default_root_dir=folder)
    trainer.predict(Finder(), datamodule=Pictures(batches), return_predictions=False)
    return writer.path(trainer)


def test_one_file_in_the_order_of_the_images(tmp_path):
    path = predict(tmp_path, [[4, 1], [0, 3], [2]])
    assert path == tmp_path / "detections.json"
    results = json.loads(path.read_text())
    assert [entry["image_id"] for entry in results] == [100, 101, 101, 102, 104]
    assert results[1] == {
        "image_id": 101,
        "category_id": 2,
        "bbox": [1.0, 2.0, 9.0, 10.0],
        "score": pytest.approx(0.1),
    }
    assert not list(tmp_path.glob(".*"))


def test_an_image_that_comes_twice_is_written_once(tmp_path):
    once = json.loads(predict(tmp_path / "a", [[0, 1, 2, 3, 4]]).read_text())
    assert json.loads(predict(tmp_path / "b", [[0, 1, 2], [3, 4, 0]]).read_text()) == once


def test_pictures_of_the_first_images_with_boxes_above_the_threshold(tmp_path):
    predict(tmp_path, [[0, 1, 2, 3, 4]], pictures=3, output=str(tmp_path / "answers.json"))
    assert (tmp_path / "answers.json").is_file()
    files = sorted((tmp_path / "answers").iterdir())
    assert [file.name for file in files] == [f"{row:06d}_picture_{row}.png" for row in range(3)]
    drawn = [Image.open(file).convert("RGB").getextrema()[0][1] for file in files]
    assert drawn == [0, 255, 0]  # row 1 alone has a score above 0.3
    assert Image.open(files[0]).size == (32, 32)


def test_no_pictures_if_none_are_asked_for(tmp_path):
    predict(tmp_path, [[0, 1]], pictures=0)
    assert [path.name for path in tmp_path.iterdir()] == ["detections.json"]


def predict_on_rank(rank, folder):
    batches = [[[0, 2], [4]], [[1, 3], [2]]][rank]  # row 2 is on both
    writer = DetectionWriter(pictures=1)
    trainer = quiet_trainer(
        callbacks=[writer], default_root_dir=folder, strategy="ddp", devices=2, use_distributed_sampler=False
    )
    trainer.predict(Finder(), datamodule=Pictures(batches), return_predictions=False)
    return len(writer._found)


def test_two_ranks_write_one_file(tmp_path):
    assert run_ranks(predict_on_rank, 2, str(tmp_path / "two")) == [0, 0]
    expected = json.loads(predict(tmp_path / "one", [[0, 1, 2, 3, 4]]).read_text())
    assert json.loads((tmp_path / "two" / "detections.json").read_text()) == expected
    assert len(list((tmp_path / "two" / "detections").iterdir())) == 1


def test_an_old_file_stays_if_writing_fails(tmp_path, monkeypatch):
    (tmp_path / "detections.json").write_text("old")
    monkeypatch.setattr(Pictures, "coco_results", lambda self, index, detections: [{"score": object()}])
    with pytest.raises(TypeError):
        predict(tmp_path, [[0]])
    assert (tmp_path / "detections.json").read_text() == "old"


def test_outputs_that_cannot_be_written(tmp_path):
    class Other(LightningModule):
        def predict_step(self, batch, batch_idx):
            return {"index": batch, "probabilities": batch}

    trainer = quiet_trainer(callbacks=[DetectionWriter()], default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"predict_step returned \['index', 'probabilities'\], expected a dict"):
        trainer.predict(Other(), datamodule=Pictures([[0]]))
    trainer = quiet_trainer(callbacks=[DetectionWriter()], default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="the datamodule NoneType has no method coco_results"):
        trainer.predict(Finder(), DataLoader([torch.tensor([0])], batch_size=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "boxes.csv"}, "output 'boxes.csv' does not end in .json"),
        ({"pictures": -1}, "pictures is -1, expected 0 or more"),
        ({"picture_threshold": 1.0}, "picture_threshold is 1.0, expected a score"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionWriter(**options)
