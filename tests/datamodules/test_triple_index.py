from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from datamodules import triple_index
from datamodules.triple_index import Groups, TripleIndex, WithReverses, ranges, row_keys

ENTITIES, RELATIONS = 9, 3


def random_triples(seed=0, count=80):
    random = np.random.default_rng(seed)
    triples = np.stack([random.integers(0, size, count) for size in (ENTITIES, RELATIONS, ENTITIES)], axis=1)
    return np.unique(triples, axis=0)[random.permutation(len(np.unique(triples, axis=0)))]


def both_ways(triples):
    return [tuple(row) for row in triples.tolist()] + [(t, r + RELATIONS, h) for h, r, t in triples.tolist()]


@pytest.fixture(params=["one number a pair", "two numbers"])
def graph(request, monkeypatch):
    """Triples with reverses as a list, and their index; with numbers too large to join, pairs are sorted as pairs."""
    if request.param == "two numbers":
        monkeypatch.setattr(triple_index, "LARGEST_KEY", 1)
    triples = random_triples()
    return both_ways(triples), TripleIndex(WithReverses(triples, RELATIONS), ENTITIES, 2 * RELATIONS)


def gathered(found):
    """Values, and how often each occurs, of each row."""
    rows = defaultdict(list)
    counts = np.ones(len(found.rows), dtype=int) if found.counts is None else found.counts
    for row, value, count in zip(found.rows.tolist(), found.values.tolist(), counts.tolist(), strict=True):
        rows[row].append((value, count))
    return rows


def test_tails_of_every_head_and_relation(graph):
    triples, index = graph
    heads, relations = (grid.ravel() for grid in np.meshgrid(np.arange(ENTITIES), np.arange(2 * RELATIONS)))
    found = gathered(index.tails_of(heads, relations))
    for row, (head, relation) in enumerate(zip(heads.tolist(), relations.tolist(), strict=True)):
        expected = sorted(t for h, r, t in triples if (h, r) == (head, relation))
        assert [value for value, _ in found[row]] == expected
    expected = [len(found[row]) for row in range(len(heads))]
    assert index.tail_counts(heads, relations).tolist() == expected


def test_counts_of_relations_heads_and_tails(graph):
    triples, index = graph
    seen = gathered(index.seen.gather(np.arange(2 * RELATIONS)))
    for relation in range(2 * RELATIONS):
        assert seen[relation] == sorted(Counter(t for _, r, t in triples if r == relation).items())
    linked = gathered(index.linked.gather(np.arange(ENTITIES)))
    for head in range(ENTITIES):
        assert linked[head] == sorted(Counter(t for h, _, t in triples if h == head).items())
    tails, relations = Counter(t for _, _, t in triples), Counter(r for _, r, _ in triples)
    assert index.entity_counts.tolist() == [tails[entity] for entity in range(ENTITIES)]
    assert index.relation_counts.tolist() == [relations[relation] for relation in range(2 * RELATIONS)]
    assert len(index) == len(triples)


def test_a_batch_may_ask_for_a_key_twice_or_for_one_that_is_not_there():
    groups = Groups(np.array([4, 2, 4, 2, 9]), np.array([1, 0, 3, 0, 2]), 5, counted=True)
    found = groups.gather(np.array([9, 3, 4, 0, 4, 12]))
    assert gathered(found) == {0: [(2, 1)], 2: [(1, 1), (3, 1)], 4: [(1, 1), (3, 1)]}
    assert gathered(groups.gather(np.array([2]))) == {0: [(0, 2)]}
    assert groups.lengths_of(np.array([9, 3, 4, 0, 2, 12])).tolist() == [1, 0, 2, 0, 1, 0]


def test_groups_of_nothing():
    empty = np.empty(0, dtype=np.int64)
    groups = Groups(empty, empty, 5, counted=True)
    keys = np.array([0, 3])
    assert len(groups) == 0
    assert len(groups.gather(keys).values) == 0
    assert groups.lengths_of(keys).tolist() == [0, 0]
    assert groups.contains(keys, keys).tolist() == [False, False]


def test_membership_of_every_possible_triple(graph):
    triples, index = graph
    grids = np.meshgrid(np.arange(ENTITIES), np.arange(2 * RELATIONS), np.arange(ENTITIES))
    possible = np.stack([grid.ravel() for grid in grids], axis=1)
    expected = [tuple(row) in set(triples) for row in possible.tolist()]
    assert index.contains(possible).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_joined_ranges():
    random = np.random.default_rng(3)
    starts, lengths = random.integers(0, 100, 20), random.integers(0, 4, 20)
    expected = [place for start, length in zip(starts, lengths, strict=True) for place in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == expected
    assert ranges(np.empty(0, dtype=int), np.empty(0, dtype=int)).tolist() == []


def test_reverses_are_worked_out_row_by_row_and_all_at_once():
    triples = random_triples(1)
    lazy = WithReverses(triples.astype(np.int32), RELATIONS)
    expected = both_ways(triples)
    assert len(lazy) == len(expected)
    assert [tuple(row) for row in np.asarray(lazy).tolist()] == expected
    rows = np.random.default_rng(0).permutation(len(expected))
    found = lazy[rows]
    assert found.dtype == np.int64
    assert [tuple(row) for row in found.tolist()] == [expected[row] for row in rows]
    assert lazy[len(triples)].tolist() == list(expected[len(triples)])
    for row in (-1, len(expected)):
        with pytest.raises(IndexError, match=f"{len(expected)} triples"):
            lazy[np.array([0, row])]


def test_weights_follow_the_running_counts_of_section_1(graph):
    triples, index = graph
    by_head, by_tail = {}, {}
    for h, r, t in triples:
        by_head[h, r] = by_head.get((h, r), 3) + 1
        by_tail[t, r] = by_tail.get((t, r), 3) + 1
    expected = [(by_head[h, r] + by_tail[t, r]) ** -0.5 for h, r, t in triples]
    heads, relations, tails = np.array(triples).T
    found = index.weights(heads, relations, tails, (relations + RELATIONS) % (2 * RELATIONS))
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) > 1


def test_categories_of_relations(graph):
    triples, index = graph
    for relation, found in enumerate(index.relation_categories()):
        assert found == category([(h, t) for h, r, t in triples if r == relation])


def category(pairs):
    per_head = Fraction(len(pairs), len({h for h, _ in pairs}))
    per_tail = Fraction(len(pairs), len({t for _, t in pairs}))
    return int(per_head >= Fraction(3, 2)) + 2 * int(per_tail >= Fraction(3, 2))


def test_categories_at_the_threshold_and_of_a_relation_without_a_triple():
    pairs = {
        0: [(0, 1), (2, 3)],  # 1-1
        1: [(0, 1), (0, 2), (3, 4)],  # 1.5 tails a head
        2: [(0, 1), (2, 1), (3, 4)],  # 1.5 heads a tail
        3: [(0, 1), (0, 2), (3, 1), (3, 2)],  # N-N
        4: [(0, 1), (0, 2), (3, 4), (5, 6)],  # 4 / 3 tails a head
        5: [],
    }
    triples = np.array([(h, r, t) for r, its in pairs.items() for h, t in its])
    index = TripleIndex(WithReverses(triples, 6), 7, 12)
    assert index.relation_categories().tolist() == [0, 1, 2, 3, 0, 0]
    assert [category(its) for its in list(pairs.values())[:5]] == [0, 1, 2, 3, 0]


def test_a_head_and_relation_with_every_entity_as_a_tail():
    triples = [(1, 0, 0), (1, 0, 1), (1, 0, 2), (2, 1, 0)]
    assert TripleIndex(np.array(triples), 3, 2).full_pair() == (1, 0)
    assert TripleIndex(np.array(triples[1:]), 3, 2).full_pair() is None


def test_triples_as_numbers(monkeypatch):
    triples = random_triples(2)
    for largest in (triple_index.LARGEST_KEY, 1):
        monkeypatch.setattr(triple_index, "LARGEST_KEY", largest)
        keys = row_keys(triples, ENTITIES, RELATIONS)
        assert keys.shape == (len(triples),)
        assert len(np.unique(keys)) == len(triples)
        order = np.argsort(keys)
        assert triples[order].tolist() == sorted(triples.tolist())
