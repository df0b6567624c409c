"""What an app is: which module meets which datamodule, and which callbacks have a named place in its configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule


@dataclass(frozen=True)
class App:
    """One front door of the suite.

    Args:
        name: Name of the app: of its command, of its default configuration and of its folder of runs.
        summary: One line for `python -m lightning_apps`.
        model: Base class of the models the app accepts; the configuration's `class_path` chooses one.
        data: Base class of the datamodules the app accepts.
        callbacks: Named callbacks, configurable as `callbacks.<name>` in YAML and on the command line.
        writers: Named callbacks that write predictions, and the datamodules that `predict` uses each of them for unless
            the configuration names a writer; other data gets a table of predictions.
        facts: Properties of the datamodule handed to model arguments of the same name.
        identity: Facts that say what the weights stand for: a checkpoint of data with others is refused, even where its
            weights would fit.
        subcommands: Names of trainer methods that are commands of this app, besides the ones all apps have.
        requires: Importable package -> extra that installs it.
        before: What is done with the command line (`AppCLI`) once its configuration is read and its run folder chosen,
            before anything is built.
        export_reads_data: Whether `export` needs the data itself, beyond the facts that a checkpoint keeps.
    """

    name: str
    summary: str
    model: type[LightningModule]
    data: type[LightningDataModule]
    callbacks: dict[str, type[Callback]] = field(default_factory=dict)
    writers: dict[str, type[LightningDataModule]] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()
    subcommands: tuple[str, ...] = ()
    requires: dict[str, str] = field(default_factory=dict)
    before: Callable[[Any], None] | None = None
    export_reads_data: bool = False

    def missing(self, found: Callable[[str], object | None] = find_spec) -> dict[str, str]:
        """Packages the app needs and this environment lacks, with the extra that installs each."""
        return {package: extra for package, extra in self.requires.items() if found(package) is None}
