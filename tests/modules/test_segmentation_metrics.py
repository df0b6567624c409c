"""Scores of segmentation against loops over pixels."""

import numpy as np
import pytest
import torch

from modules.segmentation import SegmentationScores, pixel_cross_entropy
from tests.distributed import run_ranks

CLASSES = 5


def masks(count, seed, classes=CLASSES):
    random = np.random.RandomState(seed)
    labels = random.randint(0, classes, (count, 7, 9))
    predictions = np.where(random.rand(*labels.shape) < 0.6, labels, random.randint(0, classes, labels.shape))
    labels[random.rand(*labels.shape) < 0.1] = 255
    return torch.from_numpy(predictions), torch.from_numpy(labels)


def by_loops(predictions, labels, classes=CLASSES):
    """Intersection over union and accuracies, counted pixel by pixel."""
    pairs = [(p, t) for p, t in zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True) if t != 255]
    ious, accuracies = [], []
    for label in range(classes):
        both = sum(p == label and t == label for p, t in pairs)
        either = sum(p == label or t == label for p, t in pairs)
        true = sum(t == label for _, t in pairs)
        ious.append(both / either if either else None)
        accuracies.append(both / true if true else None)

    def mean(values):
        present = [value for value in values if value is not None]
        return sum(present) / len(present)

    right = sum(p == t for p, t in pairs) / len(pairs)
    return {"iou": ious, "miou": mean(ious), "macc": mean(accuracies), "aacc": right}


def scored(*batches, classes=CLASSES):
    metric = SegmentationScores(classes)
    for predictions, labels in batches:
        metric.update(predictions, labels)
    return metric.compute()


def test_scores_equal_a_loop_over_pixels():
    batches = [masks(2, 0), masks(1, 1)]
    values = scored(*batches)
    expected = by_loops(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert values["iou"].tolist() == pytest.approx(expected["iou"], abs=1e-6)
    for name in ("miou", "macc", "aacc"):
        assert values[name].item() == pytest.approx(expected[name], abs=1e-6)


def test_a_class_in_neither_labels_nor_predictions_is_left_out():
    batch = masks(2, 3, classes=3)
    values, expected = scored(batch), by_loops(*batch)
    assert expected["iou"][3] is expected["iou"][4] is None
    assert values["miou"].item() == pytest.approx(expected["miou"], abs=1e-6)
    assert values["iou"][3:].isnan().all()


def test_a_class_that_is_only_predicted_counts_as_zero_iou_and_has_no_accuracy():
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    predictions = torch.tensor([[[0, 0], [0, 3]]])
    values = scored((predictions, labels))
    assert values["miou"].item() == pytest.approx((3 / 4 + 0) / 2)
    assert values["macc"].item() == pytest.approx(3 / 4)


def test_counts_stay_exact_beyond_single_precision():
    metric = SegmentationScores(2)
    metric.confmat.copy_(torch.tensor([[2**26 + 1, 0], [1, 2**26]]))
    metric._update_count = 1
    assert metric.compute()["confusion"][0, 0].item() == 2**26 + 1


def scores_of_a_rank(rank):
    metric = SegmentationScores(CLASSES)
    # The second rank has one picture only, the first two.
    for seed in ((0, 1), (2,))[rank]:
        metric.update(*masks(1, seed))
    return {name: value.tolist() for name, value in metric.compute().items()}


def test_two_ranks_count_together():
    expected = scored(*(masks(1, seed) for seed in (0, 1, 2)))
    for values in run_ranks(scores_of_a_rank, 2):
        assert values == {name: value.tolist() for name, value in expected.items()}


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 4.0, 0.1]])
def test_the_loss_is_the_mean_over_labelled_pixels(weights):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 7, 9, generator=generator)
    _, labels = masks(2, 5)
    total, weight = 0.0, 0.0
    for image in range(2):
        for row in range(7):
            for column in range(9):
                label = labels[image, row, column].item()
                if label == 255:
                    continue
                own = weights[label] if weights else 1.0
                scores = logits[image, :, row, column].double()
                total += own * (scores.exp().sum().log() - scores[label]).item()
                weight += own
    loss = pixel_cross_entropy(logits, labels, torch.tensor(weights) if weights else None)
    assert loss.item() == pytest.approx(total / weight, abs=1e-5)


def test_the_loss_of_void_alone_is_zero_and_has_a_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0
