"""Post-training quantization: rounds the weights of each block so that its output stays what it was."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from callbacks.atomic_files import atomic_bytes
from callbacks.bit_allocation import calibration_batches, network_of
from callbacks.media import Media
from modules.quantization.activation_streams import float_weights
from modules.quantization.attachment import float_weight, input_quantizers, set_bits, weight_quantizers
from modules.quantization.features import images_of
from modules.quantization.quantizers import QuantizedWeight, WeightQuantizer
from modules.quantization.reconstruction import Progress, ReconstructionSettings, UnitResult, reconstruct
from modules.quantization.step_sizes import StepSettings, initial_steps, learn_steps
from modules.quantization.tracing import NetworkTrace, layer_names, trace_network

FOLDER = "reconstruction"
RANGE_IMAGES = 64
PARTS = ("integers", "scale", "zero_point")


class BlockReconstruction(Callback):
    """Learns which way each weight is rounded, block by block, from a few pictures without labels (BRECQ).

    Comes after :class:`callbacks.BitAllocation`, whose quantizers it fills; these need ``weight_scale: fixed``. It runs
    once, at the start of the first epoch in which there are bits. Each finished block is kept in a folder, so that a
    run that was interrupted and is started anew with this folder goes on with the next block.

    Args:
        network: attribute path of the network in the module.
        steps: of the optimizer for each block; 20,000 in the paper.
        learning_rate: of Adam on the roundings; 1e-3 in the paper, too small for a few hundred steps.
        batch_size: pictures in a step.
        regulariser: weight lambda of the push towards integers; 0.01, and 0.1 for MobileNetV2.
        symmetric: signed integers without zero points, as fast integer kernels need them; false for BRECQ's.
        nearest: names of layers that are rounded to nearest (BRECQ: the first one).
        activation_steps: of the optimizer that learns the ranges of inputs after the weights; 5,000 in the paper.
            With 0 they are the extremes that training batches show.
        pictures: how many calibration pictures, over all processes.
        cache: type in which activations are kept: float32, or float16 for half the memory.
        folder: for finished blocks; null for ``reconstruction`` in the run's folder.
        seed: of the batches.

    Raises:
        ValueError: for fewer pictures than a batch, for quantizers that take their scale from the weights, and where
            :func:`modules.quantization.reconstruction.reconstruct` does.

    Source: Li et al., BRECQ (2021); Nagel et al., AdaRound (2020).
    """

    def __init__(
        self,
        network: str = "network",
        steps: int = 300,
        learning_rate: float = 3e-2,
        batch_size: int = 32,
        regulariser: float = 0.1,
        symmetric: bool = True,
        nearest: list[str] = (),
        activation_steps: int = 0,
        pictures: int = 256,
        cache: str = "float32",
        folder: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.pictures, self.folder = network, pictures, folder
        self.settings = ReconstructionSettings(
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            regulariser=regulariser,
            symmetric=symmetric,
            nearest=tuple(nearest),
            cache=cache,
            seed=seed,
        )
        self.steps = StepSettings(steps=activation_steps, batch_size=batch_size, cache=cache, seed=seed)
        if pictures < batch_size:
            raise ValueError(f"pictures: {pictures} calibration pictures are fewer than batch_size: {batch_size}")
        self.done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before training that there are quantizers to fill."""
        if stage == "fit":
            _check_quantizers(weight_quantizers(network_of(pl_module, self.network)), self.network)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reconstruct, once, as soon as there are bits."""
        bits = {name: one.width for name, one in weight_quantizers(network_of(pl_module, self.network)).items()}
        if not self.done and any(bits.values()):
            self.run(trainer, pl_module)

    def run(self, trainer: Trainer, pl_module: LightningModule) -> list[UnitResult]:
        """Round the weights of the network to the bits that its quantizers have; on all processes.

        Returns:
            The blocks that were reconstructed now, not those found in the folder.
        """
        network = network_of(pl_module, self.network)
        quantizers = weight_quantizers(network)
        _check_quantizers(quantizers, self.network)
        images = torch.cat([images_of(batch) for batch in calibration_batches(trainer, pl_module, self.pictures)])
        bits = {name: one.width for name, one in quantizers.items() if one.width}
        inputs = {name: one.width for name, one in input_quantizers(network).items() if one.width}
        files = _FinishedUnits(
            Path(self.folder or Path(trainer.default_root_dir) / FOLDER),
            _fingerprint(network, bits, self.settings, self.pictures),
            trainer.is_global_zero and not trainer.fast_dev_run,
        )
        found: list[UnitResult] = []

        def keep(result: UnitResult) -> None:
            found.append(result)
            files.write(result)

        with _passive(network), _bar(trainer) as show:
            others = [name for name in layer_names(network) if name not in quantizers]
            trace = trace_network(network, images[:2], others)
            before = float_weights(network, trace) if self.steps.steps else {}
            weights = reconstruct(network, trace, images, bits, self.settings, show, files.read(), keep)
            if self.steps.steps:
                self._learn_ranges(network, trace, images, inputs, before, show)
        for name, weight in weights.items():
            quantizers[name].set_scale(weight.scale, weight.zero_point, signed=self.settings.symmetric)
        self.done = True
        self._report(trainer, found)
        return found

    def _learn_ranges(
        self,
        network: nn.Module,
        trace: NetworkTrace,
        images: Tensor,
        bits: dict[str, int],
        before: dict[str, Tensor],
        show: Callable[[Progress], None] | None,
    ) -> None:
        steps = initial_steps(network, trace, images[:RANGE_IMAGES], bits)
        learn_steps(network, trace, images, steps, before, self.steps, show)
        quantizers = input_quantizers(network)
        for name, step in steps.items():
            quantizers[name].set_range(*step.range())

    def state_dict(self) -> dict[str, Any]:
        """Whether the weights are rounded already; the rounded ones are those of the module."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do not round again."""
        self.done = state_dict["done"]

    def _report(self, trainer: Trainer, found: list[UnitResult]) -> None:
        measured = [result for result in found if result.error is not None and result.nearest_error is not None]
        rank_zero_info(f"{len(found)} blocks reconstructed with {self.pictures} pictures")
        rows = [[result.name, result.steps, result.nearest_error, result.error] for result in measured]
        Media(trainer).table("quantization/blocks", ["block", "steps", "error rounded to nearest", "error"], rows)


class _FinishedUnits:
    """Weights of finished blocks, a file each, of one network with one set of bits and settings."""

    def __init__(self, folder: Path, fingerprint: str, writes: bool) -> None:
        self.folder, self.fingerprint, self.writes = folder, fingerprint, writes

    def write(self, result: UnitResult) -> None:
        """Keep a block."""
        if not self.writes:
            return
        tensors = {
            f"{name}.{part}": getattr(weight, part).contiguous().cpu()
            for name, weight in result.weights.items()
            for part in PARTS
        }
        bits = {name: weight.bits for name, weight in result.weights.items()}
        metadata = {"unit": result.name, "fingerprint": self.fingerprint, "bits": json.dumps(bits)}
        atomic_bytes(self.folder / f"{result.name or 'network'}.safetensors", save(tensors, metadata))

    def read(self) -> dict[str, dict[str, QuantizedWeight]]:
        """All blocks in the folder.

        Raises:
            ValueError: for a file that cannot be read, or that is of another network, other bits or other settings.
        """
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    metadata, names = file.metadata(), list(file.keys())
                    tensors = dict(zip(names, map(file.get_tensor, names), strict=True))
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: cannot be read ({error}); delete it to reconstruct this block anew"
                ) from error
            if (metadata or {}).get("fingerprint") != self.fingerprint:
                raise ValueError(
                    f"{path}: is a block of another network, other bits or other settings; give another folder, or "
                    "delete it to start anew"
                )
            bits = json.loads(metadata["bits"])
            found[metadata["unit"]] = {
                name: QuantizedWeight(*(tensors[f"{name}.{part}"] for part in PARTS), number)
                for name, number in bits.items()
            }
        return found


@contextmanager
def _passive(network: nn.Module) -> Iterator[None]:
    """Let everything pass the quantizers of a network, and give them their bits back."""
    weights = {name: one.width for name, one in weight_quantizers(network).items()}
    inputs = {name: one.width for name, one in input_quantizers(network).items()}
    set_bits(network, dict.fromkeys(weights, 0), dict.fromkeys(inputs, 0))
    try:
        yield
    finally:
        set_bits(network, weights, inputs)


@contextmanager
def _bar(trainer: Trainer) -> Iterator[Callable[[Progress], None] | None]:
    """A progress bar over the blocks, where the trainer has one."""
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="reconstruction", unit="step") as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.units * progress.steps
            bar.set_postfix_str(f"{progress.unit} ({progress.index + 1}/{progress.units}), error {progress.error:.3g}")
            bar.n = progress.index * progress.steps + progress.step
            bar.refresh()

        yield show


def _check_quantizers(quantizers: dict[str, WeightQuantizer], path: str) -> None:
    if not quantizers:
        raise ValueError(f"network: there are no quantizers on {path!r} to fill: put a BitAllocation before this")
    if kept := [name for name, one in quantizers.items() if one.kind == "max"]:
        raise ValueError(
            f"{len(kept)} layers take their scale from the weight: set weight_scale of the allocation to fixed"
        )


def _fingerprint(network: nn.Module, bits: dict[str, int], settings: ReconstructionSettings, pictures: int) -> str:
    digest = hashlib.sha256(json.dumps([bits, asdict(settings), pictures], sort_keys=True, default=str).encode())
    for name in bits:
        digest.update(float_weight(network.get_submodule(name)).detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
