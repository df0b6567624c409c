"""The commands `allocate` and `sweep`: choose bits for a trained network, and see what budgets and scores are worth."""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from callbacks import BitAllocation
from callbacks.atomic_files import atomic_bytes, atomic_text
from callbacks.bit_allocation import Measured, layer_table, network_of
from lightning_apps.errors import UserError
from modules.quantization.allocation import Allocation
from modules.quantization.attachment import input_quantizers, set_bits, weight_quantizers
from modules.quantization.costs import size_mib
from modules.quantization.features import images_of
from modules.quantization.scores import Equal, Random
from modules.quantization.tracing import evaluating

COLUMNS = ("method", "mean bits", "size MiB", "BOPs G", "main")
METHOD = "method"


class Row(NamedTuple):
    """One point of a sweep.

    Args:
        method: `method`, a control, or `float`.
        mean_bits: of the budget.
        size: MiB.
        bops: 10^9 bit operations per picture.
        main: the module's main metric on the validation part.
    """

    method: str
    mean_bits: float
    size: float
    bops: float
    main: float


def start(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    ckpt_path: str | None,
    weights_only: bool | None = None,
) -> None:
    """Give a module its weights, in float, and a trainer its data, without training.

    Args:
        trainer: Whose `BitAllocation` attaches the quantizers.
        model: The module.
        datamodule: The data.
        ckpt_path: Checkpoint with the weights; None where the module has `init_from`.
        weights_only: False to load a checkpoint that holds more than tensors and plain values.

    Raises:
        UserError: Neither a checkpoint nor `init_from`, or no `BitAllocation`.
    """
    from lightning_apps.trainer import load_weights

    callback = allocation_callback(trainer)
    if trainer.world_size > 1:
        raise UserError("this command runs in one process: set --trainer.devices 1")
    callback.setup(trainer, model, "predict")
    if ckpt_path is not None:
        load_weights(trainer, model, ckpt_path, weights_only)
    elif getattr(model.hparams, "init_from", None):
        model.load_pretrained()
    else:
        raise UserError("this command needs trained weights: give --ckpt_path FILE, last or best, or --model.init_from")
    for path in callback.networks:  # weights of a run that quantized come with its bits
        network = network_of(model, path)
        set_bits(network, dict.fromkeys(weight_quantizers(network), 0), dict.fromkeys(input_quantizers(network), 0))
    trainer.strategy.connect(model)
    trainer._data_connector.attach_datamodule(model, datamodule)
    datamodule.prepare_data()
    datamodule.setup("fit")
    model.to(trainer.strategy.root_device)


def allocate(trainer: Trainer, model: LightningModule, folder: Path) -> dict[str, Path]:
    """Choose bits for a network with weights, and write them with a table of layers.

    Args:
        trainer: with a `BitAllocation`, and the data attached.
        model: with weights.
        folder: where to write `bits.yaml` and `layers.csv`.

    Returns:
        The files.
    """
    callback = allocation_callback(trainer)
    measured = callback.measure(trainer, model)
    values = callback.score_values(measured, callback.score)
    allocation = callback.choose(measured, values)
    controls = {
        name: callback.choose(measured, callback.score_values(measured, score))
        for name, score in (("equal", Equal()), ("random", Random(callback.seed)))
    }
    written = {"bits": folder / "bits.yaml", "layers": folder / "layers.csv"}
    allocation.save(written["bits"])
    _write_csv(written["layers"], *layer_table(measured, allocation, values, controls))
    print(allocation.summary())
    for path in written.values():
        print(f"wrote {path}")
    return written


def sweep(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule, budgets: Sequence[float], folder: Path
) -> list[Row]:
    """Evaluate the network, rounded to nearest, at several budgets with bits by the score, by controls and uniform.

    Args:
        trainer: with a `BitAllocation`, and the data attached.
        model: with weights.
        datamodule: the data, whose validation part is used.
        budgets: means of bits over all parameters.
        folder: where to write `sweep.csv` and `sweep.png`.

    Returns:
        A row for the float network, and rows for each budget and method.
    """
    callback = allocation_callback(trainer)
    measured = callback.measure(trainer, model)
    scores = {METHOD: callback.score, "equal": Equal(), "random": Random(callback.seed)}
    values = {name: callback.score_values(measured, score) for name, score in scores.items()}
    rows = [Row("float", 32, size_mib(measured.costs), float("nan"), _main(trainer, model, datamodule))]
    print(_line(rows[-1]))
    for budget in sorted(budgets):
        choices = dict(_choices(callback, measured, values, budget))
        for name, allocation in choices.items():
            callback.apply(model, allocation)
            calibrate(model, callback, measured)
            size, operations = allocation.size, allocation.bops
            rows.append(Row(name, budget, size, operations, _main(trainer, model, datamodule)))
            print(_line(rows[-1]))
            _write_csv(folder / "sweep.csv", COLUMNS, rows)
    atomic_bytes(folder / "sweep.png", _picture(rows))
    print(f"wrote {folder / 'sweep.csv'}\nwrote {folder / 'sweep.png'}")
    return rows


def allocation_callback(trainer: Trainer) -> BitAllocation:
    """The trainer's callback that chooses bits.

    Raises:
        UserError: There is none.
    """
    found = [callback for callback in trainer.callbacks if isinstance(callback, BitAllocation)]
    if not found:
        raise UserError("this command needs callbacks.allocation: give a configuration with a callbacks.BitAllocation")
    return found[0]


@torch.no_grad()
def calibrate(model: LightningModule, callback: BitAllocation, measured: Measured) -> None:
    """Take the ranges of inputs from the calibration batches."""
    network = network_of(model, callback.networks[0])
    quantizers = input_quantizers(network).values()
    if not any(quantizer.width for quantizer in quantizers):
        return
    with evaluating(network), _observing(quantizers):
        for batch in measured.batches:
            network(images_of(batch))
    state = {name: quantizer.state_dict() for name, quantizer in input_quantizers(network).items()}
    for path in callback.networks[1:]:
        for name, quantizer in input_quantizers(network_of(model, path)).items():
            quantizer.load_state_dict(state[name])


@contextmanager
def _observing(quantizers: Any) -> Iterator[None]:
    for quantizer in quantizers:
        quantizer.batches.zero_()
        quantizer.train()
    yield
    for quantizer in quantizers:
        quantizer.eval()


def _choices(
    callback: BitAllocation, measured: Measured, values: dict[str, Any], budget: float
) -> Iterator[tuple[str, Allocation]]:
    for name, own in values.items():
        yield name, callback.choose(measured, own, budget)
    if budget == int(budget):
        yield "uniform", callback.uniform(measured, int(budget))


def _main(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule) -> float:
    results = trainer.validate(model, datamodule=datamodule, verbose=False)[0]
    if "val/main" not in results:
        raise UserError(
            f"{type(model).__name__} logs no val/main to compare by, only {', '.join(results) or 'nothing'}"
        )
    return results["val/main"]


def _line(row: Row) -> str:
    return f"{row.method:>8}  {row.mean_bits:5.2f} bits  {row.size:8.3f} MiB  {row.bops:9.3f} GBOPs  {row.main:.4f}"


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(columns), *rows])
    atomic_text(path, text.getvalue())


def _picture(rows: list[Row]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for method in dict.fromkeys(row.method for row in rows if row.method != "float"):
        own = sorted((row.size, row.main) for row in rows if row.method == method)
        axis.plot(*zip(*own, strict=True), marker="o", label=method)
    axis.axhline(rows[0].main, color="grey", linestyle=":", label="float")
    axis.set_xlabel("size in MiB")
    axis.set_ylabel("main metric")
    axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()
