"""Learned scales of layers' inputs, unit by unit, once the weights are quantized (the second stage of BRECQ)."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from modules.quantization.activation_streams import CacheType, Segment, Streams, check_passive, split_network
from modules.quantization.quantizers import TINY, round_through
from modules.quantization.reconstruction import (
    LOOK_EVERY,
    Progress,
    average_gradients,
    batch_indices,
    frozen,
    output_channels,
)
from modules.quantization.scale_search import EXPONENT, UniformGrid, search_tensor_grid
from modules.quantization.tracing import NetworkTrace, evaluating, inputs_seen, some

SAMPLES = 2**18


class StepQuantizer(Protocol):
    """What is needed of a quantizer whose scale is to be learned: called with a tensor, it gives the quantized one."""

    scale: nn.Parameter
    zero_point: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Any shape to the same, with a gradient for ``scale``."""
        ...


class LearnedStep(nn.Module):
    """Quantization of a tensor on a grid with one scale, which gets gradients through the rounding (LSQ).

    Args:
        grid: with one scale and zero point.

    Source: Esser et al., LSQ (2020), equation 3, without the scaling of gradients, as BRECQ has it.
    """

    def __init__(self, grid: UniformGrid) -> None:
        super().__init__()
        self.scale = nn.Parameter(grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.detach().clone())
        self.low, self.high = grid.low, grid.high

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape to the same."""
        scale = self.scale.clamp(min=TINY)
        integers = round_through((inputs / scale + self.zero_point).clamp(self.low, self.high))
        return (integers - self.zero_point) * scale

    @torch.no_grad()
    def range(self) -> tuple[float, float]:
        """Least and largest number of the grid, which :meth:`InputQuantizer.set_range` takes."""
        ends = [(end - self.zero_point) * self.scale.clamp(min=TINY) for end in (self.low, self.high)]
        return float(ends[0]), float(ends[1])


@dataclass(frozen=True)
class StepSettings:
    """How scales of inputs are learned; the defaults are the published ones.

    Args:
        steps: of the optimiser, for each unit.
        batch_size: images in a step.
        learning_rate: of Adam, from which it falls to 0 along a cosine.
        exponent: of the distance between outputs.
        cache: see :class:`ReconstructionSettings`, as are the others.
        cache_device: where activations are kept.
        chunk: images at a time.
        seed: of the batches.
    """

    steps: int = 5_000
    batch_size: int = 32
    learning_rate: float = 4e-4
    exponent: float = EXPONENT
    cache: CacheType = "float32"
    cache_device: str | None = None
    chunk: int = 64
    seed: int = 0


class StepResult(NamedTuple):
    """A unit whose scales are learned.

    Args:
        name: of the unit; the key to resume with.
        scales: by layer.
        first_error: mean squared distance of its output to that of the float network with the scales at the beginning.
        error: the same with those learned.
    """

    name: str
    scales: dict[str, Tensor]
    first_error: float
    error: float


@torch.no_grad()
def initial_steps(
    network: nn.Module, trace: NetworkTrace, images: Tensor, bits: Mapping[str, int], samples: int = SAMPLES
) -> dict[str, LearnedStep]:
    """Quantizers of layers' inputs with the best of 80 ranges each.

    Args:
        network: with its weights quantized.
        trace: of it.
        images: (N, ...) in one run; 64 in BRECQ.
        bits: by layer.
        samples: values of an input on which errors are measured; its extremes are those of all values.

    Raises:
        ValueError: for unknown layers or bits outside 2..8.

    Source: specification, section 7 (activation stage).
    """
    if unknown := [name for name in bits if name not in trace.names]:
        raise ValueError(f"bits: no layers of this network: {some(unknown)}; it has {some(trace.names)}")
    found: dict[str, LearnedStep] = {}

    def look(name: str, inputs: Tensor) -> None:
        found[name] = LearnedStep(search_tensor_grid(inputs, bits[name], samples=samples))

    with inputs_seen(network, look, bits):
        network(images)
    return found


def learn_steps(
    network: nn.Module,
    trace: NetworkTrace,
    images: Tensor,
    quantizers: Mapping[str, StepQuantizer],
    float_weights: Mapping[str, Tensor],
    settings: StepSettings | None = None,
    progress: Callable[[Progress], None] | None = None,
    done: Mapping[str, Mapping[str, Tensor]] | None = None,
    on_unit: Callable[[StepResult], None] | None = None,
) -> None:
    """Learn the scales of layers' inputs so that each unit's output stays what it is in the float network.

    Inputs and targets of a unit are those of the float network.

    Args:
        network: with its weights overwritten by quantized ones, which stay; quantizers on it must have 0 bits.
        trace: of it.
        images: (N, ...) calibration images; at least a batch.
        quantizers: by layer; changed in place.
        float_weights: of all layers of the trace, before quantization.
        settings: the published ones if None.
        progress: as in :func:`reconstruct`.
        done: ``{result.name: result.scales}`` of a run that was interrupted.
        on_unit: called with each unit that is newly finished.

    Raises:
        ValueError: for unknown layers, too few images, or quantizers at work.

    Warns:
        UserWarning: for layers that cannot be run alone, whose scales stay.

    Source: Li et al., BRECQ (2021); specification, section 7.
    """
    settings, done = settings or StepSettings(), done or {}
    if unknown := [name for name in quantizers if name not in trace.names]:
        raise ValueError(f"quantizers: no layers of this network: {some(unknown)}; it has {some(trace.names)}")
    if len(images) < settings.batch_size:
        raise ValueError(f"{len(images)} calibration images are fewer than batch_size: {settings.batch_size}")
    check_passive(network, trace.names)
    with evaluating(network), frozen(network):
        segments = split_network(network, trace, images[:2])
        kept = settings.cache, settings.cache_device
        streams = Streams(network, float_weights, images, settings.chunk, *kept, quantized=False)
        for index, segment in enumerate(segments):
            own = {name: quantizers[name] for name in segment.layers if name in quantizers}
            if not segment.alone:
                if own:
                    warnings.warn(f"{segment.name} cannot be run alone; its input keeps its scale", stacklevel=2)
                streams.skip(changed=False)
                continue
            streams.enter(segment)
            if segment.name in done:
                _set_scales(own, done[segment.name])
            elif own:
                place = (segment.name, index, len(segments))
                result = _learn(network, segment, streams, own, settings, place, progress)
                if on_unit is not None:
                    on_unit(result)
            streams.leave(segment, changed=False)


def _learn(
    network: nn.Module,
    segment: Segment,
    streams: Streams,
    quantizers: Mapping[str, StepQuantizer],
    settings: StepSettings,
    place: tuple[str, int, int],
    progress: Callable[[Progress], None] | None,
) -> StepResult:
    layers = {name: network.get_submodule(name) for name in segment.layers}
    scales = [quantizer.scale for quantizer in quantizers.values()]
    optimizer = torch.optim.Adam(scales, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    with _quantized_inputs({layers[name]: quantizer for name, quantizer in quantizers.items()}):
        first_error = streams.error(segment, {})
        for step in range(1, settings.steps + 1):
            name = f"inputs of {segment.name}"
            index = batch_indices(len(streams.images), settings.batch_size, settings.seed, name, step)
            inputs, targets = streams.batch(index)
            outputs = segment(inputs)
            distance = (outputs - targets).abs().pow(settings.exponent).mean()
            error = distance * output_channels(segment, outputs, layers)
            optimizer.zero_grad()
            error.backward()
            average_gradients(scales)
            optimizer.step()
            schedule.step()
            if progress is not None and (step % LOOK_EVERY == 0 or step == settings.steps):
                progress(Progress(*place, step, settings.steps, float(error.detach()), 0.0, streams.bytes))
        error = streams.error(segment, {})
    found = {name: quantizer.scale.detach().clone() for name, quantizer in quantizers.items()}
    return StepResult(segment.name, found, first_error, error)


@torch.no_grad()
def _set_scales(quantizers: Mapping[str, StepQuantizer], scales: Mapping[str, Tensor]) -> None:
    for name, quantizer in quantizers.items():
        quantizer.scale.copy_(scales[name])


@contextmanager
def _quantized_inputs(quantizers: Mapping[nn.Module, StepQuantizer]) -> Iterator[None]:
    """Quantizers at work on the inputs of layers, for a while."""

    def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (quantizers[layer](arguments[0]), *arguments[1:])

    with ExitStack() as stack:
        for layer in quantizers:
            stack.enter_context(layer.register_forward_pre_hook(hook))
        yield
