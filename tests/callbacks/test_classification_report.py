import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from sklearn.metrics import confusion_matrix as reference_confusion
from sklearn.metrics import precision_recall_fscore_support

from callbacks import ClassificationReport
from callbacks.classification_report import class_scores, confusion_figure, confusion_matrix, is_due
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.clusters import Classifier, Clusters, Encoder
from tests.distributed import run_ranks


def test_counts_and_scores_equal_scikit_learn():
    generator = np.random.default_rng(1)
    labels, predictions = generator.integers(0, 4, 300), generator.integers(0, 4, 300)
    confusion = confusion_matrix(labels, predictions, 5)
    assert np.array_equal(confusion[:4, :4], reference_confusion(labels, predictions))
    scores = class_scores(confusion)
    reference = precision_recall_fscore_support(labels, predictions)
    for key, expected in zip(("precision", "recall", "f1", "support"), reference, strict=True):
        assert scores[key][:4] == pytest.approx(expected)
    assert np.isnan(scores["recall"][4])
    assert scores["support"][4] == 0


def expected_rows(model, data):
    """Class name, recall and support by a loop over samples."""
    rows = data.splits["val"]
    with torch.no_grad():
        predictions = model.layer(rows.x)[:, :3].argmax(1)
    table = []
    for number, name in enumerate(data.class_names):
        hits = [int(p == number) for p, label in zip(predictions, rows.labels, strict=True) if label == number]
        table.append((name, round(sum(hits) / len(hits), 4), len(hits)))
    return table


def shown_rows(folder, stage="val", step=0):
    with open(f"{folder}/media/{stage}/classes/step-{step:08d}.csv", newline="") as file:
        return [(row["class"], float(row["recall"]), int(row["support"])) for row in csv.DictReader(file)]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_report_of_a_split(tmp_path, stage):
    seed_everything(0)
    model, data = Classifier(), Clusters()
    trainer = quiet_trainer(tmp_path, callbacks=[ClassificationReport()])
    (trainer.validate if stage == "val" else trainer.test)(model, data, verbose=False)
    assert shown_rows(tmp_path, stage) == expected_rows(model, data)
    names = {path.parent.name for path in (tmp_path / "media" / stage).rglob("*.png")}
    assert names == {"confusion", "recall"}


def test_every_n_epochs_and_the_last(tmp_path):
    callbacks = [ClassificationReport(every_n_epochs=2)]
    quiet_trainer(tmp_path, max_epochs=4, callbacks=callbacks).fit(Classifier(), datamodule=Clusters())
    steps = sorted(path.name for path in (tmp_path / "media/val/classes").iterdir())
    assert steps == [f"step-{step:08d}.csv" for step in (8, 24, 32)]


def validate_rank(rank, folder):
    seed_everything(0)
    model, data = Classifier(), Clusters()
    trainer = quiet_trainer(folder, devices=2, strategy="ddp", callbacks=[ClassificationReport()])
    trainer.validate(model, data, verbose=False)
    return expected_rows(model, data)


def test_two_ranks_count_each_sample_once(tmp_path):
    expected, _ = run_ranks(validate_rank, 2, str(tmp_path))
    assert shown_rows(tmp_path) == expected


def test_modules_without_probabilities_are_left_alone(tmp_path):
    quiet_trainer(tmp_path, callbacks=[ClassificationReport()]).validate(Encoder(), Clusters(), verbose=False)
    assert not (tmp_path / "media").exists()


def test_a_split_without_labels_is_said(tmp_path):
    data = Clusters()
    data.splits["val"].labels[:] = -1
    trainer = quiet_trainer(tmp_path, callbacks=[ClassificationReport()])
    with pytest.warns(UserWarning, match="no sample of the val split has a label, nothing to report"):
        trainer.validate(Classifier(), data, verbose=False)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="every_n_epochs is 0, expected >= 1"):
        ClassificationReport(every_n_epochs=0)


@pytest.mark.parametrize("classes", [2, 30])
def test_figure_shows_the_counts(classes):
    confusion = np.arange(classes**2).reshape(classes, classes)
    (axis,) = confusion_figure(confusion, [f"class {i}" for i in range(classes)]).axes
    shown = [int(text.get_text()) for text in axis.texts]
    assert shown == (list(range(4)) if classes == 2 else [])
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    assert np.allclose(axis.images[0].get_array(), share)


@pytest.mark.parametrize(
    ("every", "validate_every", "epochs", "due"),
    [
        (2, 1, 5, [0, 2, 4]),
        (2, 1, 6, [0, 2, 4, 5]),
        (2, 2, 11, [1, 3, 5, 7, 9]),
        (5, 5, 30, [4, 9, 14, 19, 24, 29]),
        (5, 2, 12, [1, 5, 11]),
        (100, 3, 10, [2, 8]),
    ],
)
def test_the_first_the_last_and_every_nth_validation_are_due(every, validate_every, epochs, due):
    trainer = Trainer(max_epochs=epochs, check_val_every_n_epoch=validate_every, logger=False, accelerator="cpu")
    trainer.state.fn = TrainerFn.FITTING
    found = []
    for epoch in range(validate_every - 1, epochs, validate_every):
        trainer.fit_loop.epoch_progress.current.completed = trainer.fit_loop.epoch_progress.current.processed = epoch
        if is_due(trainer, every):
            found.append(epoch)
    assert found == due
