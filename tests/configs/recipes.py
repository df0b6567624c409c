"""The shipped configurations as plain values."""

from typing import Any

import yaml

from lightning_apps.config_files import SHIPPED, shipped_names


def read(name: str) -> dict[str, Any]:
    """Content of ``<name>.yaml``."""
    return yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())


def arguments(name: str, part: str = "model") -> dict[str, Any]:
    """Arguments of the ``model`` or the ``data`` of a configuration."""
    return read(name)[part]["init_args"]


def recipes(app: str, model: str | None = None) -> list[str]:
    """Names of an app's configurations, or of those with this class as model."""
    names = [name.removesuffix(".yaml") for name in shipped_names(app)]
    return [name for name in names if model is None or read(name)["model"].get("class_path") == model]
