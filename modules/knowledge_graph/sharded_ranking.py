"""Ranks and best tails where entities are spread over processes: each scores its own rows for the queries of all."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding, pad

from modules.knowledge_graph.row_exchange import counts_of_all, from_all, rows_of_all
from modules.knowledge_graph.sharded_tables import ShardedEmbeddingTables
from modules.ranking import ranks_by_counting

SCORES = 1 << 25  # numbers of a process at a time, 128 MiB of float32


class _Queries(NamedTuple):
    """Queries of all processes.

    Args:
        heads: (Q, width) vectors.
        relations: (Q, width) vectors.
        own: those of this process.
    """

    heads: Tensor
    relations: Tensor
    own: slice


@torch.no_grad()
def sharded_ranks(tables: ShardedEmbeddingTables, batch: Any, ties: str) -> dict[str, Tensor]:
    """Filtered ranks of the targets of this process' queries, and those without tails that training links to the head.

    To be called by all processes together; they may have different numbers of queries.

    Args:
        tables: entities that are spread.
        batch: queries with ``heads``, ``relations``, ``tails`` (B,), ``known`` and ``linked`` (2, M) or None.
        ties: rule for equal scores.

    Returns:
        ``method`` and, with ``linked``, ``unlinked``, (B,) float64.
    """
    if (batch.tails < 0).any():
        raise ValueError("tails: -1 is no entity, expected the right answer of each query")
    queries, counts = _gathered(tables, batch)
    share, first = tables.share, queries.own.start
    held = share.end - share.start
    columns = rows_of_all(batch.tails, counts, share) - share.start
    columns = torch.where((columns >= 0) & (columns < held), columns, held)
    known = _held_pairs(batch.known, first, tables)
    linked = None if batch.linked is None else _held_pairs(batch.linked, first, tables)
    ranks: dict[str, list[Tensor]] = {"method": []} | ({} if linked is None else {"unlinked": []})
    for start, scores in _score_blocks(tables, queries):
        targets, own_known = columns[start : start + len(scores)], _of_rows(known, start, len(scores))
        ranks["method"].append(_ranks(scores, targets, own_known, ties))
        if linked is None:
            continue
        rows, places = _of_rows(linked, start, len(scores))
        scores[rows, places] = -torch.inf
        ranks["unlinked"].append(_ranks(scores, targets, own_known, ties))
    return {name: torch.cat(parts)[queries.own] for name, parts in ranks.items()}


@torch.no_grad()
def sharded_best(tables: ShardedEmbeddingTables, batch: Any, count: int) -> tuple[Tensor, Tensor]:
    """The best tails of this process' queries; to be called by all processes together.

    Args:
        tables: entities that are spread.
        batch: queries with ``heads`` and ``relations`` (B,).
        count: k, at most E.

    Returns:
        Scores (B, k), best first, and entities (B, k).
    """
    queries, _ = _gathered(tables, batch)
    scores_of, entities_of = [], []
    for _, scores in _score_blocks(tables, queries):
        held = scores.shape[1] - 1
        few = min(count, held)
        own = scores[:, :held].topk(few, dim=1)
        values = pad(own.values, (0, count - few), value=-torch.inf)
        entities = pad(own.indices + tables.share.start, (0, count - few))
        best = torch.cat(from_all(values, tables.share), dim=1).topk(count, dim=1)
        scores_of.append(best.values)
        entities_of.append(torch.cat(from_all(entities, tables.share), dim=1).gather(1, best.indices))
    return torch.cat(scores_of)[queries.own], torch.cat(entities_of)[queries.own]


def _gathered(tables: ShardedEmbeddingTables, batch: Any) -> tuple[_Queries, list[int]]:
    share = tables.share
    heads = tables.entity_vectors(batch.heads)
    counts = counts_of_all(len(heads), share, heads.device)
    first = sum(counts[: share.rank])
    relations = embedding(rows_of_all(batch.relations, counts, share), tables.relations)
    queries = _Queries(rows_of_all(heads, counts, share), relations, slice(first, first + len(heads)))
    return queries, counts


def _held_pairs(pairs: Tensor, first: int, tables: ShardedEmbeddingTables) -> Tensor:
    """Pairs (2, M) of query and entity from all processes, as far as the entity is held here."""
    share = tables.share
    own = torch.stack([pairs[0] + first, pairs[1]], dim=1)
    rows, entities = rows_of_all(own, counts_of_all(len(own), share, own.device), share).T
    held = (entities >= share.start) & (entities < share.end)
    return torch.stack([rows[held], entities[held] - share.start])


def _of_rows(pairs: Tensor, start: int, count: int) -> Tensor:
    """Pairs of some of the queries, numbered from the first of these."""
    inside = (pairs[0] >= start) & (pairs[0] < start + count)
    return torch.stack([pairs[0, inside] - start, pairs[1, inside]])


def _score_blocks(tables: ShardedEmbeddingTables, queries: _Queries) -> Iterator[tuple[int, Tensor]]:
    """First query and scores (q, held + 1) of some queries after others, as many on all processes.

    The last column is for targets that are held elsewhere.
    """
    size, scoring = max(1, SCORES // (tables.share.largest + 1)), tables.scoring
    block = scoring.table_block(queries.heads.device)
    for start in range(0, len(queries.heads), size):
        heads, relations = queries.heads[start : start + size], queries.relations[start : start + size]
        scores = heads.new_empty(len(heads), len(tables.entities) + 1)
        for first, part in zip(range(0, len(tables.entities), block), tables.entities.split(block), strict=True):
            with torch.autocast(heads.device.type, enabled=False):  # as EmbeddingTables.tail_distances
                distances = scoring.distances_to_tails(heads, relations, part)
            torch.neg(distances, out=scores[:, first : first + len(part)])
        yield start, scores


def _ranks(scores: Tensor, targets: Tensor, known: Tensor, ties: str) -> Tensor:
    """Ranks (q,) among the entities of all processes; the last column is overwritten.

    Args:
        scores: (q, held + 1).
        targets: (q,) columns, the last one for targets that are held elsewhere.
        known: (2, M) query and column of what is left out.
        ties: rule for equal scores.
    """
    held = scores.shape[1] - 1
    scores[:, held] = 0
    of_targets = scores.gather(1, targets[:, None])[:, 0]
    dist.all_reduce(of_targets)  # of the owner; the others have 0
    scores[:, held] = of_targets
    here = (targets < held).nonzero()[:, 0]
    left_out = torch.cat([known, torch.stack([here, torch.full_like(here, held)])], dim=1)
    before = ranks_by_counting(scores, targets, left_out, ties).double() - 1
    dist.all_reduce(before)
    return before + 1
