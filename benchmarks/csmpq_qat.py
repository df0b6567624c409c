"""What mixed precision is worth in training: EMO-1M on ten classes of Tiny ImageNet, beside float and uniform bits.

    python -m benchmarks.csmpq_qat --root FOLDER --out results/qat

FOLDER holds {train,val}/<class>/*. For each seed a float network is trained (`emo/tiny_imagenet_10.yaml`), and each
variant goes on from it (`csmpq/tiny_imagenet_10.yaml`). Accuracies are those of the last epoch. A finished run is a
line of `<out>/results.csv`; the same command goes on with the rest.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.result_tables import append, head, last, line, read, run

VARIANTS = {
    "mixed": [],
    "equal": ["--callbacks.allocation.score", "modules.quantization.scores.Equal"],
    "uniform": ["--config", "csmpq/uniform.yaml"],
}
COLUMNS = ["seed", "variant", "accuracy", "size_mib", "cpu_seconds"]


def train(options: argparse.Namespace, seed: int, variant: str) -> dict[str, str]:
    """One run; returns a line of the table."""
    app, name = ("emo" if variant == "float" else "csmpq"), f"{seed}-{variant}"
    command = [sys.executable, "-m", f"lightning_apps.{app}", "fit", "--config", f"{app}/tiny_imagenet_10.yaml"]
    if variant != "float":
        weights = options.out / "runs/emo" / f"{seed}-float" / "checkpoints/last.ckpt"
        command += [*VARIANTS[variant], "--model.init_from", str(weights)]
    command += ["--data.root", options.root, "--seed_everything", str(seed)]
    command += ["--run.root", str(options.out / "runs"), "--run.name", name]
    command += ["--trainer.logger", "csv", "--trainer.enable_progress_bar", "false"]
    if variant == "float":
        command += ["--callbacks.averaging", "null"]  # the weights that are trained on are not averaged ones
    seconds = run(command, options.out / f"{name}.log")
    metrics = options.out / "runs" / app / name / "metrics.csv"
    size = last(metrics, "quantization/size_mib") if variant != "float" else ""
    values = (seed, variant, last(metrics, "val/acc"), size, seconds)
    return {key: str(value) for key, value in zip(COLUMNS, values, strict=True)}


def summarise(results: list[dict[str, str]]) -> str:
    """Markdown: accuracy by variant and seed, with mean and spread."""
    seeds = sorted({int(row["seed"]) for row in results})
    lines = head("", seeds)
    for variant in ("float", *VARIANTS):
        own = {int(row["seed"]): 100 * float(row["accuracy"]) for row in results if row["variant"] == variant}
        if own:
            sizes = {
                f"{float(row['size_mib']):.3f} MiB" for row in results if row["variant"] == variant and row["size_mib"]
            }
            lines.append(line(", ".join([variant, *sorted(sizes)]), own, seeds))
    return "\n".join(lines)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.root, options.out = str(Path(options.root).absolute()), options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "results.csv"
    for seed in options.seeds:
        for variant in ("float", *VARIANTS):
            if (str(seed), variant) in {(row["seed"], row["variant"]) for row in read(table)}:
                continue
            append(table, train(options, seed, variant))
    print(summarise(read(table)))


if __name__ == "__main__":
    main()
