"""What a knowledge graph says of a head, a relation or a tail, as sorted arrays that a whole batch reads at once."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

LARGEST_KEY = 2**62
MANY = 1.5  # tails per head, or heads per tail, from which on a relation counts as one to many


class Gathered(NamedTuple):
    """The values of several groups, one after the other.

    Args:
        rows: (N,) int64 which of the groups asked for.
        values: (N,) int64 its values, ascending within the group.
        counts: (N,) int64 how often each value occurs in the group, or None where each occurs once.
    """

    rows: np.ndarray
    values: np.ndarray
    counts: np.ndarray | None


class Groups:
    """Distinct values by key, in compressed rows: the values of group g are ``values[starts[g] : starts[g + 1]]``.

    Args:
        keys: (n,) int64 key of each entry, at least 0.
        values: (n,) int64 value of each entry, 0..num_values-1.
        num_values: Number of possible values.
        counted: Count how often a value occurs with a key.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray, num_values: int, *, counted: bool = False) -> None:
        keys, self.values, counts = _distinct(keys, values, num_values)
        self.counts = counts if counted else None
        firsts = np.flatnonzero(_changes(keys))
        self.keys = keys[firsts]
        self.starts = np.append(firsts, len(keys))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> np.ndarray:
        """(groups,) int64 number of values of each group."""
        return np.diff(self.starts)

    def lengths_of(self, keys: np.ndarray) -> np.ndarray:
        """(B,) int64 number of values of each key, 0 for a key that does not occur."""
        return self._bounds(keys)[1]

    def gather(self, keys: np.ndarray) -> Gathered:
        """Read the values of a batch of keys.

        Args:
            keys: (B,) int64 keys; one that does not occur has no values.
        """
        starts, lengths = self._bounds(keys)
        places = ranges(starts, lengths)
        rows = np.repeat(np.arange(len(keys)), lengths)
        return Gathered(rows, self.values[places], None if self.counts is None else self.counts[places])

    def contains(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(B,) whether each value, (B,) int64, is among those of its key, (B,) int64."""
        low, lengths = self._bounds(keys)
        end = high = low + lengths
        last = len(self.values) - 1
        while (open_ := low < high).any():  # halves all ranges at once
            middle = (low + high) // 2
            below = open_ & (self.values[np.minimum(middle, last)] < values)
            low, high = np.where(below, middle + 1, low), np.where(open_ & ~below, middle, high)
        return (low < end) & (self.values[np.minimum(low, last)] == values) if last >= 0 else low < end

    def _bounds(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and number of the values of each key."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=np.int64)
        groups = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        starts = self.starts[groups]
        return starts, np.where(self.keys[groups] == keys, self.starts[groups + 1] - starts, 0)


class WithReverses:
    """Triples and their reverses, which are worked out for the rows that are asked for.

    Row i of N triples (h, r, t) is as it is, row N + i is (t, r + R, h).

    Args:
        triples: (N, 3) whole numbers, which may stay on disk.
        num_relations: Number R of relations without reversed ones.
    """

    def __init__(self, triples: np.ndarray, num_relations: int) -> None:
        self.triples, self.num_relations = triples, num_relations

    def __len__(self) -> int:
        return 2 * len(self.triples)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        count = len(self.triples)
        if rows.size and not 0 <= rows.min() <= rows.max() < 2 * count:
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {2 * count} triples")
        found = self.triples[rows % count].astype(np.int64)
        reverse = rows >= count
        found[reverse] = self._reversed(found[reverse])
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        triples = np.asarray(self.triples, dtype=np.int64)
        return np.concatenate([triples, self._reversed(triples)]).astype(dtype or np.int64, copy=False)

    def _reversed(self, triples: np.ndarray) -> np.ndarray:
        return triples[:, ::-1] + np.array([0, self.num_relations, 0])


class TripleIndex:
    """What triples say of their parts. Each table is built by one sort when it is first asked for.

    Args:
        triples: (T, 3) int64 head, relation, tail, with the reversed ones; anything that NumPy makes such an array of.
        num_entities: Number E of entities.
        num_relations: Number of relations, the reversed ones included.
    """

    def __init__(self, triples: np.ndarray, num_entities: int, num_relations: int) -> None:
        self.triples = triples
        self.num_entities, self.num_relations = num_entities, num_relations

    def __len__(self) -> int:
        return len(self.triples)

    def key(self, entities: np.ndarray, relations: np.ndarray) -> np.ndarray:
        """Number a pair of entity and relation."""
        return entities * self.num_relations + relations

    @cached_property
    def tails(self) -> Groups:
        """Tails by ``key(head, relation)``; read them with :meth:`tails_of`."""
        heads, relations, tails = self._columns()
        return Groups(self.key(heads, relations), tails, self.num_entities)

    @cached_property
    def seen(self) -> Groups:
        """Tails by relation, with the number of heads that each has."""
        _, relations, tails = self._columns()
        return Groups(relations, tails, self.num_entities, counted=True)

    @cached_property
    def linked(self) -> Groups:
        """Tails by head, with the number of relations that link the two."""
        heads, _, tails = self._columns()
        return Groups(heads, tails, self.num_entities, counted=True)

    @cached_property
    def entity_counts(self) -> np.ndarray:
        """(E,) int64 number of triples that an entity is the tail of."""
        return np.bincount(self._columns()[2], minlength=self.num_entities)

    @cached_property
    def relation_counts(self) -> np.ndarray:
        """(relations,) int64 number of triples of a relation."""
        return np.bincount(self._columns()[1], minlength=self.num_relations)

    def tails_of(self, heads: np.ndarray, relations: np.ndarray) -> Gathered:
        """Read the tails of a batch of (head, relation), each (B,) int64."""
        return self.tails.gather(self.key(heads, relations))

    def tail_counts(self, heads: np.ndarray, relations: np.ndarray) -> np.ndarray:
        """(B,) int64 number of tails of a batch of (head, relation), each (B,) int64."""
        return self.tails.lengths_of(self.key(heads, relations))

    def contains(self, triples: np.ndarray) -> np.ndarray:
        """(B,) whether each of these triples, (B, 3) int64, is one of the index."""
        heads, relations, tails = triples.T
        return self.tails.contains(self.key(heads, relations), tails)

    def full_pair(self) -> tuple[int, int] | None:
        """The first (head, relation) that has every entity as a tail, or None."""
        full = np.flatnonzero(self.tails.lengths == self.num_entities)
        if not len(full):
            return None
        head, relation = divmod(int(self.tails.keys[full[0]]), self.num_relations)
        return head, relation

    def weights(self, heads: np.ndarray, relations: np.ndarray, tails: np.ndarray, reverse: np.ndarray) -> np.ndarray:
        """Weights of triples by how often their parts occur, section 1: (c(h, r) + c'(t, r)) ** -0.5.

        Args:
            heads: (B,) int64 entities.
            relations: (B,) int64 relations.
            tails: (B,) int64 entities.
            reverse: (B,) int64 the reversed relations, as the heads of (r, t) are the tails of (t, reverse).

        Returns:
            (B,) float32.
        """
        counts = 6 + self.tail_counts(heads, relations) + self.tail_counts(tails, reverse)
        return (1 / np.sqrt(counts)).astype(np.float32)

    def relation_categories(self) -> np.ndarray:
        """(relations / 2,) int64 kind of each relation that is not reversed: 0 is 1-1, 1 is 1-N, 2 is N-1, 3 is N-N.

        A relation is to N if its heads have 1.5 tails or more on average, and from N likewise. One without a triple is
        1-1.
        """
        half = self.num_relations // 2
        heads_of = np.bincount(self.tails.keys % self.num_relations, minlength=self.num_relations)
        triples = np.maximum(self.relation_counts[:half], 1)
        to_many = triples >= MANY * np.maximum(heads_of[:half], 1)
        from_many = triples >= MANY * np.maximum(heads_of[half:], 1)
        return to_many.astype(np.int64) + 2 * from_many.astype(np.int64)

    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(np.asarray(self.triples, dtype=np.int64).T)


def row_keys(triples: np.ndarray, num_entities: int, num_relations: int) -> np.ndarray:
    """One number for each triple, to sort and compare; a structured array where the numbers would be too large."""
    triples = np.asarray(triples, dtype=np.int64)
    if num_entities * num_entities * num_relations < LARGEST_KEY:
        return (triples[:, 0] * num_relations + triples[:, 1]) * num_entities + triples[:, 2]
    fields = np.dtype([(name, np.int64) for name in ("head", "relation", "tail")])
    return np.ascontiguousarray(triples).view(fields).reshape(-1)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Join the ranges ``starts[i] .. starts[i] + lengths[i] - 1``, each (B,) int64, into one array of places."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - ends + lengths, lengths)


def _distinct(keys: np.ndarray, values: np.ndarray, num_values: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct pairs in ascending order, and how often each occurs."""
    if not len(keys):
        empty = np.empty(0, dtype=np.int64)
        return empty, empty, empty
    total = len(keys)
    if int(keys.max()) < LARGEST_KEY // num_values:
        # one number a pair sorts several times faster than pairs
        pairs = np.sort(keys * num_values + values)
        firsts = np.flatnonzero(_changes(pairs))
        keys, values = np.divmod(pairs[firsts], num_values)
    else:
        order = np.lexsort((values, keys))
        keys, values = keys[order], values[order]
        firsts = np.flatnonzero(_changes(keys) | _changes(values))
        keys, values = keys[firsts], values[firsts]
    return keys, values, np.diff(firsts, append=total)


def _changes(ordered: np.ndarray) -> np.ndarray:
    """Where a sorted array has another number than before, the first place included."""
    changes = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=changes[1:])
    return changes
