"""Find configuration files by bare name, and read them with errors a person can act on."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import configs
from lightning_apps.errors import UserError

SHIPPED = Path(configs.__file__).resolve().parent


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file that exists.

    Args:
        path: Where it lies.
        shipped: Whether it came with the suite; its values are defaults, while those of a user's file are explicit.
    """

    path: Path
    shipped: bool


def shipped_names(app: str) -> list[str]:
    """Names under which the configurations of an app are found from any folder."""
    files = [SHIPPED / f"{app}.yaml", *sorted((SHIPPED / app).glob("*.yaml"))]
    return [file.relative_to(SHIPPED).as_posix() for file in files if file.is_file()]


def find_config(name: str, app: str) -> ConfigFile:
    """Look for a configuration in the working folder, then among the shipped ones.

    Args:
        name: A path, or a bare name such as `bolt.yaml`, `bolt/finetune.yaml` or `bolt/finetune`.
        app: Name of the app that asks.

    Raises:
        UserError: No such file; lists what there is.
    """
    candidates = [Path(name)]
    if not Path(name).is_absolute():
        candidates += [SHIPPED / name, SHIPPED / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return ConfigFile(path.resolve(), shipped=path.resolve().is_relative_to(SHIPPED))
    known = shipped_names(app)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--config {name}: no such file in {Path.cwd()} and no shipped configuration of that name.{hint}\n"
        f"Shipped with {app}: {', '.join(known) or 'none'}"
    )


def read_config(path: Path, app: str) -> dict[str, Any]:
    """Read a YAML configuration of an app.

    Raises:
        UserError: Not YAML, not a mapping, or a configuration of another app.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    other = content.get("app", app)
    if other != app:
        raise UserError(
            f"{path}: is a configuration of the app '{other}', not of '{app}'. "
            f"Start it with: python -m lightning_apps.{other} fit --config {path.name}"
        )
    return content
