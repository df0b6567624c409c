from collections import Counter

import numpy as np
import pytest

from datamodules.negative_sampling import NegativeSampler
from datamodules.triple_index import TripleIndex

ENTITIES, RELATIONS = 30, 4
PLACE = {"epoch": 2, "pass_": 0, "batch": 5}


def random_index(seed=0, count=300):
    random = np.random.default_rng(seed)
    triples = np.stack([random.integers(0, size, count) for size in (ENTITIES, RELATIONS, ENTITIES)], axis=1)
    return TripleIndex(triples, ENTITIES, RELATIONS)


def tails(index, head, relation):
    return {t for h, r, t in index.triples.tolist() if (h, r) == (head, relation)}


def batch(index, size=17, seed=1):
    rows = np.random.default_rng(seed).integers(0, len(index.triples), size)
    heads, relations, _ = index.triples[rows].T
    return heads, relations


def check_excluded(index, heads, relations, entities_of_row, excluded):
    for row, (head, relation) in enumerate(zip(heads.tolist(), relations.tolist(), strict=True)):
        known = tails(index, head, relation)
        assert excluded[row].tolist() == [entity in known for entity in entities_of_row(row).tolist()]
    assert 0 < excluded.mean() < 1


def test_a_batch_shares_distinct_entities_and_knows_which_are_tails():
    index = random_index()
    heads, relations = batch(index)
    sampler = NegativeSampler(index, 12, "shared", seed=3)
    for number in range(5):  # the table of places is used again
        found = sampler.draw(heads, relations, epoch=0, pass_=0, batch=number)
        assert found.entities.shape == (12,)
        assert found.entities.dtype == np.int64
        assert len(set(found.entities.tolist())) == 12
        assert set(found.entities.tolist()) <= set(range(ENTITIES))
        check_excluded(index, heads, relations, lambda row, drawn=found.entities: drawn, found.excluded)


@pytest.mark.parametrize(("size", "chunk_size", "chunks"), [(17, 4, 5), (16, 4, 4), (21, 4, 6), (3, 8, 1), (9, 2, 5)])
def test_chunks_have_their_own_entities(size, chunk_size, chunks):
    index = random_index()
    heads, relations = batch(index, size)
    found = NegativeSampler(index, 12, "chunked", chunk_size, seed=3).draw(heads, relations, **PLACE)
    assert found.entities.shape == (chunks, 12)
    assert all(len(set(row)) == 12 for row in found.entities.tolist())
    assert len({tuple(row) for row in found.entities.tolist()}) == chunks
    rows = -(-size // chunks)
    assert (size - 1) // rows == chunks - 1  # no chunk is empty
    assert rows <= chunk_size
    check_excluded(index, heads, relations, lambda row: found.entities[row // rows], found.excluded)


@pytest.mark.parametrize(("kind", "shape"), [("shared", (ENTITIES,)), ("chunked", (5, ENTITIES))])
@pytest.mark.parametrize("count", [ENTITIES, 256])
def test_as_many_negatives_as_entities_are_all_entities(kind, shape, count):
    index = random_index()
    heads, relations = batch(index)
    found = NegativeSampler(index, count, kind, 4).draw(heads, relations, **PLACE)
    assert found.entities.shape == shape
    assert (found.entities == np.arange(ENTITIES)).all()
    check_excluded(index, heads, relations, lambda row: np.arange(ENTITIES), found.excluded)


def test_a_triple_of_its_own_never_gets_a_known_tail():
    index = random_index(count=2000)
    heads, relations = batch(index, 60)
    found = NegativeSampler(index, 40, "per_triple").draw(heads, relations, **PLACE)
    assert found.entities.shape == found.excluded.shape == (60, 40)
    assert not found.excluded.any()
    for head, relation, drawn in zip(heads.tolist(), relations.tolist(), found.entities.tolist(), strict=True):
        assert set(drawn) <= set(range(ENTITIES)) - tails(index, head, relation)


@pytest.mark.parametrize("known", [[], [0], [ENTITIES - 1], [0, 1, 2, 7, 8, 28, 29], list(range(1, ENTITIES))])
def test_negatives_of_a_triple_are_uniform_over_what_is_no_tail(known):
    # another head before and after, so that the tails of this one are in the middle of the list
    triples = np.array([(0, 0, 5), (2, 0, 6), *((1, 0, tail) for tail in known)])
    index = TripleIndex(triples, ENTITIES, 1)
    heads, relations = np.array([0, 1, 2]), np.zeros(3, dtype=np.int64)
    draws = 20_000
    found = NegativeSampler(index, draws, "per_triple").draw(heads, relations, **PLACE).entities
    free = sorted(set(range(ENTITIES)) - set(known))
    counts = Counter(found[1].tolist())
    assert sorted(counts) == free
    expected = draws / len(free)
    # chi-square with len(free) - 1 degrees of freedom has that mean and twice that variance
    statistic = sum((counts[entity] - expected) ** 2 / expected for entity in free)
    assert statistic <= len(free) - 1 + 5 * np.sqrt(2 * len(free))
    assert sorted(set(found[0].tolist())) == sorted(set(range(ENTITIES)) - {5})
    assert sorted(set(found[2].tolist())) == sorted(set(range(ENTITIES)) - {6})


def test_shared_entities_are_drawn_uniformly():
    index = random_index()
    sampler = NegativeSampler(index, 10)
    heads, relations = batch(index)
    counts = Counter()
    for number in range(3000):
        counts.update(sampler.draw(heads, relations, epoch=0, pass_=0, batch=number).entities.tolist())
    expected = 3000 * 10 / ENTITIES
    assert all(abs(counts[entity] - expected) < 5 * np.sqrt(expected) for entity in range(ENTITIES))


@pytest.mark.parametrize("kind", ["shared", "chunked", "per_triple"])
def test_a_batch_has_the_same_negatives_each_time_and_others_than_the_next(kind):
    index = random_index()
    heads, relations = batch(index)
    first, again = (NegativeSampler(index, 12, kind, 4, seed=3) for _ in range(2))
    found = first.draw(heads, relations, **PLACE)
    first.draw(heads, relations, epoch=0, pass_=0, batch=0)
    for sampler in (first, again):
        repeated = sampler.draw(heads, relations, **PLACE)
        assert np.array_equal(found.entities, repeated.entities)
        assert np.array_equal(found.excluded, repeated.excluded)
    for change in ({"epoch": 3}, {"pass_": 1}, {"batch": 6}):
        assert not np.array_equal(found.entities, first.draw(heads, relations, **PLACE | change).entities)
    other = NegativeSampler(index, 12, kind, 4, seed=4)
    assert not np.array_equal(found.entities, other.draw(heads, relations, **PLACE).entities)


def test_the_first_batch_does_not_repeat_the_draw_of_the_order():
    # NumPy fills (seed, epoch, pass) up with zeros: (seed, epoch, pass, 0) alone would be the same stream
    index = random_index()
    found = NegativeSampler(index, 12, seed=3).draw(*batch(index), epoch=2, pass_=1, batch=0).entities
    order = np.random.default_rng((3, 2, 1)).choice(ENTITIES, 12, replace=False, shuffle=False)
    assert not np.array_equal(found, order)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "num_negatives is 0, expected 1 or more"),
        ({"chunk_size": 0}, "chunk_size is 0, expected 1 or more"),
        ({"kind": "own"}, "negatives 'own' are unknown, expected shared, chunked or per_triple"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        NegativeSampler(random_index(), **settings)


@pytest.mark.parametrize("kind", ["shared", "chunked", "per_triple"])
def test_a_pair_without_any_negative_is_refused(kind):
    index = TripleIndex(np.array([(1, 0, 0), (1, 0, 1), (1, 0, 2)]), 3, 1)
    with pytest.raises(ValueError, match="head 1 has every entity as a tail of relation 0"):
        NegativeSampler(index, 2, kind)
