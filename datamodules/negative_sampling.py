"""Entities that training triples are told apart from, as a function of the seed and of the batch's number."""

from typing import Literal, NamedTuple

import numpy as np

from datamodules.triple_index import TripleIndex

Kind = Literal["shared", "chunked", "per_triple"]

# The last number of each seed: NumPy fills short seeds up with zeros, and (seed, epoch, pass) is that of the order.
STREAM = 1


class Negatives(NamedTuple):
    """Entities to tell the triples of one batch apart from.

    Args:
        entities: int64 (K,), (C, K) or (B, K); see :class:`datamodules.batches.TripleBatch`.
        excluded: (B, K) bool, true where one is a known tail.
    """

    entities: np.ndarray
    excluded: np.ndarray


class NegativeSampler:
    """Draws entities for batches of triples; the same batch of a run always gets the same ones.

    ``shared`` and ``chunked`` draw K distinct entities for the batch or for each chunk of it, and say which of them are
    known tails. ``per_triple`` draws K entities for each triple, uniformly from those that are no known tail, and with
    replacement: what redrawing until none is known gives, but in one look-up.

    Args:
        index: Training triples, the reversed ones included; their tails are not negatives.
        count: Number K of entities; for ``shared`` and ``chunked``, E or more takes every entity.
        kind: ``shared``, ``chunked`` or ``per_triple``.
        chunk_size: Most rows of a chunk.
        seed: Seed of the run.

    Raises:
        ValueError: If a (head, relation) has every entity as a tail, so that it has no negative.
    """

    def __init__(
        self, index: TripleIndex, count: int = 256, kind: Kind = "shared", chunk_size: int = 128, seed: int = 0
    ) -> None:
        if kind not in ("shared", "chunked", "per_triple"):
            raise ValueError(f"negatives '{kind}' are unknown, expected shared, chunked or per_triple")
        for name, value in (("num_negatives", count), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        if (full := index.full_pair()) is not None:
            raise ValueError(f"head {full[0]} has every entity as a tail of relation {full[1]}, so it has no negative")
        self.index, self.kind, self.seed = index, kind, seed
        self.count = count if kind == "per_triple" else min(count, index.num_entities)
        self.chunk_size = chunk_size
        # place of each entity among those drawn; -1 between two calls
        self._places = np.full(index.num_entities, -1, dtype=np.int64)

    def draw(self, heads: np.ndarray, relations: np.ndarray, *, epoch: int, pass_: int, batch: int) -> Negatives:
        """Draw for one batch.

        Args:
            heads: (B,) int64 entities.
            relations: (B,) int64 relations, 0..2R-1.
            epoch: Epoch of the run.
            pass_: Pass over the data within the epoch.
            batch: Number of the batch within the pass, counted over all ranks.
        """
        random = np.random.default_rng((self.seed, epoch, pass_, batch, STREAM))
        if self.kind == "per_triple":
            entities = self._unknown_tails(heads, relations, random)
            return Negatives(entities, np.zeros(entities.shape, dtype=bool))
        if self.kind == "shared":
            entities = self._distinct(random)
            return Negatives(entities, self._known(heads, relations, entities))
        chunks = -(-len(heads) // self.chunk_size)
        rows = -(-len(heads) // chunks)
        entities = np.stack([self._distinct(random) for _ in range(chunks)])
        parts = [slice(start, start + rows) for start in range(0, len(heads), rows)]
        excluded = [
            self._known(heads[part], relations[part], drawn) for part, drawn in zip(parts, entities, strict=True)
        ]
        return Negatives(entities, np.concatenate(excluded))

    def _distinct(self, random: np.random.Generator) -> np.ndarray:
        if self.count == self.index.num_entities:
            return np.arange(self.count)
        return random.choice(self.index.num_entities, self.count, replace=False, shuffle=False)

    def _known(self, heads: np.ndarray, relations: np.ndarray, entities: np.ndarray) -> np.ndarray:
        """(B, K) whether an entity is a known tail of the row's head and relation."""
        # a head with many tails is likely to be in the batch more than once
        pairs, pair_of_row = np.unique(self.index.key(heads, relations), return_inverse=True)
        known = self.index.tails.gather(pairs)
        self._places[entities] = np.arange(len(entities))
        places = self._places[known.values]
        self._places[entities] = -1
        hits = places >= 0
        excluded = np.zeros((len(pairs), len(entities)), dtype=bool)
        excluded[known.rows[hits], places[hits]] = True
        return excluded[pair_of_row]

    def _unknown_tails(self, heads: np.ndarray, relations: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """(B, K) entities, each uniform over those that are no known tail of the row.

        Of the entities below the i-th known tail a_i, counted from 0, a_i - i are not known, so the n-th unknown one is
        n + the number of i with a_i - i <= n.
        """
        known = self.index.tails_of(heads, relations)
        size = self.index.num_entities
        lengths = np.bincount(known.rows, minlength=len(heads))
        starts = np.cumsum(lengths) - lengths
        below = known.values - (np.arange(len(known.values)) - starts[known.rows])
        numbers = random.integers(0, (size - lengths)[:, None], (len(heads), self.count))
        row_keys = (np.arange(len(heads)) * (size + 1))[:, None]
        places = np.searchsorted(known.rows * (size + 1) + below, row_keys + numbers, side="right")
        return numbers + places - starts[:, None]
