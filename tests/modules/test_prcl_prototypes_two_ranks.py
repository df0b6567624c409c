"""Two gloo ranks against one process: statistics of prototypes, and the contrast where a rank sees one class."""

import pytest
import torch

from modules.prcl.contrast import PixelContrast
from modules.prcl.prototypes import GlobalPrototypes, class_statistics
from modules.prcl.similarity import Gaussians
from tests.distributed import run_ranks

CLASSES, DIMENSIONS, COUNT = 5, 6, 80


def pixels():
    """Class 3 has no pixels; the labels of the second half are all 0."""
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(COUNT, DIMENSIONS, generator=generator)
    variance = torch.rand(COUNT, DIMENSIONS, generator=generator) + 0.01
    labels = torch.tensor([0, 1, 2, 4])[torch.randint(4, (COUNT,), generator=generator)]
    labels[COUNT // 2 :] = 0
    return Gaussians(mean, variance), labels


def on_a_rank(rank):
    gaussians, labels = pixels()
    half = slice(rank * COUNT // 2, (rank + 1) * COUNT // 2)
    own = Gaussians(*(part[half].clone().requires_grad_() for part in gaussians))
    sure = torch.ones(COUNT // 2, dtype=torch.bool)
    statistics = class_statistics(own, labels[half], CLASSES).over_processes()
    contrasts = {}
    for name, options in {"batch": {}, "global": {"global_prototypes": True, "virtual_negatives": 2}}.items():
        module = PixelContrast(CLASSES, DIMENSIONS, anchors=6, negatives=9, temperature=4.0, **options)
        result = module(own, labels[half], sure, sure, torch.Generator().manual_seed(rank))
        gradients = torch.autograd.grad(result.loss, own)
        contrasts[name] = (result.loss.item(), [part.abs().max().item() for part in gradients], result.prototypes)
    return statistics, contrasts, labels[half].unique().tolist()


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(on_a_rank, 2)


def test_statistics_are_those_of_one_process_with_all_pixels(ranks):
    expected = class_statistics(*pixels(), CLASSES)
    for statistics, *_ in ranks:
        for found, wanted in zip(statistics, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_prototypes_are_equal_on_both_ranks_and_those_of_all_pixels(ranks):
    statistics = class_statistics(*pixels(), CLASSES)
    expected = {"batch": statistics.prototypes(), "global": GlobalPrototypes(CLASSES, DIMENSIONS).fuse(statistics)}
    for name, wanted in expected.items():
        first, second = (contrasts[name][2] for _, contrasts, _ in ranks)
        for ours, theirs, whole in zip(first, second, wanted, strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def test_a_rank_with_one_class_neither_hangs_nor_fails(ranks):
    (_, many, seen), (_, one, alone) = ranks
    assert (seen, alone) == ([0, 1, 2, 4], [0])
    for name in many:
        loss, gradients, _ = many[name]
        assert loss > 0
        assert min(gradients) > 0
        loss, gradients, _ = one[name]
        assert loss == 0
        assert gradients == [0.0, 0.0]
