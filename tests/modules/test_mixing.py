import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup

from modules.classification.mixing import BatchMixing, check_mixing

MIXUP, CUTMIX = {"mixup_alpha": 0.8, "cutmix_alpha": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}


def data(size=6, side=8):
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, side, side, generator=generator), torch.arange(size) % 3


def smooth(label, smoothing=0.1, classes=4):
    return [smoothing / classes + (1 - smoothing if c == label else 0) for c in range(classes)]


def test_mixup_by_a_loop_over_images_and_classes():
    images, labels = data()
    mixed, targets = BatchMixing(4, **MIXUP, label_smoothing=0.1)(images, labels, (0, 0, 3, 3))
    share = (mixed[0, 0, 0, 0] - images[-1, 0, 0, 0]) / (images[0, 0, 0, 0] - images[-1, 0, 0, 0])
    share = float(share)
    assert 0 < share < 1
    for row in range(6):
        other = 5 - row
        assert torch.allclose(mixed[row], share * images[row] + (1 - share) * images[other], atol=1e-5)
        first, second = smooth(labels[row]), smooth(labels[other])
        expected = [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]
        assert targets[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert targets.sum(1).tolist() == pytest.approx([1] * 6, abs=1e-6)


def test_cutmix_pastes_one_rectangle_and_counts_its_pixels():
    images, labels = data(side=16)
    mixed, targets = BatchMixing(4, **CUTMIX)(images, labels, (0, 0, 1, 1))
    pasted = (mixed != images).any(1)
    rows, columns = pasted[0].any(1).nonzero()[:, 0], pasted[0].any(0).nonzero()[:, 0]
    assert 0 < pasted[0].sum() < 256
    assert pasted[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    for row in range(6):
        other = 5 - row
        share = 1 - float(pasted[row].sum()) / 256
        assert torch.equal(mixed[row], torch.where(pasted[0], images[other], images[row]))
        expected = [share * (c == labels[row]) + (1 - share) * (c == labels[other]) for c in range(4)]
        assert targets[row].tolist() == pytest.approx([float(value) for value in expected], abs=1e-6)


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, {**MIXUP, **CUTMIX, "prob": 0.5}])
def test_an_even_batch_is_mixed_as_timm_mixes_it(settings):
    images, labels = data(side=16)
    ours, timms = BatchMixing(4, **settings, label_smoothing=0.1), Mixup(**settings, label_smoothing=0.1, num_classes=4)
    for step in range(8):
        np.random.seed(np.random.SeedSequence((5, step)).generate_state(4))
        expected = timms(images.clone(), labels)
        assert all(torch.equal(a, b) for a, b in zip(ours(images, labels, (5, step)), expected, strict=True))


def test_the_draw_depends_on_the_position_alone_and_leaves_the_global_generator():
    images, labels = data()
    mixing, before = BatchMixing(4, **MIXUP), images.clone()
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    first = mixing(images, labels, (0, 1, 2))[0]
    assert np.random.rand() == expected
    assert torch.equal(mixing(images, labels, (0, 1, 2))[0], first)
    assert not torch.equal(mixing(images, labels, (0, 1, 3))[0], first)
    assert not torch.equal(mixing(images, labels, (0, 0, 2))[0], first)
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_last_image_of_an_odd_batch_stays(size):
    images, labels = data(size)
    mixed, targets = BatchMixing(4, **MIXUP, label_smoothing=0.1)(images, labels, (0,))
    assert torch.equal(mixed[-1], images[-1])
    assert targets[-1].tolist() == pytest.approx(smooth(labels[-1]), abs=1e-6)
    assert len(mixed) == len(targets) == size
    assert all(not torch.equal(a, b) for a, b in zip(mixed[:-1], images[:-1], strict=True))


def test_both_kinds_are_drawn_and_some_batches_left_alone():
    images, labels = data(2, side=16)
    mixing = BatchMixing(4, 0.8, 1.0, prob=0.6, switch_prob=0.5)
    kinds = []
    for step in range(200):
        changed = (mixing(images, labels, (step,))[0] != images).any(1)[0]
        kinds.append("none" if not changed.any() else "mixup" if changed.all() else "cutmix")
    assert 55 <= kinds.count("none") <= 110  # 80 expected, and a few rectangles without area
    assert 30 <= kinds.count("mixup") <= 90  # 60 expected
    assert 30 <= kinds.count("cutmix") <= 90


def test_an_image_without_a_label_cannot_be_mixed():
    images, _ = data(2)
    with pytest.raises(ValueError, match=r"a batch holds images without a label, .* train with data.augment finetune"):
        BatchMixing(4, **MIXUP)(images, torch.tensor([0, -1]), (0,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, 0.0, 1.0, 0.5, "none"), "mixup_alpha: -0.1 is negative"),
        ((0.0, -1.0, 1.0, 0.5, "none"), "cutmix_alpha: -1.0 is negative"),
        ((0.1, 0.0, 1.5, 0.5, "none"), r"mixup_prob: 1.5 is outside \[0, 1\]"),
        ((0.1, 0.0, 1.0, -0.5, "none"), r"switch_prob: -0.5 is outside \[0, 1\]"),
        ((0.0, 1.0, 1.0, 0.5, "inverse"), "class_weight: 'inverse' weighs images by their class, .* an image has two"),
    ],
)
def test_values_that_make_no_sense_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        check_mixing(*values)
