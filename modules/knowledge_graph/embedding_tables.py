"""The vectors of a knowledge graph, and the function that scores triples of them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from modules.knowledge_graph.scoring import ScoringFunction


class EmbeddingTables(nn.Module):
    """A vector for each entity and each relation with its reverse, and the function that scores triples of them.

    Args:
        scoring: the function.
        num_entities: E.
        num_relations: R, without reverses; the reverse of relation r is r + R.
    """

    def __init__(self, scoring: ScoringFunction, num_entities: int, num_relations: int) -> None:
        super().__init__()
        self.scoring = scoring
        self.entities = nn.Parameter(torch.empty(num_entities, scoring.entity_width))
        self.relations = nn.Parameter(torch.empty(2 * num_relations, scoring.relation_width))
        scoring.initialize(self.entities.data, self.relations.data)

    def look_up(self, heads: Tensor, relations: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Vectors of heads, of relations, and of further entities, each (..., width).

        Entities are looked up together, so that their table gets one gradient.
        """
        ids = (heads, *others)
        flat = self.entity_vectors(torch.cat([part.flatten() for part in ids]))
        parts = flat.split([part.numel() for part in ids])
        head, *rest = (part.view(*places.shape, flat.shape[1]) for part, places in zip(parts, ids, strict=True))
        return head, embedding(relations, self.relations), *rest

    def entity_vectors(self, ids: Tensor) -> Tensor:
        """Vectors (N, width) of entities (N,)."""
        return embedding(ids, self.entities)

    @torch.no_grad()
    def tail_distances(self, heads: Tensor, relations: Tensor) -> Tensor:
        """Distances (B, E) of all entities as tails, from vectors (B, width) of heads and relations.

        Not in lower precision, which would give many of them the same.
        """
        blocks = self.entities.split(self.scoring.table_block(heads.device))
        with torch.autocast(heads.device.type, enabled=False):
            return torch.cat([self.scoring.distances_to_tails(heads, relations, block) for block in blocks], dim=1)

    def named_vectors(self) -> Iterator[tuple[str, Tensor]]:
        """Both tables, as a user of the embeddings knows them."""
        yield "entities", self.entities.detach()
        yield "relations", self.relations.detach()
