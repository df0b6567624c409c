"""Draws of anchors and negatives against their distributions."""

import pytest
import torch

from modules.prcl.sampling import ClassPools, class_pools, draw_anchors, draw_negatives

CLASSES = 5


def labelled_rows(count=300, seed=0):
    """Labels of which a third is void; classes of very different sizes, class 3 without any pixel."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.6, 0.25, 0.05, 0.0, 0.1])
    labels = torch.multinomial(shares, count, replacement=True, generator=generator)
    chosen = torch.rand(count, generator=generator) > 1 / 3
    return torch.where(chosen, labels, 255), chosen


def within_standard_errors(counts, shares, errors=4.5):
    """Whether counts of independent draws agree with their probabilities."""
    total = counts.sum()
    deviation = (total * shares * (1 - shares)).sqrt()
    return ((counts - total * shares).abs() <= errors * deviation + 1e-9).all()


def test_pools_hold_the_chosen_rows_of_each_class():
    labels, chosen = labelled_rows()
    pools = class_pools(labels, chosen, CLASSES)
    for label in range(CLASSES):
        start, count = pools.start[label], pools.count[label]
        expected = [row for row in range(len(labels)) if chosen[row] and labels[row] == label]
        assert pools.rows[start : start + count].tolist() == expected
    assert pools.count[3] == 0
    assert pools.count.sum() == len(pools.rows) == chosen.sum()


def test_nothing_chosen():
    pools = class_pools(torch.full((4,), 255), torch.zeros(4, dtype=torch.bool), CLASSES)
    assert pools.count.tolist() == [0] * CLASSES
    assert len(pools.rows) == 0


def test_the_largest_random_number_draws_the_last_pixel():
    count = torch.cat([torch.arange(1, 50_000), 2**24 - torch.arange(1, 50_000)])
    pools = ClassPools(torch.tensor(7).expand(2**24), torch.zeros_like(count), count)
    largest = torch.full(count.shape, 1 - 2**-24)
    assert (pools.draw(torch.arange(len(count)), largest) == 7).all()
    small = ClassPools(torch.arange(50_000), torch.zeros_like(count), count[: 50_000 - 1])
    every = torch.arange(50_000 - 1)
    assert torch.equal(small.draw(every, largest[every]), every)
    assert (small.draw(every, torch.zeros(len(every))) == 0).all()


def test_negatives_follow_the_softmax_of_the_scores_over_other_classes_and_are_uniform_within_a_class():
    labels, chosen = labelled_rows()
    pools = class_pools(labels, chosen, CLASSES)
    anchor_classes = torch.tensor([0, 2, 4])
    scores = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(1))
    rows = draw_negatives(pools, anchor_classes, scores, 200, 500, torch.Generator().manual_seed(2))
    assert rows.shape == (3, 200, 500)
    for position, own in enumerate(anchor_classes.tolist()):
        weights = [0.0 if label in (own, 3) else scores[position, label].double().exp() for label in range(CLASSES)]
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        drawn = rows[position].flatten()
        assert chosen[drawn].all()
        assert (labels[drawn] != own).all()
        assert within_standard_errors(torch.bincount(labels[drawn], minlength=CLASSES).double(), shares)
        per_row = torch.zeros(len(labels), dtype=torch.float64)
        for row in range(len(labels)):
            if chosen[row] and labels[row] != own:
                per_row[row] = shares[labels[row]] / ((labels == labels[row]) & chosen).sum()
        assert within_standard_errors(torch.bincount(drawn, minlength=len(labels)).double(), per_row, 5)


def test_negatives_of_two_classes_are_those_of_the_other():
    labels = torch.tensor([0, 1, 1, 0, 255, 1])
    pools = class_pools(labels, labels < 255, 2)
    rows = draw_negatives(pools, torch.tensor([0, 1]), torch.zeros(2, 2), 4, 50)
    assert set(rows[0].flatten().tolist()) == {1, 2, 5}
    assert set(rows[1].flatten().tolist()) == {0, 3}


def test_extreme_scores_draw_one_class():
    """Scores differ by millions where prototypes have tiny variances."""
    labels, chosen = labelled_rows()
    scores = torch.tensor([[0.0, -3e9, 5e9, 1e10, 0.0]])
    rows = draw_negatives(class_pools(labels, chosen, CLASSES), torch.tensor([0]), scores, 10, 10)
    assert set(labels[rows].flatten().tolist()) == {2}


def test_scores_of_a_network_that_has_diverged_do_not_fail_in_the_draw():
    labels, chosen = labelled_rows()
    scores = torch.full((1, CLASSES), torch.nan)
    rows = draw_negatives(class_pools(labels, chosen, CLASSES), torch.tensor([0]), scores, 10, 10)
    assert set(labels[rows].flatten().tolist()) == {1, 2, 4}


def test_anchors_are_uniform_pixels_of_their_class():
    labels, chosen = labelled_rows()
    hard = chosen & (torch.arange(len(labels)) % 3 == 0)
    classes = torch.tensor([4, 0])
    rows = draw_anchors(class_pools(labels, hard, CLASSES), classes, 40_000, torch.Generator().manual_seed(3))
    assert rows.shape == (2, 40_000)
    for position, label in enumerate(classes.tolist()):
        pool = hard & (labels == label)
        counts = torch.bincount(rows[position], minlength=len(labels)).double()
        assert within_standard_errors(counts, pool.double() / pool.sum())


@pytest.mark.parametrize("generator", [True, False])
def test_the_same_seed_draws_the_same(generator):
    labels, chosen = labelled_rows()
    pools = class_pools(labels, chosen, CLASSES)

    def draw(seed):
        source = torch.Generator().manual_seed(seed) if generator else None
        torch.manual_seed(seed)
        anchors = draw_anchors(pools, torch.tensor([0, 1]), 20, source)
        negatives = draw_negatives(pools, torch.tensor([0, 1]), torch.zeros(2, CLASSES), 20, 5, source)
        return torch.cat([anchors.flatten(), negatives.flatten()])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
