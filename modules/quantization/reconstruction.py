"""Block reconstruction (BRECQ): round the weights of each unit so that the unit's output stays what it was."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from modules.quantization.activation_streams import (
    CacheType,
    Segment,
    Streams,
    check_passive,
    float_weights,
    split_network,
)
from modules.quantization.attachment import float_weight
from modules.quantization.quantizers import QuantizedWeight, check_bits
from modules.quantization.rounding import FIRST_TEMPERATURE, LAST_TEMPERATURE, WARM_UP, LearnedRounding, temperature
from modules.quantization.scale_search import EXPONENT, UniformGrid, quantize, search_channel_grid
from modules.quantization.tracing import NetworkTrace, evaluating, some

LOOK_EVERY = 50


@dataclass(frozen=True)
class ReconstructionSettings:
    """How weights are reconstructed; the defaults are the published ones.

    On a CPU, ``steps=300, learning_rate=3e-2, regulariser=0.1`` with 128 to 256 images takes minutes: with so few
    steps, weights need a larger learning rate to reach the other integer, and a stronger push to end at one.

    Args:
        steps: of the optimiser, for each unit.
        batch_size: images in a step.
        learning_rate: of Adam on the roundings.
        regulariser: weight (lambda) of the push towards integers; 0.1 for MobileNetV2.
        warm_up: share of the steps without that push.
        temperatures: its exponent after the warm-up and at the end.
        symmetric: signed integers without zero point, instead of integers from 0 with one.
        include_zero: see :func:`search_channel_grid`.
        exponent: of the error in the search of scales.
        nearest: layers that are only rounded to nearest (BRECQ: the first one).
        stop_undecided: end a unit when at most this share of its weights is between two integers; None for never.
        cache: type in which activations are kept. Memory: three times images x the largest activation between units, in
            this type, and a copy of the float weights.
        cache_device: where they are kept; None for the network's device.
        chunk: images that run through the network at a time outside of the optimisation.
        carry: keep what a unit gives out for the next one; otherwise the network is run from the images to each unit.
        seed: of the batches.
    """

    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    regulariser: float = 0.01
    warm_up: float = WARM_UP
    temperatures: tuple[float, float] = (FIRST_TEMPERATURE, LAST_TEMPERATURE)
    symmetric: bool = False
    include_zero: bool = False
    exponent: float = EXPONENT
    nearest: tuple[str, ...] = ()
    stop_undecided: float | None = None
    cache: CacheType = "float32"
    cache_device: str | None = None
    chunk: int = 64
    carry: bool = True
    seed: int = 0


class Progress(NamedTuple):
    """Where an optimisation is.

    Args:
        unit: name of the unit.
        index: its number, from 0.
        units: how many there are.
        step: 1 to ``steps``.
        steps: of this unit.
        error: of the last batch: sum over channels, mean over places and images.
        penalty: the regulariser without its weight; 0 in the warm-up.
        cache_bytes: memory of the activations that are kept.
    """

    unit: str
    index: int
    units: int
    step: int
    steps: int
    error: float
    penalty: float
    cache_bytes: int


class UnitResult(NamedTuple):
    """A unit that is finished.

    Args:
        name: of the unit, or of a layer of a unit that cannot be run alone; the key to resume with.
        weights: integers of each layer, by name.
        steps: that were taken; 0 where weights were rounded to nearest.
        nearest_error: mean squared distance of its output to that of the float network with nearest rounding; None for
            a layer that cannot be run alone.
        error: the same with the weights found.
    """

    name: str
    weights: dict[str, QuantizedWeight]
    steps: int
    nearest_error: float | None
    error: float | None


def reconstruct(
    network: nn.Module,
    trace: NetworkTrace,
    images: Tensor,
    weight_bits: Mapping[str, int],
    settings: ReconstructionSettings | None = None,
    progress: Callable[[Progress], None] | None = None,
    done: Mapping[str, Mapping[str, QuantizedWeight]] | None = None,
    on_unit: Callable[[UnitResult], None] | None = None,
) -> dict[str, QuantizedWeight]:
    """Quantize weights unit by unit, and overwrite them by what their integers stand for.

    A unit's input comes from the units quantized before, its target from the float network. BatchNorms stay as they
    are, in evaluation mode. Where torch.distributed runs, each process has images of its own and gradients are
    averaged, so that all processes get the same weights.

    Args:
        network: in float, any device; quantizers on it must have 0 bits. Changed in place.
        trace: of it.
        images: (N, ...) calibration images; at least a batch.
        weight_bits: bits by layer; layers without an entry stay in float.
        settings: the published ones if None.
        progress: called every 50 steps and at the end of each unit.
        done: what ``on_unit`` was given in a run that was interrupted, ``{result.name: result.weights}``. The network
            must be the float one again; the outcome is that of an uninterrupted run, bit for bit.
        on_unit: called with each unit that is newly finished.

    Returns:
        Integers, scale and zero point of each layer in ``weight_bits``. A nearest-rounding quantizer with this grid
        leaves the overwritten weights as they are.

    Raises:
        ValueError: for unknown layers, bits outside 2..8, too few images, a weight that is quantized already, or
            finished units of another network.

    Warns:
        UserWarning: for units that cannot be run alone.

    Source: Li et al., BRECQ (2021); specification, section 7.
    """
    settings = settings or ReconstructionSettings()
    done = done or {}
    _check(network, trace, images, weight_bits, settings)
    results: dict[str, QuantizedWeight] = {}
    with evaluating(network), frozen(network):
        segments = split_network(network, trace, images[:2])
        _check_done(done, segments, network, weight_bits)
        streams = Streams(
            network,
            float_weights(network, trace),
            images,
            settings.chunk,
            settings.cache,
            settings.cache_device,
            settings.carry,
        )
        for index, segment in enumerate(segments):
            bits = {name: int(weight_bits[name]) for name in segment.layers if name in weight_bits}

            def report(step: int, error: Tensor, penalty: Tensor, index: int = index) -> None:
                if progress is not None:
                    count, steps = len(segments), settings.steps
                    numbers = float(error), float(penalty), streams.bytes
                    progress(Progress(segments[index].name, index, count, step, steps, *numbers))

            unit = _Unit(network, segment, streams, bits, settings)
            result = unit.finish(done.get(segment.name), report)
            results.update(result.weights)
            if on_unit is not None and segment.name not in done and bits:
                on_unit(result)
    return results


class _Unit:
    """A segment whose turn it is."""

    def __init__(
        self,
        network: nn.Module,
        segment: Segment,
        streams: Streams,
        bits: dict[str, int],
        settings: ReconstructionSettings,
    ) -> None:
        self.segment, self.streams, self.bits, self.settings = segment, streams, bits, settings
        self.layers = {name: network.get_submodule(name) for name in bits}

    def finish(
        self, done: Mapping[str, QuantizedWeight] | None, report: Callable[[int, Tensor, Tensor], None]
    ) -> UnitResult:
        """Find the weights, put them into the network and move on."""
        if not self.segment.alone:
            return self._finish_blindly(done)
        self.streams.enter(self.segment)
        weights, steps, nearest_error = dict(done or {}), 0, None
        if self.bits and not weights:
            grids = self._grids()
            weights = {name: _nearest(self._float(name), grids[name], self.bits[name]) for name in self.bits}
            nearest_error = self.streams.error(self.segment, _dequantized(weights))
            roundings = {
                name: LearnedRounding(self._float(name), grids[name])
                for name in self.bits
                if name not in self.settings.nearest
            }
            if roundings:
                steps = self._learn(roundings, weights, report)
                weights |= {name: rounding.quantized(self.bits[name]) for name, rounding in roundings.items()}
        self._overwrite(weights)
        error = self.streams.leave(self.segment, bool(weights))
        return UnitResult(self.segment.name, weights, steps, nearest_error, error)

    def _finish_blindly(self, done: Mapping[str, QuantizedWeight] | None) -> UnitResult:
        weights = dict(done or {})
        if self.bits and not weights:
            warnings.warn(f"{self.segment.name} cannot be run alone, so its weight is rounded to nearest", stacklevel=4)
            grids = self._grids()
            weights = {name: _nearest(self._float(name), grids[name], self.bits[name]) for name in self.bits}
        self._overwrite(weights)
        self.streams.skip(bool(weights))
        return UnitResult(self.segment.name, weights, 0, None, None)

    def _float(self, name: str) -> Tensor:
        return self.streams.originals_of(name)

    def _grids(self) -> dict[str, UniformGrid]:
        chosen = self.settings
        return {
            name: search_channel_grid(self._float(name), bits, chosen.symmetric, chosen.exponent, chosen.include_zero)
            for name, bits in self.bits.items()
        }

    @torch.no_grad()
    def _overwrite(self, weights: Mapping[str, QuantizedWeight]) -> None:
        for name, weight in weights.items():
            float_weight(self.layers[name]).copy_(weight.dequantized())

    def _learn(
        self,
        roundings: Mapping[str, LearnedRounding],
        nearest: Mapping[str, QuantizedWeight],
        report: Callable[[int, Tensor, Tensor], None],
    ) -> int:
        """Optimise the roundings.

        Returns:
            The number of steps taken.
        """
        chosen = self.settings
        fixed = _dequantized({name: weight for name, weight in nearest.items() if name not in roundings})
        alphas = [rounding.alpha for rounding in roundings.values()]
        optimizer = torch.optim.Adam(alphas, lr=chosen.learning_rate, fused=True)
        for step in range(1, chosen.steps + 1):
            index = batch_indices(len(self.streams.images), chosen.batch_size, chosen.seed, self.segment.name, step)
            inputs, targets = self.streams.batch(index)
            fractions = {name: rounding.fraction() for name, rounding in roundings.items()}
            soft = {name: rounding.soft(fractions[name]) for name, rounding in roundings.items()}
            outputs = self.segment(inputs, fixed | soft)
            error = functional.mse_loss(outputs, targets) * output_channels(self.segment, outputs, self.layers)
            exponent = temperature(step, chosen.steps, chosen.warm_up, *chosen.temperatures)
            penalty = error.new_zeros(())
            if exponent is not None:
                penalty = sum(rounding.regulariser(exponent, fractions[name]) for name, rounding in roundings.items())
            optimizer.zero_grad()
            (error + chosen.regulariser * penalty).backward()
            average_gradients(alphas)
            optimizer.step()
            if step % LOOK_EVERY == 0 or step == chosen.steps:
                report(step, error.detach(), penalty.detach())
                if exponent is not None and self._has_settled(roundings):
                    return step
        return chosen.steps

    def _has_settled(self, roundings: Mapping[str, LearnedRounding]) -> bool:
        if self.settings.stop_undecided is None:
            return False
        undecided = sum(int(rounding.undecided()) for rounding in roundings.values())
        return undecided <= self.settings.stop_undecided * sum(one.alpha.numel() for one in roundings.values())


def batch_indices(count: int, batch_size: int, seed: int, unit: str, step: int) -> Tensor:
    """Which images a step takes, without repetition: a function of seed, process, unit and step.

    Args:
        count: of the images.
        batch_size: at most that many.
        seed: of the run.
        unit: name of the unit.
        step: of the optimisation.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    digest = hashlib.blake2b(f"{seed} {rank} {unit} {step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(count, generator=generator)[:batch_size]


def output_channels(segment: Segment, outputs: Tensor, layers: Mapping[str, nn.Module]) -> int:
    """Channels of a segment's output (B, C, ...) or (B, tokens, C), those of its last layer if they are found there."""
    found = [layer.weight.shape[0] for layer in layers.values()]
    return found[-1] if found[-1] in outputs.shape[1:] else outputs.shape[1]


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean of the gradients over the processes, if there are several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, mean in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
        parameter.grad.copy_(mean.view_as(parameter))


@torch.no_grad()
def _nearest(weight: Tensor, grid: UniformGrid, bits: int) -> QuantizedWeight:
    integers = quantize(weight, grid).to(torch.int16)
    return QuantizedWeight(integers, grid.scale, grid.zero_point.to(torch.int16), bits)


def _dequantized(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    return {name: weight.dequantized() for name, weight in weights.items()}


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No gradients for a network's parameters, for a while."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _check(
    network: nn.Module,
    trace: NetworkTrace,
    images: Tensor,
    weight_bits: Mapping[str, int],
    settings: ReconstructionSettings,
) -> None:
    known = set(trace.names)
    for field, names in (("weight_bits", weight_bits), ("nearest", settings.nearest)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{field}: no layers of this network: {some(unknown)}; it has {some(trace.names)}")
    for name, bits in weight_bits.items():
        check_bits(bits, f"weight_bits: {name}")
    if len(images) < settings.batch_size:
        raise ValueError(f"{len(images)} calibration images are fewer than batch_size: {settings.batch_size}")
    if settings.steps < 1:
        raise ValueError(f"steps: {settings.steps} is below 1")
    check_passive(network, trace.names)


def _check_done(
    done: Mapping[str, Mapping[str, QuantizedWeight]],
    segments: Sequence[Segment],
    network: nn.Module,
    weight_bits: Mapping[str, int],
) -> None:
    expected = {one.name: {name for name in one.layers if name in weight_bits} for one in segments}
    for unit, weights in done.items():
        if set(weights) != expected.get(unit):
            raise ValueError(f"finished unit {unit}: holds {some(sorted(weights))}, expected {expected.get(unit)}")
        for name, weight in weights.items():
            shape = tuple(network.get_submodule(name).weight.shape)
            if (tuple(weight.integers.shape), weight.bits) != (shape, weight_bits[name]):
                raise ValueError(
                    f"finished layer {name}: {tuple(weight.integers.shape)} in {weight.bits} bits, "
                    f"expected {shape} in {weight_bits[name]}"
                )
