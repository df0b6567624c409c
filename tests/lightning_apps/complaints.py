"""Commands in this process that must fail as a person should see it: one message, exit code 1, nothing lost."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from lightning_apps.app import App
from lightning_apps.cli import main
from lightning_apps.run_folder import ENVIRONMENT


def command(app: App, *arguments: str) -> int:
    """Run a command as a process of its own would."""
    os.environ.pop(ENVIRONMENT, None)
    try:
        return main(app, list(arguments))
    finally:
        os.environ.pop(ENVIRONMENT, None)


def written(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def complainer(app: App, kept: Path, capsys) -> Callable[..., str]:
    """What runs a command that must fail and returns its message.

    Args:
        app: whose command it is.
        kept: a folder whose files the command must leave as they are.
        capsys: pytest's.
    """

    def run(*arguments: str) -> str:
        before = written(kept)
        capsys.readouterr()
        code = command(app, *arguments)
        shown = capsys.readouterr().err
        assert code == 1, shown
        assert "Traceback" not in shown
        assert "Union" not in shown
        assert shown.count("error: ") == 1
        after = written(kept)
        assert {name: after.get(name) for name in before} == before, "what was written before is still there"
        return shown.partition("error: ")[2]

    return run
