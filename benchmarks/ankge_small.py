"""What analogies add on small graphs: four base models, seeds, both score offsets, each beside its controls.

    python -m benchmarks.ankge_small --root FOLDER --out results/ankge [--graphs umls kinship] [--seeds 0 1 2]

FOLDER/<graph> holds train.txt, valid.txt and test.txt. For each (graph, base, seed) a base model is trained
(`ankge/<base>_small.yaml`), then AnKGE on it for each offset (`ankge/ankge_small.yaml`); scores are those of the test
triples for the checkpoint that is best on validation. A finished row is a line of `<out>/results.csv`; the same command
goes on with the rest.
"""

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path

from benchmarks.result_tables import append, last, read, run

BASES = ("transe", "rotate", "hake", "pairre")
OFFSETS = ("margin", "none")
SCORES = {
    "base": "test/base/mrr",
    "unlinked": "test/unlinked/mrr",
    "identity": "test/identity/mrr",
    "ankge": "test/mrr",
}
COLUMNS = ["graph", "base_model", "seed", "offset", *SCORES, "cpu_seconds"]


def train(options: argparse.Namespace, graph: str, base: str, seed: int, offset: str) -> dict[str, str]:
    """One base model if there is none yet, and AnKGE on it; returns a line of the table."""
    runs, name = options.out / "runs", f"{graph}-{base}-{seed}-{offset}"
    shared = ["--data.root", f"{options.root}/{graph}", "--run.root", str(runs), "--callbacks.ranks", "null"]
    shared += ["--trainer.logger", "csv", "--trainer.enable_progress_bar", "false"]
    command = [sys.executable, "-m", "lightning_apps.ankge"]
    seconds = 0
    weights = runs / "ankge" / f"{graph}-{base}-{seed}" / "checkpoints/best.ckpt"
    if not weights.is_file():
        fit = [*command, "fit", "--config", f"ankge/{base}_small.yaml", *shared, "--seed_everything", str(seed)]
        seconds += run([*fit, "--run.name", f"{graph}-{base}-{seed}"], options.out / f"{graph}-{base}-{seed}.log")
    fit = [*command, "fit", "--config", "ankge/ankge_small.yaml", *shared, "--seed_everything", str(seed)]
    fit += ["--run.name", name, "--model.base", str(weights), "--model.score_offset", offset]
    seconds += run(fit, options.out / f"{name}.log")
    best = runs / "ankge" / name / "checkpoints/best.ckpt"
    seconds += run(
        [*command, "test", "--ckpt_path", str(best), "--trainer.logger", "csv"], options.out / f"{name}.test.log"
    )
    metrics = runs / "ankge" / name / "test/metrics.csv"
    values = (graph, base, seed, offset, *(last(metrics, key) for key in SCORES.values()), seconds)
    return {key: str(value) for key, value in zip(COLUMNS, values, strict=True)}


def summarise(results: list[dict[str, str]]) -> str:
    """Markdown: mean MRR (standard deviation) over seeds, and the paired gains of AnKGE."""
    lines = [
        "| graph, base, offset | base | identity | AnKGE | AnKGE - base | AnKGE - identity | unlinked |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = dict.fromkeys((row["graph"], row["base_model"], row["offset"]) for row in results)
    for key in keys:
        own = [row for row in results if (row["graph"], row["base_model"], row["offset"]) == key]
        scores = {name: [float(row[name]) for row in own] for name in SCORES}
        gains = [
            [ours - other for ours, other in zip(scores["ankge"], scores[name], strict=True)]
            for name in ("base", "identity")
        ]
        cells = [
            *(_told(scores[name]) for name in ("base", "identity", "ankge")),
            *(_told(gain, "+") for gain in gains),
        ]
        lines.append(f"| {', '.join(key)} | {' | '.join([*cells, _told(scores['unlinked'])])} |")
    return "\n".join(lines)


def _told(values: list[float], sign: str = "") -> str:
    spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--graphs", nargs="+", default=["umls", "kinship"])
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--offsets", nargs="+", default=list(OFFSETS), choices=OFFSETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.root, options.out = str(Path(options.root).absolute()), options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "results.csv"
    for graph, base, seed, offset in product(options.graphs, options.bases, options.seeds, options.offsets):
        row = (graph, base, str(seed), offset)
        if row not in {tuple(found[key] for key in COLUMNS[:4]) for found in read(table)}:
            append(table, train(options, graph, base, seed, offset))
    print(summarise(read(table)))


if __name__ == "__main__":
    main()
