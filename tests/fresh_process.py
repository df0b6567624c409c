"""Start commands in processes of their own whose imports are already made: a fork of a process that did nothing else.

Run as a script it is that process: it imports, then forks for each job that a line of JSON on its input describes.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

# Every app, and what their commands import on the way. Not onnxruntime, which starts threads, nor what must be each
# process' own: wandb makes a temporary folder that the first process would take away with it.
PRELOADED = (
    *("lightning_apps.ankge", "lightning_apps.bolt", "lightning_apps.csmpq", "lightning_apps.emo"),
    *(
        "lightning_apps.prcl",
        "modules.ankge",
        "modules.bolt",
        "modules.classification",
        "modules.csmpq",
        "modules.detection",
        "modules.emo",
        "modules.prcl",
        "modules.quantization",
        "modules.segmentation",
        "timm",
        "torch._dynamo",
        "sklearn.linear_model",
        "albumentations",
    ),
    *("pandas", "matplotlib.figure", "onnx", "onnxscript", "torch.onnx._internal.exporter._core"),
)


class Starter:
    """Starts `python -m MODULE ARGUMENTS` in a new process that has the imports behind it.

    The process has its own folder, environment, output and end (`atexit` included); it comes from one that ran outside
    the checkout, so that the installed package runs.

    Args:
        environment: Environment of the process that imports.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._begin()

    def _begin(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="starter-")
        command = [sys.executable, "-P", str(Path(__file__).resolve()), *PRELOADED]
        self._process = subprocess.Popen(
            command, cwd=self._folder.name, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def run(
        self, folder: Path, module: str, *arguments: str, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess:
        """Run a module as a program to its end.

        Args:
            folder: Working folder.
            module: Name of the module.
            arguments: Its command line.
            environment: The whole environment.
            timeout: Seconds.

        Returns:
            As `subprocess.run` with text.

        Raises:
            AssertionError: The program did not end in time.
        """
        outputs = [Path(self._folder.name, name) for name in ("out", "err")]
        job = {"folder": str(folder), "module": module, "arguments": arguments, "environment": dict(environment)}
        self._process.stdin.write(json.dumps({**job, "outputs": [str(path) for path in outputs]}).encode() + b"\n")
        self._process.stdin.flush()
        ended, _, _ = select.select([self._process.stdout], [], [], timeout)
        answer = self._process.stdout.readline() if ended else b""
        shown = [path.read_text() if path.exists() else "" for path in outputs]
        if not answer.strip():
            self.close()
            self._begin()
            raise AssertionError(f"python -m {module} {' '.join(arguments)}: no end within {timeout:g} s\n{shown[1]}")
        return subprocess.CompletedProcess([module, *arguments], int(answer), *shown)

    def close(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


def next_job() -> dict[str, Any]:
    """Fork for each job; returns in the new process. The old one ends with its input."""
    for line in iter(sys.stdin.buffer.readline, b""):
        child = os.fork()
        if child == 0:
            return json.loads(line)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit()


def become(job: dict[str, Any]) -> None:
    """Be the program that a job describes."""
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, path in enumerate((os.devnull, *job["outputs"])):
        source = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(source, number)
        os.close(source)
    sys.argv = [job["module"], *job["arguments"]]
    sys.path.insert(0, job["folder"])
    sys.modules.pop(job["module"], None)
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.modules["wandb"] = None  # timm would import it
    for name in sys.argv[1:]:
        import_module(name)
    del sys.modules["wandb"]
    gc.freeze()
    become(next_job())
