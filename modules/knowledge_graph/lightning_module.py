"""Embeddings of a knowledge graph as a LightningModule, trained to score its triples above corrupted ones."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.optim.lr_scheduler import MultiStepLR

from modules.knowledge_graph.link_predictor import LinkPredictor
from modules.knowledge_graph.losses import self_adversarial_loss
from modules.knowledge_graph.scoring import ScoringFunction, build_scoring

LR_DECAY = 0.1


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
        flat = embedding(torch.cat([part.flatten() for part in ids]), self.entities)
        parts = flat.split([part.numel() for part in ids])
        head, *rest = (part.view(*places.shape, -1) for part, places in zip(parts, ids, strict=True))
        return head, embedding(relations, self.relations), *rest

    @torch.no_grad()
    def tail_distances(self, heads: Tensor, relations: Tensor) -> Tensor:
        """Distances (B, E) of all entities as tails, from vectors (B, width) of heads and relations."""
        blocks = self.entities.split(self.scoring.table_block(heads.device))
        return torch.cat([self.scoring.distances_to_tails(heads, relations, block) for block in blocks], dim=1)

    def named_vectors(self) -> Iterator[tuple[str, Tensor]]:
        """Both tables, as a user of the embeddings knows them."""
        yield "entities", self.entities.detach()
        yield "relations", self.relations.detach()


class KnowledgeGraphEmbedding(LinkPredictor):
    """TransE, RotatE, HAKE, PairRE, DistMult or ComplEx with the self-adversarial loss.

    Batches for training have ``heads``, ``relations``, ``tails`` (B,), ``negatives`` that are shared by all (K,), by
    groups of rows (C, K) or by none (B, K), ``excluded`` (B, K) and ``weights`` (B,). See
    :class:`modules.knowledge_graph.link_predictor.LinkPredictor` for evaluation; its control ``unlinked`` leaves out
    all tails that training links to the head.

    Args:
        scoring: score function, or what its ``describe`` returned.
        num_entities: E.
        num_relations: R, without reverses.
        graph_hash: of the names of entities and relations; another model on these embeddings compares it.
        adversarial_temperature: tau of the weights of negatives.
        lr: of Adam.
        lr_milestones: epochs after which the rate is multiplied by 0.1; None for half the epochs of the run.
        ties: see the base class.
        top_k: tails that ``predict`` gives for a query.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        scoring: ScoringFunction | dict[str, Any],
        num_entities: int = 0,
        num_relations: int = 0,
        graph_hash: str | None = None,
        adversarial_temperature: float = 1.0,
        lr: float = 5e-4,
        lr_milestones: list[int] | None = None,
        ties: Literal["realistic", "optimistic", "pessimistic"] = "realistic",
        top_k: int = 10,
    ) -> None:
        super().__init__(num_entities, num_relations, ("unlinked",), ties, top_k)
        scoring = build_scoring(scoring)
        self.save_hyperparameters(ignore=["scoring"])
        self.hparams["scoring"] = scoring.describe()
        if adversarial_temperature < 0:
            raise ValueError(f"adversarial_temperature is {adversarial_temperature}, expected 0 or more")
        if lr <= 0:
            raise ValueError(f"lr is {lr}, expected above 0")
        self.tables = EmbeddingTables(scoring, num_entities, num_relations)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch of triples and their corruptions."""
        scoring = self.tables.scoring
        heads, relations, tails, negatives = self.tables.look_up(
            batch.heads, batch.relations, batch.tails, batch.negatives
        )
        positive = scoring.margin - scoring.distance(heads, relations, tails)
        negative = scoring.margin - corrupted_distances(scoring, heads, relations, negatives)
        loss = self_adversarial_loss(
            positive,
            negative,
            self.hparams.adversarial_temperature,
            batch.excluded,
            batch.weights,
            self._mean_over_ranks(batch.weights.sum()),
        )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(positive))
        return loss

    def _mean_over_ranks(self, weight: Tensor) -> Tensor:
        """DDP averages gradients: with the mean of all ranks' sums of weights, that is the loss of the whole batch."""
        if self._trainer is None or self.trainer.world_size == 1:
            return weight
        return self.trainer.strategy.reduce(weight.clone(), reduce_op="mean")

    @torch.no_grad()
    def candidate_scores(self, batch: Any) -> Tensor:
        """See the base class."""
        heads, relations = self.tables.look_up(batch.heads, batch.relations)
        return self.tables.tail_distances(heads, relations).neg_()

    def rankings(self, batch: Any) -> dict[str, Tensor]:
        """See the base class."""
        scores = self.candidate_scores(batch)
        return {"method": self.filtered_ranks(scores, batch), "unlinked": self.unlinked_ranks(scores, batch)}

    def embedding_tables(self) -> dict[str, Tensor]:
        """The vectors of entities (E, width) and relations (2R, width), for export."""
        return dict(self.tables.named_vectors())

    def configure_optimizers(self) -> Any:
        """Adam, and a tenth of the rate after each milestone."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr, fused=True)
        milestones = self.hparams.lr_milestones
        if milestones is None:
            epochs = self.trainer.max_epochs or 0
            milestones = [epochs // 2] if epochs > 1 else []
        return [optimizer], [MultiStepLR(optimizer, milestones, LR_DECAY)]


def corrupted_distances(scoring: ScoringFunction, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
    """Distances (B, K) of triples with other tails.

    Args:
        scoring: score function.
        heads: (B, entity_width).
        relations: (B, relation_width).
        tails: (K, entity_width) for all rows, (C, K, entity_width) for C groups of rows (as many in each, the last one
            shorter), or (B, K, entity_width) for each row.
    """
    if tails.ndim == 2:
        return scoring.distances_to_tails(heads, relations, tails)
    if len(tails) == len(heads):
        return scoring.distance(heads.unsqueeze(1), relations.unsqueeze(1), tails)
    size = -(-len(heads) // len(tails))
    groups = zip(heads.split(size), relations.split(size), tails, strict=True)
    return torch.cat([scoring.distances_to_tails(*group) for group in groups])
