"""The self-adversarial loss against loops, and its three ways to share negatives against each other."""

import math

import pytest
import torch

from modules.knowledge_graph import corrupted_distances, self_adversarial_loss
from tests.modules import small_graph
from tests.modules.small_graph import KINDS, scoring

ROWS, NEGATIVES = 7, 5


def numbers(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_sigmoid(value):
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


def by_loops(positive, negative, temperature, excluded=None, weights=None):
    """Section 1, triple by triple."""
    positive, negative = positive.tolist(), negative.tolist()
    weights = [1.0] * len(positive) if weights is None else weights.tolist()
    of_triples = of_corruptions = 0.0
    for i, score in enumerate(positive):
        kept = [value for k, value in enumerate(negative[i]) if excluded is None or not excluded[i][k]]
        total = sum(math.exp(temperature * value) for value in kept)
        own = sum(math.exp(temperature * value) / total * log_sigmoid(-value) for value in kept)
        of_triples -= weights[i] * log_sigmoid(score)
        of_corruptions -= weights[i] * own
    return (of_triples / sum(weights) + of_corruptions / sum(weights)) / 2


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_that_of_the_specification(temperature, weighted):
    positive, negative = numbers(ROWS), numbers(ROWS, NEGATIVES, seed=1)
    excluded = numbers(ROWS, NEGATIVES, seed=2) > 1
    assert 0 < excluded.sum() < ROWS * NEGATIVES
    weights = numbers(ROWS, seed=3).abs() if weighted else None
    expected = by_loops(positive, negative, temperature, weights=weights)
    assert self_adversarial_loss(positive, negative, temperature, weights=weights).item() == pytest.approx(expected)
    expected = by_loops(positive, negative, temperature, excluded, weights)
    found = self_adversarial_loss(positive, negative, temperature, excluded, weights)
    assert found.item() == pytest.approx(expected)


def test_a_triple_whose_negatives_are_all_excluded_has_the_positive_part_alone():
    positive, negative = numbers(ROWS), numbers(ROWS, NEGATIVES, seed=1).requires_grad_()
    excluded = torch.zeros(ROWS, NEGATIVES, dtype=torch.bool)
    excluded[2] = True
    loss = self_adversarial_loss(positive, negative, 1.0, excluded)
    assert loss.item() == pytest.approx(by_loops(positive, negative.detach(), 1.0, excluded))
    (gradient,) = torch.autograd.grad(loss, negative)
    assert gradient.isfinite().all()
    assert (gradient[2] == 0).all()


def test_excluded_negatives_do_not_matter():
    positive, negative = numbers(ROWS), numbers(ROWS, NEGATIVES, seed=1)
    excluded = torch.zeros(ROWS, NEGATIVES, dtype=torch.bool)
    excluded[:, 3] = True
    other = negative.clone()
    other[:, 3] = 50.0
    without = negative[:, [0, 1, 2, 4]]
    expected = self_adversarial_loss(positive, without)
    assert torch.allclose(self_adversarial_loss(positive, negative, excluded=excluded), expected)
    assert torch.allclose(self_adversarial_loss(positive, other, excluded=excluded), expected)


def test_weights_of_negatives_have_no_gradient():
    """d/df of -w log sigmoid(-f) with w fixed is w sigmoid(f)."""
    negative = numbers(ROWS, NEGATIVES, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(self_adversarial_loss(numbers(ROWS), negative, 2.0), negative)
    shares = torch.softmax(2 * negative.detach(), dim=1)
    assert torch.allclose(gradient, shares * torch.sigmoid(negative.detach()) / ROWS / 2)


def test_large_scores_stay_finite():
    positive = torch.tensor([-1e4, 1e4], requires_grad=True)
    negative = torch.tensor([[1e4, -1e4], [-1e4, -1e4]], requires_grad=True)
    loss = self_adversarial_loss(positive, negative)
    assert loss.item() == pytest.approx((1e4 + 1e4) / 2 / 2)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, [positive, negative]))


def test_the_sum_of_weights_may_be_that_of_a_larger_batch():
    """Two halves, each over the mean of both sums of weights, average to the whole."""
    positive, negative, weights = numbers(8), numbers(8, NEGATIVES, seed=1), numbers(8, seed=3).abs()
    mean = (weights[:3].sum() + weights[3:].sum()) / 2
    parts = [
        self_adversarial_loss(positive[part], negative[part], 1.0, None, weights[part], mean)
        for part in (slice(0, 3), slice(3, 8))
    ]
    assert (sum(parts) / 2).item() == pytest.approx(self_adversarial_loss(positive, negative, weights=weights).item())
    halves = [self_adversarial_loss(positive[part], negative[part], total_weight=4) for part in (slice(3), slice(3, 8))]
    assert (sum(halves) / 2).item() == pytest.approx(self_adversarial_loss(positive, negative).item())


# ---- negatives


@pytest.mark.parametrize("name", KINDS)
def test_shared_grouped_and_own_negatives_agree(name):
    function = scoring(name, 3).double()
    heads, tails = numbers(ROWS, function.entity_width), numbers(NEGATIVES, function.entity_width, seed=1)
    relations = numbers(ROWS, function.relation_width, seed=2)
    expected = [
        [small_graph.distance(function, head, relation, tail) for tail in small_graph.rows(tails)]
        for head, relation in zip(small_graph.rows(heads), small_graph.rows(relations), strict=True)
    ]
    ways = {"shared": tails, "own": tails.expand(ROWS, -1, -1)}
    ways |= {f"groups of {size}": tails.expand(-(-ROWS // size), -1, -1) for size in (2, 3, 4, ROWS)}
    losses = []
    for way, negatives in ways.items():
        leaf = negatives.clone().requires_grad_()
        found = corrupted_distances(function, heads, relations, leaf)
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64)), way
        loss = self_adversarial_loss(numbers(ROWS, seed=4), function.margin - found)
        (gradient,) = torch.autograd.grad(loss, leaf)
        losses.append((loss, gradient.reshape(-1, *tails.shape).sum(0)))
    for loss, gradient in losses[1:]:
        assert torch.allclose(loss, losses[0][0])
        assert torch.allclose(gradient, losses[0][1])


def test_groups_of_rows_have_their_own_negatives():
    """Row i of 7 in 3 groups belongs to group i // 3."""
    function = scoring("TransE", 3).double()
    heads, relations, tails = numbers(7, 3), numbers(7, 3, seed=1), numbers(3, NEGATIVES, 3, seed=2)
    found = corrupted_distances(function, heads, relations, tails)
    expected = [
        [
            small_graph.distance(function, heads[i].tolist(), relations[i].tolist(), tail)
            for tail in tails[i // 3].tolist()
        ]
        for i in range(7)
    ]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))
