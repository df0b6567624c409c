"""Every test of a configuration runs a command line of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_apps.run_folder import ENVIRONMENT

BLANK = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def own_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each command line of a test is a process of its own in reality; the folder of its run must not be handed on."""
    monkeypatch.chdir(tmp_path)
    os.environ.pop(ENVIRONMENT, None)
    yield
    os.environ.pop(ENVIRONMENT, None)


@pytest.fixture(autouse=True)
def blank_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing its charts is a third of the time of a recipe's step; what they show is tested with the callbacks."""
    monkeypatch.setattr("callbacks.media._encode_figure", lambda figure: BLANK)
