"""Embeddings of a knowledge graph as a LightningModule, trained to score its triples above corrupted ones."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from modules.knowledge_graph.embedding_tables import EmbeddingTables
from modules.knowledge_graph.link_predictor import LinkPredictor
from modules.knowledge_graph.losses import self_adversarial_loss
from modules.knowledge_graph.row_exchange import RowShare, collect_rows
from modules.knowledge_graph.scoring import ScoringFunction, build_scoring
from modules.knowledge_graph.sharded_ranking import sharded_best, sharded_ranks
from modules.knowledge_graph.sharded_tables import ShardedEmbeddingTables

LR_DECAY = 0.1
SPREAD = "tables.entities"


class KnowledgeGraphEmbedding(LinkPredictor):
    """TransE, RotatE, HAKE, PairRE, DistMult or ComplEx with the self-adversarial loss.

    Batches for training have ``heads``, ``relations``, ``tails`` (B,), ``negatives`` that are shared by all (K,), by
    groups of rows (C, K) or by none (B, K), ``excluded`` (B, K) and ``weights`` (B,). See
    :class:`modules.knowledge_graph.link_predictor.LinkPredictor` for evaluation; its control ``unlinked`` leaves out
    all tails that training links to the head, where the batches say which these are.

    Args:
        scoring: score function, or what its ``describe`` returned.
        num_entities: E.
        num_relations: R, without reverses.
        graph_hash: of the names of entities and relations; another model on these embeddings compares it.
        train_hash: of the training triples, likewise.
        adversarial_temperature: tau of the weights of negatives.
        lr: of Adam.
        lr_milestones: epochs after which the rate is multiplied by 0.1; None for half the epochs of the run.
        ties: see the base class.
        top_k: tails that ``predict`` gives for a query.
        sharded: spread the rows of the entity table, with their gradients and moments, over the processes of strategy
            ``ddp``, for a table that one device cannot hold. Training and metrics are those of a replicated table.
            Checkpoints are as well, so a run can go on with another number of processes: the table and its moments are
            brought together in the memory of the first process' machine to be saved, and read by each to be loaded.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        scoring: ScoringFunction | dict[str, Any],
        num_entities: int = 0,
        num_relations: int = 0,
        graph_hash: str | None = None,
        train_hash: str | None = None,
        adversarial_temperature: float = 1.0,
        lr: float = 5e-4,
        lr_milestones: list[int] | None = None,
        ties: Literal["realistic", "optimistic", "pessimistic"] = "realistic",
        top_k: int = 10,
        sharded: bool = False,
    ) -> None:
        super().__init__(num_entities, num_relations, ("unlinked",), ties, top_k)
        scoring = build_scoring(scoring)
        self.save_hyperparameters(ignore=["scoring"])
        self.hparams["scoring"] = scoring.describe()
        if adversarial_temperature < 0:
            raise ValueError(f"adversarial_temperature is {adversarial_temperature}, expected 0 or more")
        if lr <= 0:
            raise ValueError(f"lr is {lr}, expected above 0")
        kind = ShardedEmbeddingTables if sharded else EmbeddingTables
        self.tables = kind(scoring, num_entities, num_relations)

    def configure_model(self) -> None:
        """Give this process its rows of a sharded table.

        Raises:
            ValueError: If the strategy, precision or averaging of weights is not for sharded tables, or there are fewer
                entities than processes.
        """
        if not isinstance(self.tables, ShardedEmbeddingTables):
            return
        trainer, entities = self._trainer, self.hparams.num_entities
        share = RowShare(entities) if trainer is None else RowShare(entities, trainer.global_rank, trainer.world_size)
        if share.world_size > 1:
            _check_can_shard(trainer)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, [SPREAD])
        elif self.tables.share is None:
            rank_zero_info("sharded: there is one process, which holds the whole entity table")
        self.tables.spread(share)

    @property
    def _is_spread(self) -> bool:
        return isinstance(self.tables, ShardedEmbeddingTables) and self.tables.is_spread

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch of triples and their corruptions.

        Raises:
            ValueError: If there are none.
        """
        if not batch.negatives.numel():
            raise ValueError("the training batches have no negatives to learn from; set --data.objective links")
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
            self.mean_over_ranks(batch.weights.sum()),
        )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(positive))
        return loss

    @torch.no_grad()
    def candidate_scores(self, batch: Any) -> Tensor:
        """See the base class."""
        heads, relations = self.tables.look_up(batch.heads, batch.relations)
        return self.tables.tail_distances(heads, relations).neg_()

    def rankings(self, batch: Any) -> dict[str, Tensor]:
        """See the base class."""
        if self._is_spread:
            return sharded_ranks(self.tables, batch, self.ties)
        scores = self.candidate_scores(batch)
        return {"method": self.filtered_ranks(scores, batch), **self.unlinked_ranks(scores, batch)}

    def best_tails(self, batch: Any) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return sharded_best(self.tables, batch, self.top_k) if self._is_spread else super().best_tails(batch)

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

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all processes, whose entities are different ones."""
        if not (self._is_spread and gradient_clip_val and gradient_clip_algorithm in (None, "norm")):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
        squares = {value: value.grad.square().sum() for value in parameters}
        spread = squares[self.tables.entities]
        total = sum(squares.values()) - spread + self.trainer.strategy.reduce(spread.clone(), reduce_op="sum")
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, total.sqrt())

    # ---- checkpoints of spread entities, which are those of a whole table

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring spread rows and their moments together, in the file of the first process."""
        if self._is_spread:
            for values, key in self._spread_values(checkpoint):
                whole = collect_rows(values[key], self.tables.share)
                if whole is not None:
                    values[key] = whole

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rows of this process.

        Raises:
            ValueError: If the checkpoint is of another number of entities.
        """
        if not self._is_spread:
            return
        share = self.tables.share
        for values, key in self._spread_values(checkpoint):
            if len(values[key]) != share.num_rows:
                raise ValueError(f"the checkpoint has {len(values[key])} entities, but the model {share.num_rows}")
            values[key] = values[key][share.start : share.end].clone()

    def _spread_values(self, checkpoint: dict[str, Any]) -> Iterator[tuple[dict[Any, Any], Any]]:
        """Where a checkpoint has a row for each entity: dictionaries that may be written to, and keys."""
        yield checkpoint["state_dict"], SPREAD
        place = [name for name, _ in self.named_parameters()].index(SPREAD)
        for optimizer in checkpoint.get("optimizer_states", ()):
            states = optimizer["state"]
            if place in states:
                states[place] = dict(states[place])  # it may be the optimizer's own
                moments = [key for key, value in states[place].items() if isinstance(value, Tensor) and value.ndim == 2]
                yield from ((states[place], key) for key in moments)


def _check_can_shard(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or strategy._start_method != "popen":
        name = getattr(strategy, "_start_method", None)
        kind = f"{type(strategy).__name__}" + (f" started by {name}" if name else "")
        raise ValueError(
            f"sharded: the strategy is {kind}, which cannot spread the entity table over "
            f"{trainer.world_size} processes; set trainer.strategy to ddp, or sharded to false"
        )
    if trainer.precision == "16-mixed":
        raise ValueError(
            "sharded: with precision 16-mixed each process would scale gradients by itself; set trainer.precision to "
            "bf16-mixed or 32"
        )
    averaging = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    if averaging:
        raise ValueError(
            f"sharded: {averaging[0]} would average the rows of one process alone, and save these for the whole table; "
            "leave the callback out, or set sharded to false"
        )


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
