"""What a link predictor finds and misses: ranks as a histogram, scores of each relation, and triples that gained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.classification_report import is_due
from callbacks.media import Media
from callbacks.step_outputs import StepOutputs
from modules.ranking import RANK_BINS

METHOD, BEFORE = "rank_method", "rank_base"
EXPLANATION = ("analogous_entity", "analogous_relation", "analogous_pair")


class RankReport(Callback):
    """Shows where the targets of queries stand after validation and test.

    ``<stage>/ranks`` (bars: 1, 2, 3-4, 5-8, ...), ``<stage>/relations`` (table: queries, MRR and hits@10 of each
    relation and side) and, where the module also gives the ranks of a base model, ``<stage>/improved``: the triples
    whose rank rose most, before and after, with the analogical objects that the module names for them.

    The steps of the module return ``index`` and ``relations`` (B,), ``rank_method`` (B,) and possibly ``rank_base``, or
    (B, G) ranks of G ways that were tried out, of which ``pick(name, ranks)`` of the module takes (G, n) and returns
    those (n,) of the way that it chose; ``explain(heads, relations, tails)`` may return ids by name. The datamodule has
    ``queries(stage).triples`` (n, 3), ``entity_names`` and ``relation_names``.

    Args:
        every_n_epochs: report after validation in every n-th epoch and in the last one; tests are always reported.
        rows: triples in the table of improved ones.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(self, every_n_epochs: int = 1, rows: int = 20) -> None:
        if every_n_epochs < 1 or rows < 1:
            raise ValueError(f"RankReport: every_n_epochs is {every_n_epochs} and rows {rows}, expected 1 or more")
        self.every_n_epochs, self.rows = every_n_epochs, rows
        self._outputs = StepOutputs()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self._outputs.clear()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self._outputs.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Take the ranks of a batch."""
        self._take(outputs)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Take the ranks of a batch."""
        self._take(outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, if it is time: here, as the module makes its choices at the end of the epoch, after callbacks."""
        if not trainer.sanity_checking and is_due(trainer, self.every_n_epochs):
            self._report(trainer, pl_module, "val")
        self._outputs.clear()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self._report(trainer, pl_module, "test")
        self._outputs.clear()

    def _take(self, outputs: Any) -> None:
        if isinstance(outputs, dict) and METHOD in outputs:
            wanted = ("index", "relations", METHOD, BEFORE)
            self._outputs.add({key: outputs[key] for key in wanted if key in outputs})

    def _report(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        gathered = self._outputs.gather()
        media = Media(trainer)
        if not gathered or not media.active:
            return
        for key in (METHOD, BEFORE):
            if key in gathered and gathered[key].ndim > 1:
                gathered[key] = module.pick(key.removeprefix("rank_"), gathered[key].T)
        counts = rank_histogram(gathered[METHOD].numpy())
        media.bar(f"{stage}/ranks", list(RANK_BINS[: len(counts)]), counts, title="Ranks of the targets")
        names = trainer.datamodule.relation_names
        columns, rows = relation_table({key: value.numpy() for key, value in gathered.items()}, names)
        media.table(f"{stage}/relations", columns, rows)
        if BEFORE in gathered:
            self._report_improved(media, trainer, module, stage, gathered)

    def _report_improved(
        self, media: Media, trainer: Trainer, module: LightningModule, stage: str, rows: dict[str, torch.Tensor]
    ) -> None:
        gain = 1 / rows[METHOD] - 1 / rows[BEFORE]
        best = gain.topk(min(self.rows, len(gain)))
        best = best.indices[best.values > 0]
        if not len(best):
            return
        queries = torch.as_tensor(trainer.datamodule.queries(stage).triples[rows["index"][best].numpy()])
        entities, relations = trainer.datamodule.entity_names, trainer.datamodule.relation_names
        explained = explain(module, queries, entities, relations)
        told = []
        for place, (head, relation, tail) in zip(best.tolist(), queries.tolist(), strict=True):
            before, after = rows[BEFORE][place].item(), rows[METHOD][place].item()
            why = explained[len(told)] if explained else ()
            told.append([entities[head], relation_name(relation, relations), entities[tail], before, after, *why])
        columns = ["head", "relation", "tail", "rank before", "rank after", *(EXPLANATION if explained else ())]
        media.table(f"{stage}/improved", columns, told)


def rank_histogram(ranks: np.ndarray) -> list[int]:
    """How many ranks (n,) are in each of ``RANK_BINS``, up to the last one that has some.

    A half counts as the next whole rank, one beyond the last bin as in it.
    """
    # In single precision the logarithm of 2^20 + 1 may be 20.
    bins = np.ceil(np.log2(ranks.astype(np.float64))).astype(np.int64)
    return np.bincount(np.minimum(bins, len(RANK_BINS) - 1)).tolist()


def relation_name(relation: int, names: Sequence[str]) -> str:
    """Name of a relation, or of the reverse of one, from the names of the R raw ones."""
    return names[relation] if relation < len(names) else f"{names[relation - len(names)]}_reverse"


def relation_table(rows: dict[str, np.ndarray], names: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Scores of each relation and side, the most frequent first.

    Args:
        rows: ``relations``, ``rank_method`` and possibly ``rank_base``, each (n,).
        names: of the R raw relations.

    Returns:
        Columns and rows.
    """
    kinds, place = np.unique(rows["relations"], return_inverse=True)
    counts = np.bincount(place)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, weights=values) / counts

    columns = {"mrr": mean(1 / rows[METHOD]), "hits@10": mean(rows[METHOD] <= 10)}
    if BEFORE in rows:
        columns["mrr before"] = mean(1 / rows[BEFORE])
    order = np.argsort(-counts, kind="stable")
    table = [
        [
            relation_name(int(kinds[kind]), names),
            int(counts[kind]),
            *(round(float(values[kind]), 4) for values in columns.values()),
        ]
        for kind in order
    ]
    return ["relation", "queries", *columns], table


def explain(
    module: LightningModule, triples: torch.Tensor, entities: Sequence[str], relations: Sequence[str]
) -> list[list[str]]:
    """Names of the analogical entity, relation and pair of each triple, where the module knows such; otherwise none."""
    if not hasattr(module, "explain") or not len(triples):
        return []
    found = {key: value.tolist() for key, value in module.explain(*triples.to(module.device).T).items()}
    rows = zip(found["entity"], found["relation"], found["pair_entity"], found["pair_relation"], strict=True)
    return [
        [entities[entity], relation_name(relation, relations), f"{entities[first]} + {relation_name(kind, relations)}"]
        for entity, relation, first, kind in rows
    ]
