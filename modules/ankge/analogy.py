"""Analogy functions: embeddings of similar heads, relations and pairs, made from those of a triple (section 3)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, embedding, logsigmoid

from modules.ankge.retriever import Neighbours
from modules.knowledge_graph import EmbeddingTables

LEVELS = ("entity", "relation", "triple")
Level = Literal["entity", "relation", "triple"]
Similarity = Literal["norm", "cos", "cos_official"]


class AnalogyFunctions(nn.Module):
    """``h_a = h V_h + transfer (r V_r) M`` and ``r_a = r V_r``, products coordinate by coordinate.

    Args:
        num_entities: E.
        num_relations: 2R, reverses counted.
        entity_width: D_e.
        relation_width: D_r.
        transfer: lambda_trans, share of the relation in an entity's analogy.
    """

    def __init__(
        self, num_entities: int, num_relations: int, entity_width: int, relation_width: int, transfer: float = 1.0
    ) -> None:
        super().__init__()
        self.transfer = transfer
        self.entities = nn.Parameter(torch.empty(num_entities, entity_width).normal_(1.0, 0.1))
        self.relations = nn.Parameter(torch.empty(num_relations, relation_width).normal_(1.0, 0.1))
        self.projection = nn.Parameter(torch.empty(relation_width, entity_width).normal_(0.0, 0.1))

    def forward(
        self, heads: Tensor, relations: Tensor, head_vectors: Tensor, relation_vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Analogies (B, D_e) of heads and (B, D_r) of relations, from their ids (B,) and their vectors."""
        analogous_relations = relation_vectors * embedding(relations, self.relations)
        analogous_heads = head_vectors * embedding(heads, self.entities)
        # Without a share of the relation the projection keeps a gradient, of 0, as DDP expects.
        analogous_heads = analogous_heads + self.transfer * (analogous_relations @ self.projection)
        return analogous_heads, analogous_relations

    def cubes(self) -> Tensor:
        """Sum of the cubes of the sizes of all parameters."""
        return sum(parameter.abs().pow(3).sum() for parameter in self.parameters())


class Targets(NamedTuple):
    """What the analogies of a batch should become, without gradient.

    Args:
        head: h+ (B, D_e), of the best heads.
        relation: r+ (B, D_r), of the best relations.
        pair_head: h++ (B, D_e), of the best pairs.
        pair_relation: r++ (B, D_r), of the best pairs.
    """

    head: Tensor
    relation: Tensor
    pair_head: Tensor
    pair_relation: Tensor


@torch.no_grad()
def aggregate(tables: EmbeddingTables, neighbours: Neighbours) -> Targets:
    """Means of the vectors of analogical objects, weighted by the softmax of their negative distances."""

    def mean(table: Tensor, ids: Tensor, distances: Tensor) -> Tensor:
        if ids.shape[1] == 1:
            return embedding(ids[:, 0], table)
        return (torch.softmax(-distances, dim=1).unsqueeze(-1) * embedding(ids, table)).sum(1)

    entities, relations = tables.entities, tables.relations
    return Targets(
        mean(entities, neighbours.entities, neighbours.entity_distances),
        mean(relations, neighbours.relations, neighbours.relation_distances),
        mean(entities, neighbours.pair_heads, neighbours.pair_distances),
        mean(relations, neighbours.pair_relations, neighbours.pair_distances),
    )


def level_losses(
    distances: Tensor,
    analogies: tuple[Tensor, Tensor, Tensor],
    targets: tuple[Tensor, Tensor, Tensor],
    strength: float,
    similarity: Similarity,
) -> Tensor:
    """``-log sigmoid(-alpha |a - target|_2 - d)`` of each triple at each level.

    Args:
        distances: (B, 3) of the triples with their analogies, by level.
        analogies: of heads, of relations, and composed ones of pairs, each (B, D).
        targets: in the same order.
        strength: alpha.
        similarity: ``norm``; ``cos`` for ``-log sigmoid(alpha cos - d)``; ``cos_official`` has the sign of d turned.

    Returns:
        (B, 3).
    """
    pairs = zip(analogies, targets, strict=True)
    if similarity == "norm":
        apart = torch.stack([torch.linalg.vector_norm(own - target, dim=-1) for own, target in pairs], dim=1)
        return -logsigmoid(-strength * apart - distances)
    alike = torch.stack([cosine_similarity(own, target, dim=-1) for own, target in pairs], dim=1)
    sign = 1 if similarity == "cos_official" else -1
    return -logsigmoid(strength * alike + sign * distances)


def level_shares(distances: Tensor, base: Tensor | None, one_hot: bool = False) -> Tensor:
    """beta: how much each level counts, the better its analogical objects fit.

    Args:
        distances: (B, 3) of the triples with the targets in place, by level.
        base: (B,) of the triples themselves, which take share away from all levels; None for none.
        one_hot: all to the best instead of a softmax.

    Returns:
        (B, 3).
    """
    entries = distances if base is None else torch.cat([distances, base.unsqueeze(1)], dim=1)
    if one_hot:
        shares = torch.nn.functional.one_hot(entries.argmin(1), entries.shape[1]).to(entries)
    else:
        shares = torch.softmax(-entries, dim=1)
    return shares[:, : len(LEVELS)]
