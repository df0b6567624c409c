"""The front doors: `python -m lightning_apps.<app> <subcommand> --config <app>.yaml`."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

_SIBLINGS = ("modules", "datamodules", "callbacks", "configs")


def _check_siblings() -> None:
    """Refuse to start when another package hides one of the suite's own.

    Raises:
        ImportError: A sibling package is missing, or is found in another place than this one.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _SIBLINGS:
        spec = find_spec(name)
        if spec is None:
            raise ImportError(f"package '{name}' of lightning-apps is not installed; reinstall with: pip install .")
        found = Path(spec.origin).resolve().parent if spec.origin else Path(next(iter(spec.submodule_search_locations)))
        if found.parent != home:
            raise ImportError(
                f"package '{name}' of lightning-apps is shadowed by {found} (expected {home / name}). "
                f"Rename that folder, or start from another working folder."
            )


_check_siblings()
