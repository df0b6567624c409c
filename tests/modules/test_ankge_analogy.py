"""Analogy functions, their targets, losses and shares against loops written from section 3."""

import math

import pytest
import torch

from modules.ankge import AnalogyFunctions, Neighbours, aggregate, level_losses, level_shares
from tests.modules import small_graph
from tests.modules.small_graph import BASES, tables

ROWS, ENTITIES, RELATIONS = 6, 7, 4


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- analogy functions


@pytest.mark.parametrize("transfer", [0.0, 0.3, 1.0])
def test_analogies_are_those_of_the_specification(transfer):
    functions = AnalogyFunctions(ENTITIES, RELATIONS, entity_width=3, relation_width=2, transfer=transfer)
    heads, relations = torch.tensor([0, 6, 6, 2, 3, 1]), torch.tensor([3, 0, 1, 1, 2, 3])
    head_vectors, relation_vectors = numbers(ROWS, 3), numbers(ROWS, 2, seed=1)
    found_heads, found_relations = functions(heads, relations, head_vectors, relation_vectors)
    of_entities, of_relations = small_graph.rows(functions.entities), small_graph.rows(functions.relations)
    projection = small_graph.rows(functions.projection)
    for row, (h, r) in enumerate(zip(heads.tolist(), relations.tolist(), strict=True)):
        relation = [value * of_relations[r][i] for i, value in enumerate(relation_vectors[row].tolist())]
        head = [
            value * of_entities[h][j] + transfer * sum(relation[i] * projection[i][j] for i in range(2))
            for j, value in enumerate(head_vectors[row].tolist())
        ]
        assert found_relations[row].tolist() == pytest.approx(relation, rel=1e-5, abs=1e-6)
        assert found_heads[row].tolist() == pytest.approx(head, rel=1e-5, abs=1e-6)


def test_first_values_of_the_functions():
    torch.manual_seed(0)
    functions = AnalogyFunctions(400, 300, entity_width=50, relation_width=40)
    assert {name: tuple(value.shape) for name, value in functions.named_parameters()} == {
        "entities": (400, 50),
        "relations": (300, 40),
        "projection": (40, 50),
    }
    for name, mean in (("entities", 1.0), ("relations", 1.0), ("projection", 0.0)):
        values = getattr(functions, name)
        assert values.mean().item() == pytest.approx(mean, abs=0.01)
        assert values.std().item() == pytest.approx(0.1, rel=0.05)


def test_every_parameter_has_a_gradient_also_without_transfer():
    """DDP waits for the gradient of each parameter."""
    functions = AnalogyFunctions(ENTITIES, RELATIONS, 3, 2, transfer=0.0)
    heads, _ = functions(torch.arange(4), torch.arange(4), numbers(4, 3), numbers(4, 2))
    heads.sum().backward()
    assert all(parameter.grad is not None for parameter in functions.parameters())
    assert (functions.projection.grad == 0).all()


def test_cubes():
    functions = AnalogyFunctions(ENTITIES, RELATIONS, 3, 2)
    expected = sum(abs(value) ** 3 for part in functions.parameters() for row in part.tolist() for value in row)
    assert functions.cubes().item() == pytest.approx(expected, rel=1e-5)


# ---- targets


def neighbours(entities, relations, pairs):
    def ids(width, below, seed):
        return torch.randint(below, (ROWS, width), generator=torch.Generator().manual_seed(seed))

    return Neighbours(
        ids(entities, ENTITIES, 1),
        3 * numbers(ROWS, entities, seed=2).abs(),
        ids(relations, RELATIONS, 3),
        3 * numbers(ROWS, relations, seed=4).abs(),
        ids(pairs, ENTITIES, 5),
        ids(pairs, RELATIONS, 6),
        3 * numbers(ROWS, pairs, seed=7).abs(),
    )


def weighted_mean(table, ids, distances):
    """Sum of softmax(-d) times the vectors."""
    weights = [math.exp(-distance) for distance in distances]
    return [
        sum(weight / sum(weights) * table[i][j] for weight, i in zip(weights, ids, strict=True))
        for j in range(len(table[0]))
    ]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 3), (3, 2, 5)])
def test_targets_are_means_of_the_vectors_by_distance(sizes):
    found = tables("HAKE", ENTITIES, RELATIONS // 2).requires_grad_()
    given = neighbours(*sizes)
    targets = aggregate(found, given)
    entities, relations = small_graph.rows(found.entities), small_graph.rows(found.relations)
    for row in range(ROWS):
        one = [part[row].tolist() for part in given]
        expected = (
            weighted_mean(entities, one[0], one[1]),
            weighted_mean(relations, one[2], one[3]),
            weighted_mean(entities, one[4], one[6]),
            weighted_mean(relations, one[5], one[6]),
        )
        for own, other in zip(targets, expected, strict=True):
            assert own[row].tolist() == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert not any(target.requires_grad for target in targets)


def test_the_target_of_one_object_is_its_vector():
    found, given = tables("TransE", ENTITIES, RELATIONS // 2), neighbours(1, 1, 1)
    targets = aggregate(found, given)
    assert torch.equal(targets.head, found.entities[given.entities[:, 0]])
    assert torch.equal(targets.pair_relation, found.relations[given.pair_relations[:, 0]])


# ---- losses


def minus_log_sigmoid(value):
    return math.log1p(math.exp(-value)) if value > 0 else math.log1p(math.exp(value)) - value


def length(values):
    return math.sqrt(sum(value * value for value in values))


def logit(similarity, own, target, distance, strength):
    """What the sigmoid is taken of."""
    if similarity == "norm":
        return -strength * length([a - b for a, b in zip(own, target, strict=True)]) - distance
    cosine = sum(a * b for a, b in zip(own, target, strict=True)) / length(own) / length(target)
    return strength * cosine + distance * (1 if similarity == "cos_official" else -1)


@pytest.mark.parametrize("similarity", ["norm", "cos", "cos_official"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 10.0])
def test_losses_of_the_levels(similarity, strength):
    analogies = [numbers(ROWS, width, seed=width) for width in (3, 2, 5)]
    targets = [numbers(ROWS, width, seed=10 + width) for width in (3, 2, 5)]
    distances = numbers(ROWS, 3, seed=20).abs()
    found = level_losses(distances, analogies, targets, strength, similarity)
    expected = [
        [
            minus_log_sigmoid(
                logit(similarity, analogies[x][i].tolist(), targets[x][i].tolist(), distances[i, x].item(), strength)
            )
            for x in range(3)
        ]
        for i in range(ROWS)
    ]
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("similarity", "rises"), [("norm", True), ("cos", True), ("cos_official", False)])
def test_only_the_official_cosine_rewards_distance(similarity, rises):
    distances = torch.ones(ROWS, 3, requires_grad=True)
    vectors = [numbers(ROWS, 4, seed=seed) for seed in range(6)]
    loss = level_losses(distances, vectors[:3], vectors[3:], 0.5, similarity).sum()
    (gradient,) = torch.autograd.grad(loss, distances)
    assert (gradient > 0).all() if rises else (gradient < 0).all()


def test_an_analogy_that_is_its_target_has_a_finite_gradient():
    vectors = [numbers(ROWS, 4, seed=seed).requires_grad_() for seed in range(3)]
    targets = [vector.detach().clone() for vector in vectors]
    loss = level_losses(torch.zeros(ROWS, 3), vectors, targets, 10.0, "norm")
    assert loss.detach().flatten().tolist() == pytest.approx([math.log(2)] * ROWS * 3)
    for gradient in torch.autograd.grad(loss.sum(), vectors):
        assert gradient.isfinite().all()


def test_very_different_vectors_and_zero_vectors_give_finite_losses():
    far, zero = [torch.full((2, 4), 1e6)] * 3, [torch.zeros(2, 4)] * 3
    for similarity in ("norm", "cos", "cos_official"):
        assert level_losses(torch.ones(2, 3), far, zero, 10.0, similarity).isfinite().all()


# ---- shares


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("one_hot", [True, False])
def test_shares_of_the_levels(with_base, one_hot):
    distances, base = 2 * numbers(40, 3).abs(), 2 * numbers(40, seed=1).abs()
    found = level_shares(distances, base if with_base else None, one_hot)
    assert found.shape == (40, 3)
    nothing = 0
    for row in range(40):
        entries = distances[row].tolist() + ([base[row].item()] if with_base else [])
        if one_hot:
            shares = [float(entry == min(entries)) for entry in entries]
        else:
            total = sum(math.exp(-entry) for entry in entries)
            shares = [math.exp(-entry) / total for entry in entries]
        nothing += sum(shares[:3]) == 0
        assert found[row].tolist() == pytest.approx(shares[:3], rel=1e-5)
    assert (nothing > 0) == (with_base and one_hot)


def test_shares_of_equal_distances():
    assert level_shares(torch.ones(1, 3), torch.ones(1)).tolist() == [[0.25] * 3]
    assert level_shares(torch.ones(1, 3), None).tolist() == [pytest.approx([1 / 3] * 3)]
    assert level_shares(torch.ones(1, 3), torch.ones(1), one_hot=True).sum() <= 1


@pytest.mark.parametrize("name", BASES)
def test_analogies_take_the_widths_of_each_model(name):
    found = tables(name, ENTITIES, RELATIONS // 2)
    function = found.scoring
    functions = AnalogyFunctions(ENTITIES, RELATIONS, function.entity_width, function.relation_width)
    heads, relations = torch.tensor([1, 2]), torch.tensor([0, 3])
    own_heads, own_relations = functions(heads, relations, found.entities[heads], found.relations[relations])
    distances = function.distance(own_heads, own_relations, found.entities[torch.tensor([4, 0])])
    for row, tail in enumerate((4, 0)):
        vectors = own_heads[row], own_relations[row], found.entities[tail]
        expected = small_graph.distance(function, *(vector.tolist() for vector in vectors))
        assert distances[row].item() == pytest.approx(expected, rel=1e-5)
