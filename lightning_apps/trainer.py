"""Lightning's Trainer with further commands: `export`, `features`, `allocate` and `sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_apps.checkpoints import read_checkpoint
from lightning_apps.embedding_export import check_embedding_formats, check_network_formats, export_embeddings
from lightning_apps.errors import UserError
from lightning_apps.exporting import check_quantized_formats, export_network


class FeatureExtraction(LightningModule):
    """Predict the features of a module instead of its answers.

    Args:
        module: Anything with `extract_features(images) -> (B, D)`.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Features (B, D) of a batch, with labels and row numbers (B,)."""
        return {"features": self.module.extract_features(batch.images), "labels": batch.labels, "index": batch.index}


def load_weights(
    trainer: Trainer, model: LightningModule, ckpt_path: str | None, weights_only: bool | None = None
) -> None:
    """Load the weights of a checkpoint, as Lightning does before it evaluates.

    Callbacks that add parameters add them first.

    Raises:
        UserError: No checkpoint was given, or it does not fit the model.
    """
    if ckpt_path is None:
        raise UserError("this command needs trained weights: give --ckpt_path FILE, last or best")
    checkpoint = read_checkpoint(Path(ckpt_path), weights_only is not False)
    for callback in trainer.callbacks:
        if getattr(callback, "adds_parameters", False):
            callback.setup(trainer, model, "predict")
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"--ckpt_path {ckpt_path}: does not fit {type(model).__name__}: {error}") from error


def pictures(datamodule: LightningDataModule | None, count: int) -> Tensor:
    """Some pictures as evaluation sees them: training images where the data offers these, otherwise validation images.

    Args:
        datamodule: The data.
        count: How many; all where there are fewer.

    Returns:
        (N, C, H, W).

    Raises:
        UserError: No data, or a count below 1.
    """
    if count < 1:
        raise UserError(f"--calibration_images: {count}, expected at least 1")
    if datamodule is None:
        raise UserError("--formats int8: needs pictures to calibrate with: give the data, --data.path FOLDER")
    datamodule.prepare_data()
    if hasattr(datamodule, "calibration_dataloader"):
        loader = datamodule.calibration_dataloader(count)
    else:
        datamodule.setup("validate")
        loader = datamodule.val_dataloader()
    batches: list[Tensor] = []
    for batch in loader:
        batches.append(batch.images)
        if sum(map(len, batches)) >= count:
            break
    if not batches:
        raise UserError("--formats int8: the data holds no pictures to calibrate with")
    return torch.cat(batches)[:count]


class AppTrainer(Trainer):
    """Lightning's Trainer, with defaults of the suite and further commands.

    Args:
        logger: None or true for W&B beside `metrics.csv`, false for none, `wandb`, `csv`, `tensorboard` or a list of
            these, or Lightning loggers by class path.
        use_distributed_sampler: The suite's own samplers split the data over processes, so this is off.
        kwargs: Everything else that Lightning's Trainer takes.
    """

    def __init__(
        self,
        logger: bool | Logger | Sequence[Logger] | list[str] | str | None = None,
        use_distributed_sampler: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(logger=logger, use_distributed_sampler=use_distributed_sampler, **kwargs)

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        output: str | None = None,
        formats: list[Literal["onnx", "safetensors", "pt2", "int8", "packed", "npz", "parquet"]] | None = None,
        opset: int = 18,
        tolerance: float = 1e-4,
        calibration_images: int = 128,
        int8_containers: Literal["auto", "int8", "uint8"] = "auto",
        input_size: list[int] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Path]:
        """Write the deployable network as ONNX or a torch.export program, checked against torch, and as safetensors.

        A network with quantizers is written with its quantized weights, and can be written in their bits, and for int8
        kernels. Embeddings of a graph are written as tables with the names of their rows.

        Args:
            model: A module with `deployable_network()`, or with `embedding_tables()`.
            datamodule: Only used for `int8` and for the names of embeddings: what the data said of itself is in the
                checkpoint.
            ckpt_path: Checkpoint with the weights.
            output: Folder to write to; by default `export/` of the run.
            formats: What to write: `onnx`, `safetensors`, `pt2` (torch.export), and of quantized networks `packed`
                (safetensors with each weight in its bits) and `int8` (ONNX for integer kernels, 8 bits for each weight
                of 2..8 bits); by default the first two. Of embeddings `npz`, `parquet` and `safetensors`; by default
                `npz` and `safetensors`.
            opset: ONNX operator set.
            tolerance: Largest allowed difference between written and original outputs, relative to the largest output;
                of `int8` the agreement is told instead.
            calibration_images: How many pictures of the data `int8` is calibrated with.
            int8_containers: Of 8-bit weights in `int8`: signed ones are exact, and fast, on processors with VNNI or of
                ARM, unsigned ones are exact everywhere; `auto` asks the processor of this machine.
            input_size: Height and width in pixels that `onnx` and `pt2` take; by default squares of the data's
                `image_size`.
            weights_only: False to load a checkpoint that holds more than tensors and plain values.

        Returns:
            The file of each format.

        Raises:
            UserError: The module cannot be exported, a format is not for such a module, a package is missing, the
                outputs differ, or the network has no bits for `int8` and `packed`.
        """
        folder, facts = Path(output or self.default_root_dir), getattr(self, "export_facts", {})
        if hasattr(model, "embedding_tables"):
            check_embedding_formats(model, formats or ())
            if input_size is not None:
                raise UserError(f"--input_size {input_size}: {type(model).__name__} takes no pictures; leave it out")
            load_weights(self, model, ckpt_path, weights_only)
            return export_embeddings(model, datamodule, facts, folder, formats)
        if not hasattr(model, "deployable_network"):
            raise UserError(f"{type(model).__name__} offers no deployable_network() to export")
        formats = formats or ["onnx", "safetensors"]
        check_network_formats(model, formats)
        load_weights(self, model, ckpt_path, weights_only)
        network = model.deployable_network()
        check_quantized_formats(network, formats)
        return export_network(
            network,
            facts,
            folder,
            formats=formats,
            opset=opset,
            tolerance=tolerance,
            images=pictures(datamodule, calibration_images) if "int8" in formats else None,
            containers=int8_containers,
            input_size=input_size,
        )

    def features(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        output: str | None = None,
        format: Literal["npz", "parquet"] = "npz",
        splits: list[Literal["train", "val", "test"]] | None = None,
        weights_only: bool | None = None,
    ) -> list[Path]:
        """Write the features of every sample of the data to npz or parquet files.

        Args:
            model: A module with `extract_features(images)`.
            datamodule: The data.
            ckpt_path: Checkpoint with the weights.
            output: Folder to write to; by default `features/` of the run.
            format: File format.
            splits: Splits to write, one file each; by default all three.
            weights_only: False to load a checkpoint that holds more than tensors and plain values.

        Returns:
            The files.

        Raises:
            UserError: The module has no features, or no checkpoint was given.
        """
        from callbacks import PredictionWriter

        if not hasattr(model, "extract_features"):
            raise UserError(f"{type(model).__name__} has no features of whole images to write")
        folder = Path(output or self.default_root_dir)
        writers = [callback for callback in self.callbacks if isinstance(callback, PredictionWriter)]
        self.callbacks = [callback for callback in self.callbacks if callback not in writers]
        load_weights(self, model, ckpt_path, weights_only)
        extraction = FeatureExtraction(model)
        written = []
        for split in splits or ["train", "val", "test"]:
            datamodule.hparams.predict_split = split
            target = folder / f"{split}.{format}"
            writer = PredictionWriter(output=str(target), format=format)
            self.callbacks.append(writer)
            self.predict(extraction, datamodule=datamodule, return_predictions=False)
            self.callbacks.remove(writer)
            written.append(target)
        return written

    def allocate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        output: str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Path]:
        """Choose bits for a trained network, and write them and a table of its layers; nothing is trained.

        Args:
            model: A module with weights in `ckpt_path` or `init_from`.
            datamodule: The data, for calibration pictures.
            ckpt_path: Checkpoint with the weights.
            output: Folder to write to; by default that of the run.
            weights_only: False to load a checkpoint that holds more than tensors and plain values.

        Returns:
            `bits.yaml` and `layers.csv`.

        Raises:
            UserError: No weights, or no `callbacks.allocation`.
        """
        from lightning_apps.quantization_commands import allocate, start

        start(self, model, datamodule, ckpt_path, weights_only)
        return allocate(self, model, Path(output or self.default_root_dir))

    def sweep(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        budgets: list[float] = (3.0, 4.0, 5.0, 6.0, 8.0),
        output: str | None = None,
        weights_only: bool | None = None,
    ) -> list[Any]:
        """Evaluate a trained network at several sizes, with bits by the score, by controls and uniform ones.

        Weights are rounded to nearest; nothing is trained.

        Args:
            model: A module with weights in `ckpt_path` or `init_from`.
            datamodule: The data; its validation part is evaluated.
            ckpt_path: Checkpoint with the weights.
            budgets: Means of bits over all parameters.
            output: Folder to write `sweep.csv` and `sweep.png` to; by default that of the run.
            weights_only: False to load a checkpoint that holds more than tensors and plain values.

        Returns:
            The rows of `sweep.csv`.

        Raises:
            UserError: No weights, no `callbacks.allocation`, or no `val/main`.
        """
        from lightning_apps.quantization_commands import start, sweep

        start(self, model, datamodule, ckpt_path, weights_only)
        return sweep(self, model, datamodule, budgets, Path(output or self.default_root_dir))
