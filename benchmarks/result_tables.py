"""Tables that long benchmarks fill line by line, so that the same command goes on where it was stopped."""

import csv
import resource
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    """Lines so far."""
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a line, below a line of names at the start."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(dict(row), flush=True)


def last(path: Path, name: str) -> float:
    """The last value of a metric in a run's `metrics.csv`."""
    return [float(row[name]) for row in read(path) if row.get(name)][-1]


def run(command: Sequence[str], log: Path) -> int:
    """Run a command to its end, with what it says added to a file.

    Returns:
        Its seconds of processor time, with those of earlier starts that ended before it did, which a file beside the
        log remembers until then.
    """
    spent = log.with_suffix(".seconds")
    earlier = float(spent.read_text()) if spent.exists() else 0.0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        with log.open("a") as file:
            subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = earlier + after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        spent.write_text(str(total))
    spent.unlink()
    return round(total)


def check_settings(rows: Sequence[Mapping[str, str]], path: Path, settings: str) -> None:
    """Refuse to go on with a table that was filled with other settings.

    Raises:
        SystemExit: Names both, or the column that the table lacks.
    """
    if rows and "settings" not in rows[0]:
        raise SystemExit(f"{path} has no column 'settings', so it was filled by another version; give another --out")
    others = {row["settings"] for row in rows} - {settings}
    if others:
        raise SystemExit(f"{path} was filled with the settings '{others.pop()}', not '{settings}'; give another --out")


def line(name: str, values: Mapping[int, float], seeds: Sequence[int]) -> str:
    """Markdown: values of seeds, their mean and standard deviation."""
    spread = statistics.stdev(values.values()) if len(values) > 1 else float("nan")
    cells = [f"{values[seed]:.1f}" if seed in values else "" for seed in seeds]
    return f"| {name} | {' | '.join(cells)} | {statistics.mean(values.values()):.1f} ± {spread:.1f} |"


def head(name: str, seeds: Sequence[int]) -> list[str]:
    """Markdown: the first two lines of a table of such lines."""
    return [
        f"| {name} | {' | '.join(f'seed {seed}' for seed in seeds)} | mean ± std |",
        "| --- " * (len(seeds) + 2) + "|",
    ]
