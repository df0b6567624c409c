import csv
import math

import numpy as np
import pytest
import torch

from callbacks import SegmentationReport
from callbacks.segmentation_report import pixel_scores
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.clusters import Classifier, Clusters
from tests.callbacks.segmenter import NAMES, SIDES, Painter, Streets, predicted_mask, true_mask
from tests.distributed import run_ranks


def by_loops():
    """Class, IoU, accuracy, precision and pixels by a loop over all pixels."""
    pairs = []
    for row in range(len(SIDES)):
        pairs += [
            pair
            for pair in zip(predicted_mask(row).flatten().tolist(), true_mask(row).flatten().tolist(), strict=True)
            if pair[1] != 255
        ]
    table = []
    for label, name in enumerate(NAMES):
        both = sum(p == label and t == label for p, t in pairs)
        true, predicted = sum(t == label for _, t in pairs), sum(p == label for p, _ in pairs)
        either = sum(p == label or t == label for p, t in pairs)
        table.append((name, round(both / either, 4), round(both / true, 4), round(both / predicted, 4), true))
    return table


def shown(folder, stage="val", key="classes", step=0):
    with open(f"{folder}/media/{stage}/{key}/step-{step:08d}.csv", newline="") as file:
        return list(csv.DictReader(file))


def shown_rows(folder, stage="val"):
    return [
        (row["class"], *(float(row[key]) for key in ("iou", "accuracy", "precision")), int(row["pixels"]))
        for row in shown(folder, stage)
    ]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_report_of_a_split(tmp_path, stage):
    trainer = quiet_trainer(tmp_path, callbacks=[SegmentationReport()])
    (trainer.validate if stage == "val" else trainer.test)(Painter(), Streets(), verbose=False)
    assert shown_rows(tmp_path, stage) == by_loops()
    bars = {row["label"]: float(row["value"]) for row in shown(tmp_path, stage, "iou")}
    assert bars == pytest.approx({row[0]: row[1] for row in by_loops()}, abs=1e-4)
    names = {path.parent.name for path in (tmp_path / "media" / stage).rglob("*.png")}
    assert names == {"confusion", "iou"}


def test_scores_are_undefined_where_a_class_does_not_occur():
    scores = pixel_scores(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert scores["iou"][:2].tolist() == [3 / 4, 4 / 5]
    assert scores["accuracy"][:2].tolist() == [3 / 4, 1]
    assert scores["precision"][:2].tolist() == [1, 4 / 5]
    assert scores["pixels"].tolist() == [4, 4, 0]
    assert all(math.isnan(scores[key][2]) for key in ("iou", "accuracy", "precision"))


class ManyClasses(Painter):
    def confusion(self, stage):
        return torch.eye(150, dtype=torch.long)


def test_the_matrix_of_many_classes_is_not_drawn(tmp_path):
    quiet_trainer(tmp_path, callbacks=[SegmentationReport()]).validate(ManyClasses(), Streets(), verbose=False)
    assert {path.parent.name for path in (tmp_path / "media/val").rglob("*.png")} == {"iou"}
    rows = shown(tmp_path)
    assert [row["class"] for row in rows][:2] == ["0", "1"], "three names do not fit 150 classes"
    assert len(rows) == 150


class Unlabelled(Painter):
    def confusion(self, stage):
        return torch.zeros(3, 3, dtype=torch.long)


def test_nothing_labelled_is_said(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[SegmentationReport()])
    with pytest.warns(UserWarning, match="no pixel of the val split has a label"):
        trainer.validate(Unlabelled(), Streets(), verbose=False)
    assert not (tmp_path / "media").exists()


def test_a_module_without_the_protocol_is_left_alone(tmp_path):
    quiet_trainer(tmp_path, callbacks=[SegmentationReport()]).validate(Classifier(), Clusters(), verbose=False)
    assert not (tmp_path / "media").exists()


def test_a_wrong_interval_is_told():
    with pytest.raises(ValueError, match="SegmentationReport: every_n_epochs is 0, expected >= 1"):
        SegmentationReport(every_n_epochs=0)


def report_on_a_rank(rank, folder):
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    trainer = quiet_trainer(folder, callbacks=[SegmentationReport()], **options)
    trainer.validate(Painter(), Streets(), verbose=False)


def test_two_ranks_report_all_pixels_once(tmp_path):
    run_ranks(report_on_a_rank, 2, str(tmp_path))
    assert shown_rows(tmp_path) == by_loops()
