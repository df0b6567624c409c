"""Analogical objects of training triples: the heads, relations and pairs of both that fit the tail best (section 2)."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modules.knowledge_graph import EmbeddingTables, ScoringFunction
from modules.knowledge_graph.row_chunks import rows_per_chunk

PAIRS_AT_ONCE, TRIPLES_AT_ONCE = 256, 32
LARGE_PAIRS_AT_ONCE, LARGE_TRIPLES_AT_ONCE = 4096, 2048  # on a GPU


@dataclass(frozen=True)
class RetrievalSettings:
    """How many analogical objects are kept, and among how many pairs are looked for.

    Args:
        entities: N_e.
        relations: N_r.
        pairs: N_t.
        candidate_entities: m, of the best heads that pairs are made of.
        candidate_relations: n, of the best relations that pairs are made of.
        exclude_original: whether a triple's own head, relation and pair are left out.
    """

    entities: int = 1
    relations: int = 1
    pairs: int = 3
    candidate_entities: int = 1000
    candidate_relations: int = 40
    exclude_original: bool = False

    def __post_init__(self) -> None:
        for name in ("entities", "relations", "pairs", "candidate_entities", "candidate_relations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.pairs > self.candidate_entities * self.candidate_relations:
            raise ValueError(
                f"pairs is {self.pairs}, but {self.candidate_entities} candidate_entities and "
                f"{self.candidate_relations} candidate_relations make only "
                f"{self.candidate_entities * self.candidate_relations}"
            )

    def clipped(self, num_entities: int, num_relations: int) -> "RetrievalSettings":
        """The same for a graph that has fewer of them.

        Args:
            num_entities: E; a head is never the tail, so E - 1 heads at most.
            num_relations: 2R, reverses counted.
        """
        heads = num_entities - 1 - self.exclude_original
        relations = num_relations - self.exclude_original
        if heads < 1 or relations < 1:
            raise ValueError(f"a graph of {num_entities} entities has no analogical heads or relations")
        m, n = min(self.candidate_entities, heads), min(self.candidate_relations, relations)
        return RetrievalSettings(
            min(self.entities, heads),
            min(self.relations, relations),
            min(self.pairs, m * n),
            m,
            n,
            self.exclude_original,
        )


class Neighbours(NamedTuple):
    """Analogical objects of T triples, best first, each with the distance of the triple that it makes.

    Args:
        entities: (T, N_e) heads.
        entity_distances: (T, N_e).
        relations: (T, N_r).
        relation_distances: (T, N_r).
        pair_heads: (T, N_t).
        pair_relations: (T, N_t).
        pair_distances: (T, N_t).
    """

    entities: Tensor
    entity_distances: Tensor
    relations: Tensor
    relation_distances: Tensor
    pair_heads: Tensor
    pair_relations: Tensor
    pair_distances: Tensor

    def rows(self, index: Tensor) -> "Neighbours":
        """Those of some triples."""
        return Neighbours(*(part[index] for part in self))


def fingerprint(tables: EmbeddingTables, triples: Tensor, settings: RetrievalSettings) -> str:
    """Hash of all that the neighbours depend on: weights, score function, triples and settings."""
    digest = sha256(repr((tables.scoring.describe(), sorted(asdict(settings).items()))).encode())
    for tensor in (*tables.state_dict().values(), triples):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def retrieve(
    tables: EmbeddingTables,
    triples: Tensor,
    settings: RetrievalSettings,
    progress: Callable[[int], Any] | None = None,
) -> Neighbours:
    """Find the analogical objects of triples.

    Lists of heads depend on (relation, tail) alone and lists of relations on (head, tail), so each is made once per
    distinct pair. A head is never the tail itself; a triple's own head and relation stay unless they are excluded.

    Args:
        tables: frozen embeddings.
        triples: (T, 3) heads, relations, tails, on the device of the tables.
        settings: how many, already clipped to the graph.
        progress: called with the number of triples done since the last call.

    Returns:
        Neighbours, in the order of the triples.
    """
    relation_lists = _RelationLists(tables, triples, settings)
    groups, group_of = torch.unique(triples[:, 1:], dim=0, return_inverse=True)
    order = torch.argsort(group_of, stable=True)
    bounds = torch.searchsorted(group_of[order], torch.arange(len(groups) + 1, device=order.device))
    size = PAIRS_AT_ONCE if triples.device.type == "cpu" else LARGE_PAIRS_AT_ONCE
    found: list[Neighbours] = []
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        heads = _Heads(*_best_heads(tables, part, settings), bounds[start : start + len(part) + 1].tolist())
        found += _of_groups(tables, triples, order, heads, relation_lists, progress)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return Neighbours(*(torch.cat(parts)[inverse] for parts in zip(*found, strict=True)))


def _best_heads(tables: EmbeddingTables, groups: Tensor, settings: RetrievalSettings) -> tuple[Tensor, Tensor]:
    """The best heads (G, m) of (relation, tail) pairs (G, 2) and their distances."""
    relations, tails = tables.relations[groups[:, 0]], tables.entities[groups[:, 1]]
    blocks = tables.entities.split(tables.scoring.table_block(groups.device))
    distances = torch.cat([tables.scoring.distances_from_heads(block, relations, tails) for block in blocks], dim=1)
    distances.scatter_(1, groups[:, 1:], torch.inf)
    wanted = max(settings.candidate_entities, settings.entities) + settings.exclude_original
    best = distances.topk(min(wanted, distances.shape[1] - 1), dim=1, largest=False)
    return best.indices, best.values


class _RelationLists:
    """The best relations of each distinct (head, tail), found when they are first asked for in blocks of triples."""

    def __init__(self, tables: EmbeddingTables, triples: Tensor, settings: RetrievalSettings) -> None:
        self.settings = settings
        pairs, self.pair_of = torch.unique(triples[:, [0, 2]], dim=0, return_inverse=True)
        wanted = max(settings.candidate_relations, settings.relations) + settings.exclude_original
        kept = min(wanted, len(tables.relations))
        size = PAIRS_AT_ONCE if triples.device.type == "cpu" else LARGE_PAIRS_AT_ONCE
        best = [
            tables.scoring.distances_by_relations(
                tables.entities[part[:, 0]], tables.relations, tables.entities[part[:, 1]]
            ).topk(kept, dim=1, largest=False)
            for part in pairs.split(size)
        ]
        self.relations = torch.cat([part.indices for part in best]).to(torch.int32)
        self.distances = torch.cat([part.values for part in best])

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Relations (B, n) and their distances, of triples by row."""
        pairs = self.pair_of[rows]
        return self.relations[pairs].long(), self.distances[pairs]


class _Heads(NamedTuple):
    """The best heads (G, m) of some (relation, tail) pairs, and the bounds of each pair's triples in the order."""

    ids: Tensor
    distances: Tensor
    bounds: list[int]


def _of_groups(
    tables: EmbeddingTables,
    triples: Tensor,
    order: Tensor,
    heads: _Heads,
    relation_lists: _RelationLists,
    progress: Callable[[int], Any] | None,
) -> list[Neighbours]:
    """Neighbours of the triples of some (relation, tail) pairs, in their order.

    Triples of one pair have their candidate heads in common. Where there are so many of them that their relations would
    be more than there are relations at all, the distances of all relations are taken once.
    """
    found = []
    at_once = TRIPLES_AT_ONCE if triples.device.type == "cpu" else LARGE_TRIPLES_AT_ONCE
    many = len(tables.relations) // relation_lists.settings.candidate_relations
    sizes = [end - begin for begin, end in pairwise(heads.bounds)]
    for large, run in groupby(range(len(sizes)), key=lambda group: sizes[group] > many):
        groups = list(run)
        for part in ([group] for group in groups) if large else (groups,):
            rows = order[heads.bounds[part[0]] : heads.bounds[part[-1] + 1]]
            group_of = torch.repeat_interleave(
                torch.tensor(part, device=order.device),
                torch.tensor([sizes[group] for group in part], device=order.device),
            )
            table = _all_relations(tables, triples[rows[:1]], heads.ids[part]) if large else None
            # Where the table is there already, rows are only looked up: many of them at a time.
            size = at_once * 8 if large else at_once
            for some, group in zip(rows.split(size), group_of.split(size), strict=True):
                candidates = heads.ids[group], heads.distances[group]
                found.append(_of_triples(tables, triples[some], candidates, relation_lists, some, table))
                if progress is not None:
                    progress(len(some))
    return found


def _all_relations(tables: EmbeddingTables, triple: Tensor, heads: Tensor) -> Tensor:
    """Distances (2R, m) of one tail by every relation from candidate heads (1, m)."""
    blocks = tables.relations.split(rows_per_chunk(heads.numel() * tables.scoring.entity_width, heads.device))
    own, tail = tables.entities[heads], tables.entities[triple[:, 2]]
    return torch.cat([tables.scoring.distances_of_pairs(own, block[None], tail)[0] for block in blocks])


def _of_triples(
    tables: EmbeddingTables,
    triples: Tensor,
    candidates: tuple[Tensor, Tensor],
    relation_lists: _RelationLists,
    rows: Tensor,
    table: Tensor | None,
) -> Neighbours:
    """Neighbours of triples from their candidate heads; the table holds distances of these by all relations."""
    settings = relation_lists.settings
    heads, head_distances = candidates
    places = torch.arange(heads.shape[1], device=heads.device).expand_as(heads)
    relations, relation_distances = relation_lists.of(rows)
    if settings.exclude_original:
        places, heads, head_distances = _without(triples[:, :1], heads, places, heads, head_distances)
        relations, relation_distances = _without(triples[:, 1:2], relations, relations, relation_distances)
    m, n = settings.candidate_entities, settings.candidate_relations
    if table is None:
        pairs = pair_distances(
            tables.scoring, tables.entities, tables.relations, heads[:, :m], relations[:, :n], triples
        )
    else:
        pairs = table[relations[:, :n].unsqueeze(2), places[:, None, :m]]
    best = pairs.flatten(1).topk(settings.pairs, dim=1, largest=False)
    chosen_relation, chosen_head = best.indices // m, best.indices % m
    return Neighbours(
        heads[:, : settings.entities],
        head_distances[:, : settings.entities],
        relations[:, : settings.relations],
        relation_distances[:, : settings.relations],
        heads.gather(1, chosen_head),
        relations.gather(1, chosen_relation),
        best.values,
    )


def _without(own: Tensor, candidates: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Leave the place of the own one out of each row; where it is not among the candidates, the worst goes."""
    order = torch.argsort(candidates == own, dim=1, stable=True)[:, :-1]
    return tuple(other.gather(1, order) for other in others)


def pair_distances(
    scoring: ScoringFunction, entities: Tensor, relations: Tensor, heads: Tensor, kinds: Tensor, triples: Tensor
) -> Tensor:
    """Distances of all pairs of candidate heads and relations from the tails of triples.

    Args:
        scoring: score function.
        entities: table.
        relations: table.
        heads: (B, m) ids.
        kinds: (B, n) ids of relations.
        triples: (B, 3).

    Returns:
        (B, n, m).
    """
    size = rows_per_chunk(heads.shape[1] * kinds.shape[1] * scoring.entity_width, heads.device)
    parts: Iterator[tuple[Tensor, Tensor, Tensor]] = zip(
        heads.split(size), kinds.split(size), triples[:, 2].split(size), strict=True
    )
    return torch.cat(
        [
            scoring.distances_of_pairs(entities[part_heads], relations[part_kinds], entities[tails])
            for part_heads, part_kinds, tails in parts
        ]
    )
