"""Time alternatives side by side in one process, so that the machine's mood hits all alike."""

import statistics
import time
from collections.abc import Callable


def interleaved(
    alternatives: dict[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each alternative, round by round, in alternating order.

    Args:
        alternatives: Name -> what to time.
        rounds: Measured rounds.
        warm_up: Rounds before that.
        clock: What tells the seconds; ``time.process_time`` on one thread does not count what other processes take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    names = list(alternatives)
    for number in range(warm_up + rounds):
        for name in names if number % 2 else reversed(names):
            start = clock()
            alternatives[name]()
            elapsed = clock() - start
            if number >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def report(title: str, seconds: dict[str, list[float]], reference: str) -> str:
    """Markdown table of medians, and of their ratio to the reference.

    Args:
        title: What was measured.
        seconds: As :func:`interleaved` returns them.
        reference: Name of the alternative that the others are divided by.
    """
    base = statistics.median(seconds[reference])
    lines = [
        f"**{title}** ({len(seconds[reference])} rounds)",
        "",
        "| | median ms | / reference |",
        "| --- | --- | --- |",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {1000 * median:.2f} | {median / base:.3f} |")
    return "\n".join(lines) + "\n"
