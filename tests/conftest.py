"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores, so that each should keep to one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

SHARED = Path(os.environ.get("LIGHTNING_APPS_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real data sets in their genuine layouts, next to a development checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set LIGHTNING_APPS_SHARED to the folder that holds 'data'")
    return folder


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test's command leaves in the environment, such as the folder of its run, must not reach the next test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
