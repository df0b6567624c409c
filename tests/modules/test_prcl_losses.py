"""Pseudo-label loss, ramp and momentum of the teacher against loops and tables of values."""

import math

import pytest
import torch

from callbacks.ema_target import ema_momentum
from modules.prcl.losses import confidence_weighted_cross_entropy, ramp


def pseudo_labelled(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 4, 5, 6, generator=generator)
    labels = torch.randint(4, (3, 5, 6), generator=generator)
    labels[:, 0] = 255
    labels[1, :, 2:] = 255
    confidence = torch.rand(3, 5, 6, generator=generator).masked_fill(labels == 255, 0.0)
    return logits, labels, confidence


def loop_loss(logits, labels, confidence, threshold):
    """Pixel by pixel in float64."""
    total, counted = torch.zeros(()).double(), 0
    for image in range(len(labels)):
        labelled = (labels[image] != 255).sum().item()
        sure = sum(value >= threshold for value in confidence[image].flatten().tolist())
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = labels[image, row, column].item()
                if label == 255:
                    continue
                pixel = logits[image, :, row, column].double()
                loss = torch.logsumexp(pixel, 0) - pixel[label]
                if loss > 0:
                    counted += 1
                    total = total + sure / labelled * loss
    return total / max(counted, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_each_image_counts_by_its_share_of_sure_pixels(threshold):
    logits, labels, confidence = pseudo_labelled()
    confidence[0] = 0.95
    leaf = logits.requires_grad_()
    loss = confidence_weighted_cross_entropy(leaf, labels, confidence, threshold)
    expected = loop_loss(leaf, labels, confidence, threshold)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert loss.item() > 0.05
    found, wanted = (torch.autograd.grad(value, leaf)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_threshold_itself_is_sure_and_selects_no_pixels():
    logits, labels, confidence = pseudo_labelled()
    confidence.fill_(0.5)
    confidence[2].fill_(0.97)
    loss = confidence_weighted_cross_entropy(logits.requires_grad_(), labels, confidence, 0.97)
    gradient = torch.autograd.grad(loss, logits)[0].abs().sum(1)
    assert gradient[:2].max() == 0
    assert ((gradient[2] > 0) == (labels[2] != 255)).all()


def test_pixels_without_loss_do_not_count():
    """A pixel that is predicted with certainty has cross-entropy 0 in float32."""
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0, :2] = 200.0
    labels = torch.zeros(1, 1, 4, dtype=torch.int64)
    loss = confidence_weighted_cross_entropy(logits, labels, torch.ones(1, 1, 4))
    assert loss.item() == pytest.approx(math.log(2))


def test_all_void_gives_zero_with_a_graph():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    void = torch.full((2, 4, 4), 255)
    loss = confidence_weighted_cross_entropy(logits, void, torch.zeros(2, 4, 4))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_one_image_that_is_all_void_leaves_the_others_as_they_are():
    logits, labels, confidence = pseudo_labelled()
    alone = confidence_weighted_cross_entropy(logits[:2], labels[:2], confidence[:2], 0.3)
    labels[2], confidence[2] = 255, 0.0
    assert confidence_weighted_cross_entropy(logits, labels, confidence, 0.3).item() == pytest.approx(alone.item())


@pytest.mark.parametrize(
    ("time", "value"), [(0, 1.0), (100, 0.28650480), (199, 0.00708252), (200, 0.0), (1000, 0.0), (-1, 0.0)]
)
def test_the_ramp_of_the_contrast(time, value):
    assert ramp(time) == pytest.approx(value, abs=1e-7)


def test_other_ramps():
    assert ramp(4, begin=5) == 0.0
    assert ramp(5, begin=5, end=15) == 1.0
    assert ramp(10, begin=5, end=15, peak=0.1, rate=-2.0) == pytest.approx(0.1 * math.exp(-0.5))
    assert ramp(199, floor=0.1) == 0.1
    assert ramp(200, floor=0.1) == 0.1
    assert [ramp(time, end=math.inf, peak=0.3) for time in (0, 7, 10_000)] == [0.3] * 3
    falling = [ramp(time) for time in range(200)]
    assert falling == sorted(falling, reverse=True)


def test_the_momentum_of_the_teacher():
    found = [ema_momentum(step, None, 0.99, "warmup") for step in range(300)]
    assert found[:3] == pytest.approx([0.0, 1 / 2, 2 / 3])
    assert found[98] == pytest.approx(98 / 99)
    assert found[98] < 0.99
    assert found[99:] == [0.99] * 201
    assert found == pytest.approx([min(step / (step + 1), 0.99) for step in range(300)])
