import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from modules.classification.class_weights import class_weights, count_classes
from modules.classification.metrics import METRIC_NAMES, classification_metrics


def predictions(size=200, classes=5, seed=0, labels=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator) if labels is None else labels
    logits = torch.randn(len(labels), classes, generator=generator) + 1.5 * torch.eye(classes)[labels]
    return logits.softmax(1), labels


def computed(probabilities, labels, chunk=7, **kwargs):
    metrics = classification_metrics(probabilities.shape[1], "val/", **kwargs)
    for part in range(0, len(labels), chunk):
        metrics.update(probabilities[part : part + chunk], labels[part : part + chunk])
    return {key.removeprefix("val/"): value.item() for key, value in metrics.compute().items()}


def test_values_equal_those_of_scikit_learn():
    probabilities, labels = predictions()
    values, guess = computed(probabilities, labels), probabilities.argmax(1)
    expected = {
        "acc": reference.accuracy_score(labels, guess),
        "balanced_acc": reference.balanced_accuracy_score(labels, guess),
        "kappa": reference.cohen_kappa_score(labels, guess, weights="quadratic"),
        "macro_f1": reference.f1_score(labels, guess, average="macro"),
        "macro_precision": reference.precision_score(labels, guess, average="macro"),
        "auroc": reference.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
    }
    assert set(values) == set(METRIC_NAMES)
    assert values == pytest.approx(expected, abs=1e-5)


def test_two_classes():
    probabilities, labels = predictions(classes=2)
    expected = reference.roc_auc_score(labels, probabilities[:, 1])
    assert computed(probabilities, labels)["auroc"] == pytest.approx(expected, abs=1e-5)


def test_an_absent_class_is_left_out_with_a_warning():
    probabilities, labels = predictions(labels=torch.arange(120) % 4)
    with pytest.warns(UserWarning, match="averaged over the classes that occur; without a label: rare"):
        values = computed(probabilities, labels, class_names=["a", "b", "c", "d", "rare"])
    each = [reference.roc_auc_score(labels == label, probabilities[:, label]) for label in range(4)]
    assert values["auroc"] == pytest.approx(np.mean(each), abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference.balanced_accuracy_score(labels, probabilities.argmax(1))
    assert values["balanced_acc"] == pytest.approx(expected, abs=1e-6)


def test_a_single_class_has_no_auroc_and_no_kappa():
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    with pytest.warns(UserWarning, match="without a label: 1"):
        values = computed(probabilities, torch.zeros(2, dtype=torch.int64))
    assert np.isnan(values["auroc"])
    assert values["kappa"] == 0
    assert values["acc"] == values["balanced_acc"] == 1


def test_class_weights_by_their_formulas():
    counts = torch.tensor([900, 90, 0, 10])
    assert class_weights(counts, "none").tolist() == [1, 1, 1, 1]
    inverse = np.array([1 / 900, 1 / 90, 0, 1 / 10])
    assert class_weights(counts, "inverse").tolist() == pytest.approx(list(inverse * 3 / inverse.sum()), rel=1e-6)
    effective = np.array([0.001 / (1 - 0.999**n) if n else 0 for n in counts.tolist()])
    expected = list(effective * 3 / effective.sum())
    assert class_weights(counts, "effective").tolist() == pytest.approx(expected, rel=1e-6)


class Labels:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def test_classes_are_counted_from_labels():
    assert count_classes(Labels(targets=[0, 2, 2]), 4).tolist() == [1, 0, 2, 0]
    labels = np.array([0, 1, 1, -1, 2])
    assert count_classes(Labels(labels=labels), 3).tolist() == [1, 2, 1]
    assert count_classes(Labels(labels=labels, rows=np.array([1, 3, 4])), 3).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="class_weight: Labels has no 'labels' or 'targets' to count"):
        count_classes(Labels(), 3)
