"""End a rank whose main process is gone, instead of letting it wait for a message that nobody will send."""

import os
import sys
import threading
import time


def stop_when_orphaned(grace: float = 10.0, interval: float = 1.0) -> bool:
    """Watch, in a rank that Lightning launched, for the process that launched it.

    Lightning's main process watches the other ranks, but nobody watches the main process: killed while the ranks are
    still meeting, it leaves them waiting for half an hour. Call this early in a program, before the trainer is made.
    In the main process (local rank 0) it does nothing.

    Args:
        grace: Seconds that this rank gets to end by itself.
        interval: Seconds between two looks.

    Returns:
        Whether there is something to watch.
    """
    if int(os.environ.get("LOCAL_RANK") or 0) == 0:
        return False
    arguments = (os.getppid(), grace, interval)
    threading.Thread(target=_watch, args=arguments, name="orphan-watch", daemon=True).start()
    return True


def _watch(parent: int, grace: float, interval: float) -> None:
    while os.getppid() == parent:
        time.sleep(interval)
    time.sleep(grace)
    rank = os.environ["LOCAL_RANK"]
    print(f"Rank {rank}: the main process is gone, so this one ends as well.", file=sys.stderr, flush=True)
    os._exit(1)
