"""What the parts of PRCL are worth with few labels: equal steps of each method on CamVid's splits, over seeds.

    pip install 'lightning-apps[weights]'
    python -m benchmarks.prcl_camvid --root <CamVid> --out results/camvid
    python -m benchmarks.prcl_camvid --root <CamVid> --out results/camvid --labels 46 --seeds 0 --methods prcl

Every (labels, seed, method) is one run of `python -m lightning_apps.prcl fit --config prcl/camvid_46.yaml` on the lists
`<CamVid>/splits/<labels>/<seed>`. A finished run is a line of `<out>/results.csv`; the same command goes on with the
rest, and with a run that was stopped from its last epoch. Scores are those of the last epoch, not of the best one.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from benchmarks.result_tables import append, check_settings, head, last, line, read, run

METHODS = {
    "supervised": ["--config", "prcl/supervised.yaml"],
    "mean_teacher": ["--config", "prcl/mean_teacher.yaml"],
    "point_contrast": ["--config", "prcl/point_contrast.yaml"],
    "prcl": [],
    "journal": ["--config", "prcl/journal.yaml"],
}
PAIRS = (("mean_teacher", "supervised"), ("prcl", "mean_teacher"), ("prcl", "supervised"))
COLUMNS = ["labels", "seed", "method", "miou", "miou_student", "cpu_seconds", "settings"]


def train(options: argparse.Namespace, labels: int, seed: int, method: str) -> dict[str, str]:
    """One run, from its last checkpoint if there is one; returns a line of the table."""
    name = f"{labels}-{seed}-{method}"
    folder = options.out / "runs" / "prcl" / name
    command = [sys.executable, "-m", "lightning_apps.prcl", "fit", "--config", "prcl/camvid_46.yaml", *METHODS[method]]
    command += ["--data.root", options.root, "--data.split_path", f"{options.root}/splits/{labels}/{seed}"]
    command += ["--seed_everything", str(seed), "--run.root", str(options.out / "runs"), "--run.name", name]
    command += ["--trainer.logger", "csv", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    command += options.extra
    if (folder / "checkpoints/last.ckpt").is_file():
        command += ["--ckpt_path", "last"]
    seconds = run(command, options.out / f"{name}.log")
    student = last(folder / "metrics.csv", "val/miou_student")
    teacher = student if method == "supervised" else last(folder / "metrics.csv", "val/miou_teacher")
    values = (labels, seed, method, teacher, student, seconds, " ".join(options.extra))
    return {key: str(value) for key, value in zip(COLUMNS, values, strict=True)}


def summarise(results: list[dict[str, str]]) -> str:
    """Markdown: validation mIoU of each run, means over seeds, and paired differences."""
    scores = {(int(r["labels"]), r["method"], int(r["seed"])): 100 * float(r["miou"]) for r in results}
    lines = []
    for labels in sorted({key[0] for key in scores}):
        mine = {key[1:]: value for key, value in scores.items() if key[0] == labels}
        seeds = sorted({seed for _, seed in mine})
        lines += ["", *head(f"{labels} labels", seeds)]
        for method in METHODS:
            values = {seed: mine[method, seed] for seed in seeds if (method, seed) in mine}
            if values:
                lines.append(line(method, values, seeds))
        for first, second in PAIRS:
            both = [seed for seed in seeds if (first, seed) in mine and (second, seed) in mine]
            if both:
                difference = {seed: mine[first, seed] - mine[second, seed] for seed in both}
                lines.append(line(f"{first} - {second}", difference, seeds))
    return "\n".join(lines)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="+", default=[46, 23])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 3407])
    parser.add_argument("--methods", nargs="+", default=["supervised", "mean_teacher", "prcl"], choices=METHODS)
    options, options.extra = parser.parse_known_args()
    options.root, options.out = str(Path(options.root).absolute()), options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "results.csv"
    check_settings(read(table), table, " ".join(options.extra))
    for labels, seed, method in product(options.labels, options.seeds, options.methods):
        done = {(int(r["labels"]), int(r["seed"]), r["method"]) for r in read(table)}
        if (labels, seed, method) in done:
            continue
        append(table, train(options, labels, seed, method))
    print(summarise(read(table)))


if __name__ == "__main__":
    main()
