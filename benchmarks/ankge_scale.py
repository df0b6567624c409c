"""Training on large graphs: time per step and peak memory, in one process or with entities spread over several.

    python -m benchmarks.ankge_scale make FOLDER [--triples 10000000 --entities 1000000 --relations 500]
    python -m benchmarks.ankge_scale train FOLDER [--steps 300] [--dimension 50] [--processes 2 --sharded]

``make`` writes a graph by numbers (train2id.txt, ...): entities lie on a ring, each relation leads some steps onwards,
and entities with small numbers are the heads of more triples than others. ``train`` reads it memory-mapped, trains
TransE through Lightning's Trainer on the processor, and tells for each process the median time of a step and the peak
of its resident memory, pages of the memory-mapped file among it.
"""

import argparse
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from pyarrow import csv

from datamodules import KnowledgeGraph
from modules.knowledge_graph import KnowledgeGraphEmbedding, TransE

WARM_UP = 5
MARGIN, NEGATIVES, HELD_OUT = 9.0, 256, 5000
GIBIBYTE = 1 << 20  # KiB


def make_graph(folder: Path, triples: int, entities: int, relations: int, seed: int = 0) -> None:
    """Write a graph by numbers.

    Args:
        folder: Where to write train2id.txt, valid2id.txt and test2id.txt.
        triples: Number of training triples, before those that repeat others are left out.
        entities: Number E of entities.
        relations: Number R of relations.
        seed: Of heads, relations and steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    steps = random.integers(1, entities, relations)
    for part, count in (("train", triples), ("valid", HELD_OUT), ("test", HELD_OUT)):
        heads = (entities * random.random(count) ** 2).astype(np.int64)
        if part == "train":  # each entity and relation occurs
            heads[:entities] = np.arange(min(entities, count))
        kinds = random.integers(0, relations, count)
        columns = [heads, (heads + steps[kinds]) % entities, kinds]  # files of numbers have the relation last
        partial = folder / f"{part}2id.txt.part"
        with partial.open("wb") as file:
            file.write(f"{count}\n".encode())
            table = pa.table(columns, names=["head", "tail", "relation"])
            csv.write_csv(table, file, csv.WriteOptions(include_header=False, delimiter="\t"))
        os.replace(partial, folder / f"{part}2id.txt")
        print(f"{part}: {count} triples", flush=True)


def peak_memory() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIBIBYTE


class StepTimes(Callback):
    """Notes how long each step takes, from batch to batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time and the loss."""
        self.ends.append(time.perf_counter())
        self.losses.append(float(outputs["loss"]))

    @property
    def median(self) -> float:
        """Seconds of a step, the first ones left out."""
        return statistics.median(np.diff(self.ends[WARM_UP:]))


def train(options: argparse.Namespace) -> None:
    """Some steps of TransE, and what they took."""
    seed_everything(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = KnowledgeGraph(
        layout="tsv",
        root=str(options.folder),
        memory_map=True,
        query_counts=False,
        batch_size=options.batch_size,
        eval_batch_size=options.queries or None,
        num_negatives=NEGATIVES,
    )
    entities, relations, read = data.num_entities, data.num_relations, time.perf_counter() - start
    told = [f"{entities} entities, {relations} relations; read in {read:.1f} s, peak {peak_memory():.2f} GiB"]
    model = KnowledgeGraphEmbedding(TransE(options.dimension, MARGIN), entities, relations, sharded=options.sharded)
    times = StepTimes()
    several = {"strategy": "ddp", "devices": options.processes} if options.processes > 1 else {"devices": 1}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **several,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    table = model.tables.entities
    held = table.numel() * table.element_size() / (GIBIBYTE << 10)
    told.append(f"{len(table)} entities held here, {held:.3f} GiB; as much again for gradients, twice for moments")
    told.append(f"{options.steps} steps of {options.batch_size} triples and {NEGATIVES} negatives:")
    told[-1] += f" {1000 * times.median:.0f} ms each, {times.ends[0] - start:.1f} s until the first is done;"
    told[-1] += f" loss {times.losses[0]:.4f} to {times.losses[-1]:.4f}"
    told.append(f"peak {peak_memory():.2f} GiB")
    if options.queries:
        trainer.limit_val_batches = 1
        start = time.perf_counter()
        trainer.validate(model, datamodule=data, verbose=False)
        told.append(f"{options.queries} queries: {time.perf_counter() - start:.1f} s with the index of all answers")
        told.append(f"peak {peak_memory():.2f} GiB")
    print("\n".join(f"[process {trainer.global_rank}] {line}" for line in told), flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("folder", type=Path)
    make.add_argument("--triples", type=int, default=10_000_000)
    make.add_argument("--entities", type=int, default=1_000_000)
    make.add_argument("--relations", type=int, default=500)
    fit = commands.add_parser("train")
    fit.add_argument("folder", type=Path)
    fit.add_argument("--steps", type=int, default=300)
    fit.add_argument("--dimension", type=int, default=50)
    fit.add_argument("--batch_size", type=int, default=1024)
    fit.add_argument("--queries", type=int, default=0, help="rank so many validation queries per process as well")
    fit.add_argument("--processes", type=int, default=1)
    fit.add_argument("--sharded", action="store_true")
    options = parser.parse_args()
    if options.command == "make":
        make_graph(options.folder, options.triples, options.entities, options.relations)
    elif options.steps < WARM_UP + 2:
        parser.error(f"--steps {options.steps}: expected {WARM_UP + 2} or more, the first {WARM_UP} are not timed")
    else:
        train(options)


if __name__ == "__main__":
    main()
