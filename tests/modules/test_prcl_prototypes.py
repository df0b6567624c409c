"""Prototypes of classes against loops, in one batch, over batches and over processes."""

import pytest
import torch

from modules.prcl.prototypes import ClassStatistics, GlobalPrototypes, class_statistics
from modules.prcl.similarity import Gaussians

CLASSES, DIMENSIONS = 5, 6


def pixels(count=60, seed=0, classes=(0, 1, 2, 4)):
    """Class 3 has no pixels."""
    generator = torch.Generator().manual_seed(seed)
    mean = 3 * torch.randn(count, DIMENSIONS, generator=generator)
    variance = torch.rand(count, DIMENSIONS, generator=generator) + 0.01
    labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=generator)]
    return Gaussians(mean, variance), labels


def fused(gaussians, labels, label):
    """Mean and variance of one class in float64, pixel by pixel."""
    precision, weighted = torch.zeros(DIMENSIONS).double(), torch.zeros(DIMENSIONS).double()
    for mean, variance, own in zip(*(part.double() for part in gaussians), labels.tolist(), strict=True):
        if own == label:
            precision += 1 / variance
            weighted += mean / variance
    return weighted / precision, 1 / precision


def assert_fused(prototypes, gaussians, labels, classes=(0, 1, 2, 4)):
    for label in classes:
        mean, variance = fused(gaussians, labels, label)
        torch.testing.assert_close(prototypes.mean[label].double(), mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(prototypes.variance[label].double(), variance, atol=1e-6, rtol=1e-5)


def added(*statistics):
    return ClassStatistics(*(sum(parts) for parts in zip(*statistics, strict=True)))


def test_prototypes_are_precision_weighted():
    gaussians, labels = pixels()
    statistics = class_statistics(gaussians, labels, CLASSES)
    assert statistics.count.tolist() == [(labels == label).sum().item() for label in range(CLASSES)]
    assert_fused(statistics.prototypes(), gaussians, labels)


def test_the_prototype_of_a_single_pixel_is_that_pixel():
    gaussians, _ = pixels(1)
    prototypes = class_statistics(gaussians, torch.tensor([2]), CLASSES).prototypes()
    torch.testing.assert_close(prototypes.mean[2], gaussians.mean[0])
    torch.testing.assert_close(prototypes.variance[2], gaussians.variance[0])


def test_a_class_without_pixels_has_mean_zero_and_variance_one():
    prototypes = class_statistics(*pixels(), CLASSES).prototypes()
    assert prototypes.mean[3].tolist() == [0.0] * DIMENSIONS
    assert prototypes.variance[3].tolist() == [1.0] * DIMENSIONS
    nothing = class_statistics(Gaussians(*torch.zeros(2, 0, DIMENSIONS)), torch.zeros(0, dtype=torch.int64), CLASSES)
    assert nothing.count.tolist() == [0] * CLASSES
    assert nothing.prototypes().variance.tolist() == [[1.0] * DIMENSIONS] * CLASSES


def test_sums_of_parts_are_those_of_the_whole():
    gaussians, labels = pixels()
    parts = [
        class_statistics(Gaussians(gaussians.mean[part], gaussians.variance[part]), labels[part], CLASSES)
        for part in (slice(0, 7), slice(7, 40), slice(40, None))
    ]
    assert_fused(added(*parts).prototypes(), gaussians, labels)


def test_no_gradient_reaches_the_pixels():
    gaussians, labels = pixels()
    leaves = Gaussians(*(part.requires_grad_() for part in gaussians))
    assert not any(part.requires_grad for part in class_statistics(leaves, labels, CLASSES))


def test_under_autocast_the_sums_keep_full_precision():
    gaussians, labels = pixels(2000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = class_statistics(gaussians, labels, CLASSES).over_processes()
        prototypes = statistics.prototypes()
    assert {part.dtype for part in (*statistics, *prototypes)} == {torch.float32}
    assert statistics.count.tolist() == [(labels == label).sum().item() for label in range(CLASSES)]
    assert_fused(prototypes, gaussians, labels)


@pytest.mark.parametrize("forget", [1.0, 0.9])
def test_global_prototypes_follow_the_recursion(forget):
    memory = GlobalPrototypes(CLASSES, DIMENSIONS, forget)
    precision = torch.ones(CLASSES, DIMENSIONS).double()
    mean = torch.ones(CLASSES, DIMENSIONS).double()
    for step in range(4):
        # Class 4 is missing in every other batch, class 3 in all.
        gaussians, labels = pixels(seed=step, classes=(0, 1, 2, 4) if step % 2 else (0, 1, 2))
        for label in labels.unique().tolist():
            batch_mean, batch_variance = fused(gaussians, labels, label)
            old, new = forget * precision[label], 1 / batch_variance
            mean[label] = (old * mean[label] + new * batch_mean) / (old + new)
            precision[label] = old + new
        found = memory.fuse(class_statistics(gaussians, labels, CLASSES))
        torch.testing.assert_close(found.mean.double(), mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.variance.double(), 1 / precision, atol=1e-6, rtol=1e-5)
    assert found.mean[3].tolist() == found.variance[3].tolist() == [1.0] * DIMENSIONS


def test_with_equal_batches_the_precision_tends_to_that_of_a_geometric_series():
    memory = GlobalPrototypes(CLASSES, DIMENSIONS, 0.5)
    statistics = class_statistics(*pixels(), CLASSES)
    for _ in range(40):
        prototypes = memory.fuse(statistics)
    seen = [0, 1, 2, 4]
    torch.testing.assert_close(prototypes.variance[seen], statistics.prototypes().variance[seen] / 2)
    torch.testing.assert_close(prototypes.mean[seen], statistics.prototypes().mean[seen])


def test_global_prototypes_go_on_from_a_checkpoint(tmp_path):
    memory = GlobalPrototypes(CLASSES, DIMENSIONS, 0.9)
    memory.fuse(class_statistics(*pixels(), CLASSES))
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    resumed = GlobalPrototypes(CLASSES, DIMENSIONS, 0.9)
    resumed.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    following = class_statistics(*pixels(seed=1), CLASSES)
    for found, expected in zip(resumed.fuse(following), memory.fuse(following), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("forget", [0.0, -0.1, 1.1, float("nan")])
def test_forget_out_of_range(forget):
    with pytest.raises(ValueError, match=r"forget: .* is outside"):
        GlobalPrototypes(CLASSES, DIMENSIONS, forget)
