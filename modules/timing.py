"""Time alternatives side by side in one process, so that the machine's mood hits all alike."""

import time
from collections.abc import Callable, Mapping


def interleaved(
    alternatives: Mapping[str, Callable[[], object]],
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
