"""A file of the best answers to queries of a knowledge graph, by name."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.atomic_files import atomic_table
from callbacks.rank_report import EXPLANATION, explain
from callbacks.step_outputs import StepOutputs

if TYPE_CHECKING:
    from pandas import DataFrame

Format = Literal["csv", "parquet"]
QUERY = ("head", "relation", "tail")


class CompletionWriter(Callback):
    """Writes the answers of a link predictor, one a line: the completed triple, its rank and score.

    ``query`` numbers the queries from 0. Where they are from a file, ``row`` is theirs in it, from 1 below the header.
    ``known`` says whether the triple is in the data already, as the right answer of one of its own queries is. Where
    the module names analogical objects, three columns tell those of the answer: an entity like the one that was given,
    a relation like the one that was asked for, and a pair of both.

    ``predict_step`` returns ``index`` (B,), ``entities`` (B, k), ``scores`` (B, k) and ``known`` (B, k); the datamodule
    has ``query_names(index)``, ``entity_names``, ``relation_names`` and ``queries("predict").triples`` (n, 3).

    Args:
        output: file; None for ``predictions.<format>`` in the trainer's ``default_root_dir``.
        format: ``csv`` or ``parquet``.
        explanations: whether to name analogical objects.

    Raises:
        ValueError: for an unknown format, or an ``output`` whose ending says another one.
    """

    def __init__(self, output: str | None = None, format: Format = "csv", explanations: bool = True) -> None:
        if format not in get_args(Format):
            raise ValueError(f"CompletionWriter: format is {format!r}, expected one of {', '.join(get_args(Format))}")
        if output is not None and Path(output).suffix != f".{format}":
            raise ValueError(f"CompletionWriter: output {output!r} does not end in .{format}")
        self.output, self.format, self.explanations = output, format, explanations
        self._outputs = StepOutputs()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self._outputs.clear()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Take the answers of a batch."""
        self._outputs.add({key: outputs[key] for key in ("index", "entities", "scores", "known")})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the answers of all ranks together and write them."""
        gathered = self._outputs.take("CompletionWriter")
        if gathered is None:
            return
        path = Path(self.output or Path(trainer.default_root_dir) / f"predictions.{self.format}")
        table = self._table(trainer, pl_module, gathered)
        atomic_table(path, table)
        rank_zero_info(f"Wrote {len(table)} answers to {len(gathered['index'])} queries to {path}")

    def _table(self, trainer: Trainer, module: LightningModule, rows: dict[str, torch.Tensor]) -> "DataFrame":
        import pandas as pd

        data = trainer.datamodule
        asked = data.query_names(rows["index"].numpy())
        answers = rows["entities"].shape[1]
        lines: list[dict[str, Any]] = []
        for number, query in enumerate(asked):
            missing = "head" if query["side"] == "head" else "tail"
            for place in range(answers):
                answer = data.entity_names[int(rows["entities"][number, place])]
                triple = {key: query[key] for key in QUERY} | {missing: answer}
                lines.append(
                    {
                        "query": int(rows["index"][number]),
                        **{key: query[key] for key in ("row",) if key in query},
                        **triple,
                        "answer": missing,
                        "rank": place + 1,
                        "score": float(rows["scores"][number, place]),
                        "known": bool(rows["known"][number, place]),
                    }
                )
        if self.explanations:
            queries = torch.as_tensor(data.queries("predict").triples[rows["index"].numpy()])
            triples = queries.repeat_interleave(answers, dim=0)
            triples[:, 2] = rows["entities"].flatten()
            for line, why in zip(lines, explain(module, triples, data.entity_names, data.relation_names), strict=False):
                line.update(zip(EXPLANATION, why, strict=True))
        return pd.DataFrame(lines)
