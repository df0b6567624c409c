"""What models of knowledge graphs share: queries are ranked, counted in metrics, and completed with the best tails."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from modules.ranking import FilteredRanking, ranks_by_counting

SIDES = ("tail", "head")
CATEGORIES = ("1-1", "1-N", "N-1", "N-N")
SIDES_OF_CATEGORIES = tuple(f"{side}/{category}" for side in SIDES for category in CATEGORIES)
HITS = (1, 3, 10)
SHOWN = ("mrr", *(f"hits@{k}" for k in HITS))


COARSE = ("16-true", "bf16-true")


class LinkPredictor(LightningModule, ABC):
    """Ranks the tails of queries (head, relation, ?), filtered, with controls beside the method.

    Queries for heads are queries for tails of reversed relations, so (?, r, t) is (t, r + R, ?).

    Metrics: ``<stage>/mrr``, ``/hits@1``, ``/hits@3``, ``/hits@10``, ``/mean_rank``, ``/count``, those of the sides
    (``<stage>/tail/mrr``) and of kinds of relations (``<stage>/N-1/mrr``), in tests also of both
    (``test/head/N-1/mrr``), and those of each control (``<stage>/unlinked/mrr``), without those that the batches cannot
    tell. ``val/main`` is the filtered MRR.

    Args:
        num_entities: E.
        num_relations: R, without reverses.
        controls: names of further rankings that :meth:`rankings` returns.
        ties: rank of a target among candidates of equal score: realistic (the mean), optimistic or pessimistic.
        top_k: how many tails ``predict`` gives.
    """

    def __init__(self, num_entities: int, num_relations: int, controls: tuple[str, ...], ties: str, top_k: int) -> None:
        super().__init__()
        if num_entities < 1 or num_relations < 1:
            raise ValueError(
                f"num_entities is {num_entities} and num_relations {num_relations}, expected 1 or more of each"
            )
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, expected 1 or more")
        self.ties, self.top_k, self.controls = ties, min(top_k, num_entities), controls
        self.val_rankings = self._new_rankings()
        self.test_rankings = self._new_rankings(more_groups=SIDES_OF_CATEGORIES)

    def setup(self, stage: str) -> None:
        """See :func:`check_precision`."""
        check_precision(self.trainer.precision)

    def _new_rankings(
        self, copies: Mapping[str, int] | None = None, more_groups: tuple[str, ...] = ()
    ) -> nn.ModuleDict:
        copies = copies or {}
        groups = {"method": (*SIDES, *CATEGORIES, *more_groups)} | dict.fromkeys(self.controls, ())
        return nn.ModuleDict(
            {name: FilteredRanking(HITS, self.ties, group, copies.get(name)) for name, group in groups.items()}
        )

    @abstractmethod
    def candidate_scores(self, batch: Any) -> Tensor:
        """Scores (B, E) of all entities as tails of the queries, higher is better."""

    @abstractmethod
    def rankings(self, batch: Any) -> dict[str, Tensor]:
        """Ranks (B,) of the targets by name: ``method``, and each of the controls; (G, B) where ways are tried out.

        A control that the batch does not tell enough for is left out.
        """

    def pick(self, name: str, values: Tensor) -> Tensor:
        """The one way that counts, of values (G, ...) that were found in G ways; others are returned as they are."""
        return values

    def filtered_ranks(self, scores: Tensor, batch: Any) -> Tensor:
        """Rank (B,) of each target in scores (B, E), other true tails left out."""
        return ranks_by_counting(scores, batch.tails, batch.known, ties=self.ties)

    def unlinked_ranks(self, scores: Tensor, batch: Any) -> dict[str, Tensor]:
        """``unlinked``: the same where all tails that training links to the head come last, the target too if linked.

        Nothing where the batch does not say which these are.
        """
        if batch.linked is None:
            return {}
        rows, columns = batch.linked
        scores = scores.clone()
        scores[rows, columns] = -torch.inf
        return {"unlinked": self.filtered_ranks(scores, batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Rank the targets of a batch.

        Returns:
            ``index`` and ``relations`` (B,) of the queries, and ``rank_<name>`` (B,) of each ranking, or (B, G) where G
            ways are tried out, of which :meth:`pick` knows the one that counts once the epoch is over.
        """
        return self._evaluation_step(batch, self.val_rankings)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Rank the targets of a batch; see :meth:`validation_step`."""
        return self._evaluation_step(batch, self.test_rankings)

    def _evaluation_step(self, batch: Any, metrics: nn.ModuleDict) -> dict[str, Tensor]:
        ranks = self.rankings(batch)
        for name, metric in metrics.items():  # a control that is left out counts no query
            groups = self._groups(batch)[:, : len(metric.groups)] if name == "method" else None
            metric.update_ranks(ranks.get(name, ranks["method"].new_empty(0)), groups)
        return {"index": batch.index, "relations": batch.relations} | {
            f"rank_{name}": values.movedim(-1, 0) for name, values in ranks.items()
        }

    def _groups(self, batch: Any) -> Tensor:
        """(B, groups) whether a query is of each side, of each kind of relation, and of each pair of both."""
        side = torch.nn.functional.one_hot((batch.relations >= self.hparams.num_relations).long(), len(SIDES))
        category = torch.nn.functional.one_hot(batch.category, len(CATEGORIES))
        both = side[:, :, None] * category[:, None]
        return torch.cat([side, category, both.flatten(1)], dim=1).bool()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of validation."""
        scores = self._log_rankings("val", self.val_rankings)
        self.log("val/main", scores["mrr"], sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test."""
        self._log_rankings("test", self.test_rankings)

    def _log_rankings(self, stage: str, metrics: nn.ModuleDict) -> Mapping[str, Tensor]:
        scores = {name: metric.compute() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        self.on_scores(stage, scores)
        scores = {
            name: {key: self.pick(name, value) for key, value in values.items()} for name, values in scores.items()
        }
        for name, values in scores.items():
            if name != "method" and not values["count"]:
                continue
            prefix = stage if name == "method" else f"{stage}/{name}"
            wanted = values if name == "method" else {key: values[key] for key in SHOWN}
            for key, value in wanted.items():
                group, _, kind = key.rpartition("/")
                if not group or kind == "count" or values[f"{group}/count"]:  # without queries the others are NaN
                    # They are those of all ranks already; the mean of equal numbers keeps Lightning from warning.
                    self.log(
                        f"{prefix}/{key}", value.float(), prog_bar=key == "mrr" and prefix == stage, sync_dist=True
                    )
        return scores["method"]

    def mean_over_ranks(self, weight: Tensor) -> Tensor:
        """DDP averages gradients: a sum over a batch divided by this mean is part of the loss of the whole batch."""
        if self._trainer is None or self.trainer.world_size == 1:
            return weight
        return self.trainer.strategy.reduce(weight.clone(), reduce_op="mean")

    def on_scores(self, stage: str, scores: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Called with the scores of each ranking before they are logged, the same on all ranks."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """The best tails of each query.

        Returns:
            ``index`` (B,), ``entities`` (B, k) best first, their ``scores`` (B, k), and ``known`` (B, k), true where
            the triple is in the data.
        """
        scores, entities = self.best_tails(batch)
        rows = torch.arange(len(entities), device=entities.device)
        answered = batch.tails >= 0  # the right answer of a query is not among the known ones
        pairs = torch.cat([batch.known, torch.stack([rows, batch.tails])[:, answered]], dim=1)
        size = self.hparams.num_entities
        known = torch.isin(rows[:, None] * size + entities, pairs[0] * size + pairs[1])
        return {"index": batch.index, "entities": entities, "scores": scores, "known": known}

    def best_tails(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Scores (B, k) and entities (B, k) of the best tails of the queries, best first."""
        best = self.candidate_scores(batch).topk(self.top_k, dim=1)
        return best.values, best.indices


def check_precision(precision: Any) -> None:
    """Refuse weights of 16 bits, whose scores of thousands of candidates are mostly ties.

    Args:
        precision: of the trainer.

    Raises:
        ValueError: If it is one of these.
    """
    if precision in COARSE:
        raise ValueError(
            f"precision {precision}: embeddings of 16 bits give many candidates the same score; set "
            f"trainer.precision to {precision.replace('true', 'mixed')}, 32-true or 64-true"
        )
