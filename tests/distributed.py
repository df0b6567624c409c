"""Run a function on several gloo ranks on this machine."""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE = 5.0  # seconds the other ranks get to report once one has failed
ENVIRONMENT_NAMES = (
    "OMP_NUM_THREADS",
    "WANDB_MODE",
    "WANDB_SILENT",
    "NO_ALBUMENTATIONS_UPDATE",
    "LIGHTNING_APPS_SHARED",
)


def run_ranks(fn: Callable[..., Any], world_size: int = 2, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``fn(rank, *args)`` in ``world_size`` processes that share a gloo process group.

    A Lightning trainer made inside ``fn`` with ``Trainer(accelerator="cpu", devices=world_size, strategy="ddp")`` finds
    the processes and the group ready and launches nothing; write to a ``tmp_path`` passed in ``args``.

    Args:
        fn: A function at the top level of a module, so that it can be pickled.
        world_size: Number of ranks.
        args: Picklable arguments, the same for each rank.
        timeout: Seconds after which the ranks are killed; also the time a collective operation may take.

    Returns:
        What each rank returned, in the order of ranks; tensors come back by value.

    Raises:
        AssertionError: If a rank raised, died or did not finish in time, with the traceback of every such rank.
    """
    context = quick_processes()
    environment = {name: os.environ[name] for name in ENVIRONMENT_NAMES if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, connections = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            job = (fn, args, rank, world_size, folder, timeout, environment)
            process = context.Process(target=_run_rank, args=(sender, job), name=f"rank {rank}")
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        try:
            results, errors = _collect(connections, processes, time.monotonic() + timeout)
            errors.update(_still_running(set(range(world_size)) - set(results) - set(errors), timeout, Path(folder)))
        finally:
            for process in processes:
                process.kill()
                process.join()
    if errors:
        raise AssertionError("\n".join(f"rank {rank}: {message}" for rank, message in sorted(errors.items())))
    return [results[rank] for rank in range(world_size)]


def quick_processes() -> BaseContext:
    """Return a ``multiprocessing`` context whose processes are new ones, but with the slow imports behind them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch", "timm", "albumentations", "pytest"])
    return context


def _collect(
    connections: list[Connection], processes: list[BaseProcess], deadline: float
) -> tuple[dict[int, Any], dict[int, str]]:
    """Read what ranks send until all have spoken, the deadline passes, or the grace after a first failure is over."""
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    pending = list(connections)
    while pending and (left := deadline - time.monotonic()) > 0:
        for connection in wait(pending, timeout=left):
            pending.remove(connection)
            rank = connections.index(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join(GRACE)
                succeeded, value = False, f"died without a word, exit code {processes[rank].exitcode}"
            (results if succeeded else errors)[rank] = value
            if not succeeded:
                deadline = min(deadline, time.monotonic() + GRACE)
    return results, errors


def _still_running(ranks: set[int], timeout: float, folder: Path) -> dict[int, str]:
    messages = {}
    for rank in ranks:
        stacks = folder / f"stacks-{rank}"
        where = stacks.read_text() if stacks.exists() else ""
        messages[rank] = f"still running when the ranks were stopped (timeout {timeout:g} s)\n{where}".rstrip()
    return messages


def _run_rank(sender: Connection, job: tuple) -> None:
    """Body of one process: join the group, run the function, send its result or its traceback."""
    fn, args, rank, world_size, folder, timeout, environment = job
    os.environ.update(environment)
    # The names by which Lightning knows that the processes are already there.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    # Processes inherit how they were started; loading workers shall be forked, as in any other program.
    multiprocessing.set_start_method("fork", force=True)
    with open(f"{folder}/stacks-{rank}", "w") as stacks:
        faulthandler.dump_traceback_later(max(timeout - 2, timeout / 2), file=stacks)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            answer = (True, fn(rank, *args))
            message = pickle.dumps(answer)
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
    sender.send_bytes(message)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # No waiting for threads of a group whose other members may be gone.
    os._exit(0)
