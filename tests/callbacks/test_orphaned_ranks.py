import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "callbacks" / "orphaned_ranks.py"
RANK = f"""
import runpy, sys, time
print(runpy.run_path({str(SOURCE)!r})["stop_when_orphaned"](grace=0.1, interval=0.05), flush=True)
time.sleep(float(sys.argv[1]))
"""
MAIN = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {RANK!r}, "60"]).wait()
"""


def start(code: str, rank: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"LOCAL_RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_rank_ends_after_its_main_process():
    process = start(MAIN, "1")
    assert process.stdout.readline() == "True\n"
    process.kill()
    # The pipe closes when the rank, which also holds it, is gone.
    assert process.stdout.read() == "Rank 1: the main process is gone, so this one ends as well.\n"
    process.wait()


@pytest.mark.parametrize(("rank", "watching"), [("0", "False\n"), ("", "False\n"), ("1", "True\n")])
def test_nothing_happens_while_the_parent_lives(rank, watching):
    process = start(RANK, rank, "0.3")
    assert process.communicate()[0] == watching
    assert process.returncode == 0
