"""The one LightningCLI subclass that all apps share."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks import (
    AtomicCheckpointIO,
    ExactResume,
    GracefulStop,
    NonFiniteGuard,
    PictureLogger,
    PredictionWriter,
    StepSeed,
    stop_when_orphaned,
)
from lightning_apps.app import App
from lightning_apps.checkpoints import CheckpointFacts, conflicts, describe_checkpoint
from lightning_apps.config_errors import class_paths_of, explain, init_arguments
from lightning_apps.config_files import SHIPPED, ConfigFile, find_config, read_config
from lightning_apps.errors import UserError, run_reporting_errors
from lightning_apps.loggers import NAMES as LOGGER_NAMES
from lightning_apps.loggers import MetricsFile, choose_loggers, finish_wandb
from lightning_apps.run_folder import (
    ENVIRONMENT,
    RunFolder,
    RunRecorder,
    open_inner_folder,
    open_run_folder,
    resolve_checkpoint,
)
from lightning_apps.trainer import AppTrainer

SHARED_CALLBACKS: dict[str, type[Callback]] = {
    "checkpoint": ModelCheckpoint,
    "early_stopping": EarlyStopping,
    "learning_rate": LearningRateMonitor,
    "pictures": PictureLogger,
    "predictions": PredictionWriter,
}
MISFIT_LINES, MISFIT_WIDTH = 5, 200
_NEED_WEIGHTS = ("predict", "export", "features")
_KEPT_FROM_CHECKPOINT = ("seed_everything", "model", "data", "callbacks", "trainer")


class AppParser(LightningArgumentParser):
    """Parser whose errors name the key, the value and the nearest valid key."""

    class_paths: ClassVar[dict[str, str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Report what is wrong without the hundred lines of usage."""
        if os.environ.get("LIGHTNING_APPS_DEBUG") == "1" and ex is not None:
            raise ex
        raise explain(message, self.known_keys(), self.class_paths) from ex

    def known_keys(self) -> list[str]:
        """All dotted keys of this parser and of its subcommands."""
        keys: list[str] = []
        for action in self._actions:
            keys += [option[2:] for option in action.option_strings if option.startswith("--")]
            if isinstance(getattr(action, "choices", None), dict):
                for parser in action.choices.values():
                    if isinstance(parser, AppParser):
                        keys += parser.known_keys()
        return keys


def split_arguments(arguments: list[str], option: str, short: str | None = None) -> tuple[list[str], list[str]]:
    """Take the values of one option out of a command line.

    Args:
        arguments: The command line.
        option: Its long form, such as `--config`.
        short: Its short form, such as `-c`.

    Returns:
        The values, and the remaining arguments.
    """
    values, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, separator, value = argument.partition("=")
        if name in (option, short):
            value = value if separator else next(remaining, None)
            if value is None:
                raise UserError(f"{option} needs a value")
            values.append(value)
        else:
            rest.append(argument)
    return values, rest


def name_loggers(arguments: list[str]) -> list[str]:
    """Shorten class names of loggers, as the suite gives them their place: `CSVLogger` is `csv`."""
    values, rest = split_arguments(arguments, "--trainer.logger")
    return [*rest, *(part for value in values for part in ("--trainer.logger", LOGGER_NAMES.get(value, value)))]


class AppCLI(LightningCLI):
    """LightningCLI with named callbacks, run folders, configurations by bare name and commands on checkpoints.

    Settings win in this order: command line, a user's own configuration, the checkpoint, a shipped configuration.

    Args:
        app: The app.
        arguments: Command line without the program's name; None for the process' own.
        folder: Run folder of a command that is part of another one; None chooses or makes one.
    """

    def __init__(self, app: App, arguments: list[str] | None = None, folder: Path | None = None) -> None:
        self.app = app
        self.inner_folder = folder
        self.checkpoint: CheckpointFacts | None = None
        self.config_files: list[ConfigFile] = []
        self.shipped_default = ConfigFile(SHIPPED / f"{app.name}.yaml", shipped=True)
        self.given = list(sys.argv[1:] if arguments is None else arguments)
        super().__init__(
            app.model,
            app.data,
            save_config_callback=None,
            trainer_class=AppTrainer,
            seed_everything_default=0,
            parser_class=AppParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"python -m lightning_apps.{app.name}", "description": app.summary},
        )

    # ---- what the command line takes

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # depends on the app
        """Lightning's commands, `export`, and what else the app has."""
        own = {name: {"model", "datamodule"} for name in ("export", *self.app.subcommands)}
        return {**LightningCLI.subcommands(), **own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Named callbacks, the run's name and folder, and the links from the data's facts to the model."""
        parser.add_argument("--app", type=str, default=self.app.name, help="Name of the app a configuration is for.")
        parser.add_argument("--run.root", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument("--run.name", type=str | None, default=None, help="Name of the run; default: the config's.")
        for name, callback in {**SHARED_CALLBACKS, **self.app.callbacks}.items():
            parser.add_argument(
                f"--callbacks.{name}", type=callback | None, default=None, help=f"{callback.__name__}, or null for none"
            )
        for fact in self.app.facts:
            parser.link_arguments(f"data.{fact}", f"model.init_args.{fact}", apply_on="instantiate")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Build in full only the parser of the command that was given: each takes a second."""
        self._full_parser_for = next((word for word in self.given if word in self.subcommands()), None)
        super()._add_subcommands(parser, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._full_parser_for in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    # ---- from the command line to one configuration

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Compose shipped configuration, checkpoint, user's configurations and command line, in this order."""
        arguments = self._compose(self.given) if self._full_parser_for else self.given
        self.config = parser.parse_args(arguments)
        if self.checkpoint is not None:
            self._report_conflicts()

    def _compose(self, arguments: list[str]) -> list[str]:
        position = arguments.index(self._full_parser_for)
        subcommand, rest = arguments[position], arguments[:position] + arguments[position + 1 :]
        names, rest = split_arguments(rest, "--config", "-c")
        self.config_files = [find_config(name, self.app.name) for name in names]
        contents = {file.path: read_config(file.path, self.app.name) for file in self.config_files}
        rest = self._resolve_checkpoint_argument(subcommand, rest, contents)
        rest = name_loggers(rest)
        self._refuse_facts(rest)
        files = list(self.config_files)
        if not (self.checkpoint and self.checkpoint.config) and not any(map(_names_model, contents.values())):
            files.insert(0, self.shipped_default)
        layers = [self._shipped_layer(file, contents) for file in files if file.shipped]
        if self.checkpoint is not None:
            self._check_same_model(files, contents)
            layers.append(json.dumps(self.checkpoint.layer(subcommand)))
        layers += [str(file.path) for file in files if not file.shipped]
        for file in files:
            AppParser.class_paths |= class_paths_of(contents.get(file.path) or read_config(file.path, self.app.name))
        return [subcommand, *(part for layer in layers for part in ("--config", layer)), *rest]

    def _shipped_layer(self, file: ConfigFile, contents: dict[Path, dict[str, Any]]) -> str:
        """The file; or its content for the classes of the checkpoint, where it comes below that and names none."""
        if self.checkpoint is None or any(map(_names_model, contents.values())):
            return str(file.path)
        content = dict(contents.get(file.path, {}))
        for part in ("model", "data"):
            below = (self.checkpoint.config.get(part) or {}).get("class_path")
            if below and isinstance(content.get(part), dict):
                content[part] = {"class_path": below, **content[part]}
        return json.dumps(content) if content else str(file.path)

    def _refuse_facts(self, arguments: list[str]) -> None:
        """Say so where an argument of the model is given that the data decides."""
        for fact in self.app.facts:
            for option in (f"--model.{fact}", f"--model.init_args.{fact}"):
                if split_arguments(arguments, option)[0]:
                    raise UserError(f"{option}: follows from the data and cannot be set; see the settings of --data")

    def _resolve_checkpoint_argument(
        self, subcommand: str, arguments: list[str], contents: dict[Path, dict[str, Any]]
    ) -> list[str]:
        given, rest = split_arguments(arguments, "--ckpt_path")
        value = given[-1] if given else next((c["ckpt_path"] for c in contents.values() if c.get("ckpt_path")), None)
        if value in (None, "null"):
            return arguments
        run: dict[str, Any] = {"root": "runs", "name": None}
        for content in contents.values():
            run |= content.get("run") or {}
        for key in run:
            run[key] = (split_arguments(rest, f"--run.{key}")[0] or [run[key]])[-1]
        path = resolve_checkpoint(value, Path(run["root"]), self.app.name, run["name"])
        opened, _ = split_arguments(rest, "--weights_only")
        weights_only = not (opened and opened[-1].lower() == "false")
        self.checkpoint = describe_checkpoint(path, self.app.name, weights_only)
        return [*rest, "--ckpt_path", str(path)]

    def _check_same_model(self, files: Iterable[ConfigFile], contents: dict[Path, dict[str, Any]]) -> None:
        written = (self.checkpoint.config.get("model") or {}).get("class_path")
        for file in files:
            model = contents.get(file.path, {}).get("model")
            asked = model.get("class_path") if isinstance(model, dict) else None
            if written and asked and asked.rpartition(".")[2] != written.rpartition(".")[2]:
                name = asked.rpartition(".")[2]
                remedy = f" To start {name} from its weights use --model.init_from instead."
                raise UserError(
                    f"--ckpt_path {self.checkpoint.path}: holds a {written}, but {file.path} asks for a {asked}."
                    + (remedy if "init_from" in init_arguments(asked) else "")
                )

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint's settings entered below the explicit ones, instead of silently above them."""

    def _report_conflicts(self) -> None:
        used = self.plain_config()
        before = {key: self.checkpoint.config[key] for key in _KEPT_FROM_CHECKPOINT if key in self.checkpoint.config}
        if self.config.subcommand != "fit":
            before.pop("trainer", None)
        for line in conflicts(before, used):
            rank_zero_info(f"overrides the checkpoint: {line}")
        for file in self.config_files:
            if file.shipped:
                named = {key: value for key, value in read_config(file.path, self.app.name).items() if key in before}
                for line in conflicts(named, used, given="used", kept=file.path.name):
                    rank_zero_info(f"the checkpoint comes before a shipped configuration: {line}")

    def plain_config(self) -> dict[str, Any]:
        """The configuration of the chosen command as plain values, without what the data will fill in."""
        subcommand = self.config.subcommand
        text = self._parser(subcommand).dump(self.config[subcommand], skip_validation=True)
        config = yaml.safe_load(text)
        first = [key for key in ("app", "seed_everything", "model", "data", "callbacks", "trainer") if key in config]
        return {key: config[key] for key in [*first, *(key for key in config if key not in first)]}

    # ---- from the configuration to objects

    def before_instantiate_classes(self) -> None:
        """Fix the run folder, and do what the app does before anything is built."""
        if self.subcommand in _NEED_WEIGHTS and self.checkpoint is None:
            raise UserError(f"{self.subcommand} needs trained weights: give --ckpt_path FILE, last or best")
        config = self.config[self.subcommand]
        self.run_folder = self._open_run_folder(config)
        if self.subcommand == "predict":
            self._describe_data(config.data)
        if self.app.before is not None:
            try:
                self.app.before(self)
            except BaseException:
                self.run_folder.discard_if_empty()
                raise

    def _describe_data(self, data: Any) -> None:
        """Let the checkpoint speak for its data, which may not be here, where other data is predicted."""
        before = (self.checkpoint.config.get("data") or {}).get("class_path")
        options, description = data.get("init_args"), self.checkpoint.data_description
        if options and description and data.class_path == before and options.get("predict_path") is not None:
            options.description = description

    def _open_run_folder(self, config: Any) -> RunFolder:
        if self.inner_folder is not None:
            return open_inner_folder(self.inner_folder, self.app.name, self.subcommand)
        named = [file for file in self.config_files if file.shipped] or self.config_files
        default_name = (named[0].path.stem if named else self.app.name) or self.app.name
        checkpoint = self.checkpoint.path if self.checkpoint else None
        return open_run_folder(
            Path(config.run.root),
            self.app.name,
            config.run.name or default_name,
            self.subcommand,
            checkpoint,
            named=config.run.name is not None,
        )

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; a new run folder in which nothing was written goes away with an error."""
        try:
            known = self.subcommand == "export" and self.checkpoint is not None and self.checkpoint.facts
            known = known and not self.app.export_reads_data
            if known and "int8" not in (self.config.export.formats or []):  # which is calibrated with pictures
                self._instantiate_without_data()
            else:
                super().instantiate_classes()
        except BaseException as error:
            self.run_folder.discard_if_empty()
            original = original_error(error)
            if original is error:
                raise
            raise original from original.__cause__

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; weights that do not fit are told with what the data and the checkpoint say of themselves."""
        if self.checkpoint is not None:
            self._check_identity()
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if self.checkpoint is None or "Error(s) in loading state_dict" not in str(error):
                raise
            raise UserError(self._misfit(str(error))) from error

    def _check_identity(self) -> None:
        used, before = self.facts, self.checkpoint.facts
        if any(name in before and before[name] != used.get(name) for name in self.app.identity):
            raise UserError(
                f"--ckpt_path {self.checkpoint.path}: was trained on other data ({'; '.join(self._other_facts())}), so "
                "its weights stand for other things, or have seen what is held out here; give the data that it was "
                "trained on"
            )

    def _other_facts(self) -> list[str]:
        """Facts of the data that are not those of the checkpoint."""
        return [
            f"{name}: {value} in the checkpoint, {self.facts.get(name)} in the data"
            for name, value in self.checkpoint.facts.items()
            if not isinstance(value, list) and self.facts.get(name) != value
        ]

    def _misfit(self, message: str) -> str:
        differences = self._other_facts()
        told = f"\nIt was trained on other data ({'; '.join(differences)})." if differences else ""
        before, used = self.checkpoint.config.get("model") or {}, self.plain_config().get("model") or {}
        if settings := conflicts(before, used, prefix="model."):
            told += f"\nIt was trained with other settings ({'; '.join(settings)})."
        lines = [line if len(line) <= MISFIT_WIDTH else f"{line[:MISFIT_WIDTH]} ..." for line in message.splitlines()]
        if len(lines) > MISFIT_LINES:
            lines = [*lines[:MISFIT_LINES], f"\tand {len(lines) - MISFIT_LINES} more lines of this kind"]
        message = "\n".join(lines)
        return f"--ckpt_path {self.checkpoint.path}: does not fit {type(self.model).__name__}.{told}\n{message}"

    def _instantiate_without_data(self) -> None:
        config = self.config[self.subcommand]
        arguments = config.model.init_args.as_dict()
        cls = _import_class(config.model.class_path)
        known = init_arguments(config.model.class_path)
        arguments |= {name: value for name, value in self.checkpoint.facts.items() if name in known}
        kept = config.data, config.model
        config.data, config.model = None, None
        self.config_init = self.parser.instantiate_classes(self.config)
        config.data, config.model = kept
        self.datamodule, self.model = None, cls(**arguments)
        self.config_init[self.subcommand].model = self.model
        self.trainer = self.instantiate_trainer()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> AppTrainer:
        config = dict(config)
        output = str(self.run_folder.output)
        config["default_root_dir"] = config.get("default_root_dir") or output
        quiet = (
            config.get("fast_dev_run")
            or config.get("barebones")
            or self.subcommand in ("export", "features", "allocate", "sweep")
        )
        config["logger"] = False if quiet else choose_loggers(config.get("logger"), self.run_folder)
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        config["callbacks"] = sort_callbacks([*self._suite_callbacks(config), *callbacks, *given])
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config["plugins"] = [*plugins, AtomicCheckpointIO()]
        trainer = self.trainer_class(**config)
        trainer.export_facts = self.facts
        return trainer

    @property
    def facts(self) -> dict[str, Any]:
        """What the data says of itself, or what the checkpoint kept of that."""
        if getattr(self, "datamodule", None) is None:
            return self.checkpoint.facts if self.checkpoint else {}
        names = (*self.app.facts, "mean", "std")
        return {name: getattr(self.datamodule, name) for name in names if hasattr(self.datamodule, name)}

    def _suite_callbacks(self, trainer_config: dict[str, Any]) -> list[Callback]:
        named = vars(self._get(self.config_init, "callbacks"))
        slots = {name: callback for name, callback in named.items() if callback is not None}
        if trainer_config.get("enable_checkpointing") is False or trainer_config.get("fast_dev_run"):
            slots.pop("checkpoint", None)
        if not trainer_config.get("logger"):
            slots.pop("learning_rate", None)
        checkpoint = slots.get("checkpoint")
        if checkpoint is not None and checkpoint.dirpath is None:
            checkpoint.dirpath = str(self.run_folder.checkpoints)
        if self.subcommand == "predict" and not slots.keys() & {"predictions", *self.app.writers}:
            slots |= self._default_writer()
        described = getattr(self.datamodule, "description", None)
        recorder = RunRecorder(self.run_folder, self.app.name, self.plain_config(), self.facts, described)
        seed = self.config[self.subcommand].get("seed_everything")
        seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else int(os.environ["PL_GLOBAL_SEED"])
        return [
            recorder,
            ExactResume(),
            StepSeed(seed),
            NonFiniteGuard(),
            ContinueMetrics(),
            *slots.values(),
            GracefulStop(),
        ]

    def _default_writer(self) -> dict[str, Callback]:
        for name, data in self.app.writers.items():
            if isinstance(self.datamodule, data):
                return {name: self.app.callbacks[name]()}
        return {"predictions": PredictionWriter()}


class ContinueMetrics(Callback):
    """Let a resumed run go on with `metrics.csv` from the step of its checkpoint."""

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Drop what was logged after the checkpoint and will be logged again."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.experiment.truncate(trainer.global_step)


def sort_callbacks(callbacks: list[Callback]) -> list[Callback]:
    """Put callbacks that add parameters before those that copy the module, and the one that stops the run last."""

    def rank(callback: Callback) -> int:
        if getattr(callback, "adds_parameters", False):
            return 1
        if isinstance(callback, (RunRecorder, ExactResume, StepSeed, NonFiniteGuard)):
            return 0
        return 3 if isinstance(callback, GracefulStop) else 2

    return sorted(callbacks, key=rank)


def original_error(error: BaseException) -> BaseException:
    """What a class said when it was built, without the parser's account of everything else it tried."""
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__:
        error = error.__cause__
    return error


def _names_model(content: dict[str, Any]) -> bool:
    """Whether a configuration stands alone; one that only changes arguments is added to another."""
    model = content.get("model")
    return "class_path" in model if isinstance(model, dict) else model is not None


def _import_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def main(app: App, arguments: list[str] | None = None) -> int:
    """Run a command of an app.

    Args:
        app: The app.
        arguments: Command line without the program's name; None for the process' own.

    Returns:
        Exit code.
    """
    _silence()
    stop_when_orphaned()
    try:
        return run_reporting_errors(lambda: AppCLI(app, arguments))
    finally:
        finish_wandb()
        os.environ.pop(ENVIRONMENT, None)  # a further command in this process has a folder of its own


def _silence() -> None:
    """Keep advertisements and a deprecation inside Lightning out of the output."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*litlogger.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in str(record.msg)
    )
