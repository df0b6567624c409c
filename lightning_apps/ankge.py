"""AnKGE: embeddings of knowledge graphs, and analogical inference on top of them."""

import inspect
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks import AnalogyRetriever, CompletionWriter, FrozenParameters, RankReport
from datamodules import KnowledgeGraph
from lightning_apps.app import App
from lightning_apps.cli import AppCLI, main
from lightning_apps.config_files import find_config
from lightning_apps.errors import UserError
from lightning_apps.loggers import finish_wandb

CONFIGURATIONS = (".yaml", ".yml")
BASE_FOLDER, BEST = "base", "checkpoints/best.ckpt"
# What the base model's configuration says itself of its data and its trainer; the rest is that of the whole run.
OF_NEGATIVES = ("negatives", "num_negatives", "chunk_size", "use_weight")  # which AnKGE has no use for
OWN_DATA = ("objective", "batch_size", "eval_batch_size", *OF_NEGATIVES)
SHARED_TRAINER = ("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "fast_dev_run")
SHARED_TRAINER += ("deterministic", "benchmark", "detect_anomaly")
SHARED_TRAINER += ("enable_progress_bar", "enable_model_summary", "limit_train_batches", "limit_val_batches")


def train_base(cli: AppCLI) -> None:
    """Where `model.init_args.base` names a configuration, train that on the same data, in the folder `base` of the run.

    Its best checkpoint is the base then. A checkpoint of AnKGE needs no base, as its score function is its own.

    Raises:
        UserError: If the base model cannot be had so, or settings contradict each other.
    """
    from modules.knowledge_graph import check_precision

    check_precision(cli.config[cli.subcommand].trainer.get("precision"))
    options = cli.config[cli.subcommand].model.get("init_args", {})
    data = cli.config[cli.subcommand].data.get("init_args", {})
    if options.get("adaptive_weights") and not data.get("query_counts", True) and cli.subcommand != "export":
        raise UserError(
            "--data.query_counts false: AnKGE weighs its scores by these counts; set --data.query_counts true, or "
            "--model.adaptive_weights false"
        )
    if "base" not in options:
        return
    if cli.checkpoint is not None:
        _take_scoring(cli, options)
    if cli.subcommand != "fit":
        return
    if cli.inner_folder is not None:
        raise UserError(
            "--model.base: names a configuration of AnKGE itself; give that of a base model, such as "
            "ankge/transe_world.yaml, or a checkpoint of one"
        )
    if cli.checkpoint is None:
        options.base = _base_checkpoint(cli, options.base)
        _check_scoring(cli, options.base)


def _take_scoring(cli: AppCLI, options: Any) -> None:
    """Let the checkpoint say which score function it has, where its settings leave that to the base."""
    if options.get("scoring") is None:
        options.scoring = cli.checkpoint.hyper_parameters.get("scoring")
        if settings := (cli.checkpoint.config.get("model") or {}).get("init_args"):
            settings["scoring"] = options.scoring


def _check_scoring(cli: AppCLI, base: str) -> None:
    from modules.ankge import scoring_of
    from modules.knowledge_graph import build_scoring

    trained, given = scoring_of(base), cli.plain_config()["model"]["init_args"].get("scoring")
    if given is not None and build_scoring(given).describe() != trained:
        raise UserError(f"base {base}: was trained with {trained}, but --model.scoring is {given}; leave that out")


def _base_checkpoint(cli: AppCLI, base: str | None) -> str:
    if not base:
        raise UserError("--model.base: is not set; give the configuration of a base model, or a checkpoint of one")
    if base.endswith(CONFIGURATIONS):
        return _fit_base(cli, base)
    return str(Path(base) / BEST) if Path(base).is_dir() else base


def _fit_base(cli: AppCLI, name: str) -> str:
    try:
        find_config(name, cli.app.name)
    except UserError as error:
        raise UserError(str(error).replace("--config", "--model.base", 1)) from error
    config = cli.plain_config()
    _check_settings(config, name)
    data = {key: value for key, value in config["data"].get("init_args", {}).items() if key not in OWN_DATA}
    shared = {key: config["trainer"][key] for key in SHARED_TRAINER if config["trainer"].get(key) is not None}
    layer: dict[str, Any] = {
        "seed_everything": config["seed_everything"],
        "data": {"class_path": config["data"]["class_path"], "init_args": data},
        "trainer": shared,
    }
    folder = cli.run_folder.path / BASE_FOLDER
    rank_zero_info(f"AnKGE: trains the base model of {name} first, in {folder}")
    with TemporaryDirectory() as temporary:
        settings = Path(temporary, "settings_of_the_run.yaml")
        settings.write_text(yaml.safe_dump(layer), encoding="utf-8")
        AppCLI(cli.app, ["fit", "--config", name, "--config", str(settings)], folder=folder)
    finish_wandb()
    cli._set_seed()  # as in a run that is given this checkpoint
    best = folder / BEST
    if not best.is_file():
        raise UserError(
            f"{name}: the base model left no {best}; its configuration needs callbacks.checkpoint, or validation "
            "never ran"
        )
    return str(best)


def _check_settings(config: dict[str, Any], name: str) -> None:
    """Refuse what would leave no base model, and settings of its training, which only its own configuration has."""
    trainer, data = config["trainer"], config["data"].get("init_args", {})
    if trainer.get("fast_dev_run"):
        raise UserError("--trainer.fast_dev_run leaves no base model; set --model.base to a checkpoint of one")
    if trainer.get("limit_val_batches") == 0:
        raise UserError(
            "--trainer.limit_val_batches 0: the best checkpoint of the base model is chosen by validation; leave that "
            "on, or set --model.base to a checkpoint"
        )
    defaults = inspect.signature(KnowledgeGraph.__init__).parameters
    for key in OF_NEGATIVES:
        if key in data and data[key] != defaults[key].default:
            raise UserError(
                f"--data.{key} {data[key]}: is for the base model, which is trained as {name} says; put it into a YAML "
                "of your own and give that as --model.base"
            )


APP = App(
    name="ankge",
    summary="AnKGE (AAAI 2023): knowledge-graph embeddings, and analogical inference on top of them",
    model=LightningModule,
    data=KnowledgeGraph,
    callbacks={
        "retriever": AnalogyRetriever,
        "frozen": FrozenParameters,
        "ranks": RankReport,
        "completions": CompletionWriter,
    },
    writers={"completions": KnowledgeGraph},
    facts=("num_entities", "num_relations", "graph_hash", "train_hash"),
    identity=("graph_hash", "train_hash"),
    before=train_base,
    export_reads_data=True,
)

if __name__ == "__main__":
    sys.exit(main(APP))
