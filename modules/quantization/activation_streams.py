"""What enters and leaves each unit of a network for a set of images, in the float and in the quantized network.

Both streams move from unit to unit: what a unit gives out is kept and goes into the next one. Only where a network does
something between two units is it run from the images up to that place.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from modules.quantization.attachment import ORIGINAL, float_weight, input_quantizers, weight_quantizers
from modules.quantization.tracing import NetworkTrace, Unit, some

CacheType = Literal["float32", "float16", "bfloat16"]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Segment:
    """A part of a network that can be run alone: a block, or a layer with the norm and activation behind it.

    Args:
        name: of the block or the layer.
        parts: dotted names of the modules that are called one after the other.
        layers: its layers with weights, in the order they run.
        follows: whether its input is the output of the segment before.
        module: the parts in a row.
        alone: whether running it alone gives what it gives in the network.
    """

    name: str
    parts: tuple[str, ...]
    layers: tuple[str, ...]
    follows: bool
    module: nn.Sequential
    alone: bool = True

    def __call__(self, inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run it.

        Args:
            inputs: (B, ...).
            weights: by layer, in the place of its own.
        """
        if not weights:
            return self.module(inputs)
        return functional_call(self.module, {self._key(layer): value for layer, value in weights.items()}, (inputs,))

    def _key(self, layer: str) -> str:
        index, part = next(
            (index, part) for index, part in enumerate(self.parts) if layer == part or layer.startswith(f"{part}.")
        )
        inner = layer[len(part) + 1 :]
        name = f"{index}.{inner}" if inner else str(index)
        return f"{name}.{weight_name(self.module.get_submodule(name))}"


@torch.no_grad()
def split_network(network: nn.Module, trace: NetworkTrace, images: Tensor) -> list[Segment]:
    """The units of a network as segments; a unit that cannot be run alone becomes one segment for each layer.

    Args:
        network: in float, in evaluation mode.
        trace: of it.
        images: (B, ...), two will do.

    Warns:
        UserWarning: for each unit that is taken layer by layer.
    """
    chosen = {unit.name: _parts(trace, unit) for unit in trace.units}
    layers = {name: _chain(trace, name) for name in trace.names}
    calls = _Calls(network, [*chosen.values(), *layers.values()], images.to(float_weight(_first(network, trace))))
    segments: list[Segment] = []
    for unit in trace.units:
        parts = chosen[unit.name]
        whole = Segment(unit.name, parts, unit.layers, False, _row(network, parts))
        if unit.simple and calls.agrees(whole):
            segments.append(whole)
            continue
        if parts != layers.get(unit.name):
            warnings.warn(
                f"{unit.name} does not map one tensor to one tensor when it runs alone; its {len(unit.layers)} layers "
                "are reconstructed one by one",
                stacklevel=3,
            )
        for name in unit.layers:
            single = Segment(name, layers[name], (name,), False, _row(network, layers[name]))
            alone = calls.agrees(single)
            segments.append(Segment(name, layers[name], (name,), False, single.module, alone))
    return [
        Segment(one.name, one.parts, one.layers, calls.joined(before, one), one.module, one.alone)
        for before, one in zip([None, *segments[:-1]], segments, strict=True)
    ]


def weight_name(layer: nn.Module) -> str:
    """Name of the parameter that holds a layer's float weight."""
    return ORIGINAL if parametrize.is_parametrized(layer, "weight") else "weight"


def check_passive(network: nn.Module, names: Sequence[str]) -> None:
    """Raise a ValueError if a quantizer on any layer, or another parametrization of these, changes anything yet."""
    found = (*weight_quantizers(network).items(), *input_quantizers(network).items())
    active = [name for name, quantizer in found if quantizer.width]
    layers = {name: network.get_submodule(name) for name in names}
    active += [name for name, layer in layers.items() if not torch.equal(layer.weight, float_weight(layer))]
    if active := list(dict.fromkeys(active)):
        raise ValueError(
            f"{len(active)} layers are quantized already ({some(active)}); give their quantizers 0 bits, or take them "
            "off"
        )


def float_weights(network: nn.Module, trace: NetworkTrace) -> dict[str, Tensor]:
    """Copies of the layers' float weights, by layer."""
    return {name: float_weight(network.get_submodule(name)).detach().clone() for name in trace.names}


class Streams:
    """Inputs of the segments, one after the other, in the float network and in the one quantized so far.

    At any time it holds at most the float input, the quantized input and the target of one segment: three times
    (images x size of the activation) numbers of the cache's type, two as long as nothing is quantized.

    Args:
        network: its weights are those of the quantized network.
        originals: float weights by layer.
        images: (N, ...).
        chunk: images at a time.
        cache: type in which activations are kept.
        device: where they are kept; None for the network's device.
        carry: take a segment's output for the next one's input where it is that, instead of running the network again.
        quantized: whether there is a quantized stream.
    """

    def __init__(
        self,
        network: nn.Module,
        originals: Mapping[str, Tensor],
        images: Tensor,
        chunk: int,
        cache: CacheType = "float32",
        device: torch.device | str | None = None,
        carry: bool = True,
        quantized: bool = True,
    ) -> None:
        self.network, self.images, self.chunk, self.carry = network, images, chunk, carry
        self.originals = {f"{name}.{weight_name(network.get_submodule(name))}": w for name, w in originals.items()}
        self.weight = next(iter(originals.values()))
        self.cache = None if cache == "float32" else getattr(torch, cache)
        self.device = self.weight.device if device is None else torch.device(device)
        self.has_quantized = quantized
        self.changed = False
        self.float_inputs = self.inputs = self.targets = self.outputs = None

    @torch.no_grad()
    def enter(self, segment: Segment) -> None:
        """Move to a segment whose weights are still the float ones, or stand in ``originals``."""
        carried = self.carry and segment.follows and self.targets is not None
        if carried:
            self.float_inputs, self.inputs = self.targets, self.outputs
        else:
            self.float_inputs = self.inputs = self.targets = self.outputs = None
            self.float_inputs = self._capture(segment, self.originals)
            self.inputs = self._capture(segment, {}) if self.changed else self.float_inputs
        own = {name: self.originals_of(name) for name in segment.layers}
        self.targets = self._run(segment, self.float_inputs, own)
        self.float_inputs = None

    @torch.no_grad()
    def leave(self, segment: Segment, changed: bool) -> float:
        """Run the segment with its new weights.

        Args:
            segment: the one entered last.
            changed: whether its weights are other ones than the float ones.

        Returns:
            Mean squared distance of its output to the target.
        """
        self.changed |= changed and self.has_quantized
        self.outputs = self._run(segment, self.inputs) if self.changed else self.targets
        self.inputs = None
        return self.distance(self.outputs)

    @torch.no_grad()
    def error(self, segment: Segment, weights: Mapping[str, Tensor]) -> float:
        """Mean squared distance to the target with some weights."""
        chunks = zip(self._chunks(self.inputs), self._chunks(self.targets), strict=True)
        total = sum(float((segment(x, weights) - y).double().square().sum()) for x, y in chunks)
        return total / self.targets.numel()

    def skip(self, changed: bool) -> None:
        """Note that weights of a segment that cannot be run have, or have not, become others."""
        self.changed |= changed and self.has_quantized
        self.inputs = self.targets = self.outputs = None

    def distance(self, outputs: Tensor) -> float:
        """Mean squared distance of kept outputs to the target."""
        chunks = zip(self._chunks(outputs), self._chunks(self.targets), strict=True)
        return sum(float((x - y).double().square().sum()) for x, y in chunks) / self.targets.numel()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Some inputs and their targets on the network's device, in its type."""
        index = index.to(self.device)
        return self.inputs[index].to(self.weight), self.targets[index].to(self.weight)

    def originals_of(self, name: str) -> Tensor:
        """The float weight of a layer."""
        return self.originals[f"{name}.{weight_name(self.network.get_submodule(name))}"]

    @property
    def bytes(self) -> int:
        """Memory of what is kept now."""
        kept = {id(x): x for x in (self.inputs, self.targets) if x is not None}
        return sum(x.numel() * x.element_size() for x in kept.values())

    def _chunks(self, values: Tensor) -> Iterator[Tensor]:
        """Copies, as a segment may work in place."""
        for part in values.split(self.chunk):
            yield part.to(self.weight, copy=True)

    def _capture(self, segment: Segment, weights: Mapping[str, Tensor]) -> Tensor:
        entrance = self.network.get_submodule(segment.parts[0])
        store = _Store(segment.name, len(self.images), self.cache, self.device)
        for part in self._chunks(self.images):
            store.add(_input_of(entrance, lambda part=part: functional_call(self.network, dict(weights), (part,))))
        return store.values

    def _run(self, segment: Segment, inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        store = _Store(segment.name, len(inputs), self.cache, self.device)
        for part in self._chunks(inputs):
            store.add(segment(part, weights))
        return store.values


class _Store:
    """A tensor that is filled image by image, in the memory format of what comes."""

    def __init__(self, name: str, count: int, dtype: torch.dtype | None, device: torch.device) -> None:
        self.name, self.count, self.dtype, self.device = name, count, dtype, device
        self.values: Tensor | None = None
        self.filled = 0

    def add(self, part: Tensor) -> None:
        if self.values is None:
            channels_last = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last)
            self.values = torch.empty(
                (self.count, *part.shape[1:]),
                dtype=self.dtype or part.dtype,
                device=self.device,
                memory_format=torch.channels_last if channels_last else torch.contiguous_format,
            )
        kept = self.values[self.filled : self.filled + len(part)]
        kept.copy_(part)
        if not torch.isfinite(kept).all():
            remedy = "bfloat16 or float32" if torch.isfinite(part).all() else "finite images and weights"
            raise ValueError(f"{self.name}: activations are not finite in {kept.dtype}; use {remedy}")
        self.filled += len(part)


class _ReachedError(Exception):
    """The run has come where it was to stop."""


def _input_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The tensor that enters a module while something runs, which is stopped there.

    Args:
        module: called with one tensor.
        run: function without arguments.
    """
    kept: list[Tensor] = []

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        kept.append(arguments[0])
        raise _ReachedError

    # quantizers of the layer's input must not have worked on it
    handle = module.register_forward_pre_hook(stop, prepend=True)
    try:
        run()
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return kept[0]


class _Calls:
    """Inputs and outputs of some rows of modules in a run of the network: the tensors, and what was in them then."""

    def __init__(self, network: nn.Module, rows: Sequence[tuple[str, ...]], images: Tensor) -> None:
        self.inputs: dict[str, tuple[Tensor, Tensor] | None] = {}
        self.outputs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        handles = []
        for name in {row[0] for row in rows}:
            hook = self._entering(name)
            handles.append(network.get_submodule(name).register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        for name in {row[-1] for row in rows}:
            handles.append(network.get_submodule(name).register_forward_hook(self._leaving(name)))
        try:
            network(images)
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            usual = len(arguments) == 1 and not any(value is not None for value in named.values())
            usual = usual and isinstance(arguments[0], Tensor) and name not in self.inputs
            self.inputs[name] = (arguments[0], arguments[0].clone()) if usual else None

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self.outputs.setdefault(name, []).append((output, output.clone()))

        return hook

    def agrees(self, segment: Segment) -> bool:
        """Whether a segment gives alone what it gave in the network."""
        entered = self.inputs.get(segment.parts[0])
        if entered is None:
            return False
        try:
            alone = segment(entered[1].clone())
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        # an activation may be called at several places
        return isinstance(alone, Tensor) and any(
            alone.shape == value.shape and torch.allclose(alone, value, TOLERANCE, TOLERANCE)
            for _, value in self.outputs.get(segment.parts[-1], [])
        )

    def joined(self, before: Segment | None, segment: Segment) -> bool:
        """Whether a segment's input is the output of another one, untouched."""
        if before is None or not (before.alone and segment.alone):
            return False
        entered, given = self.inputs[segment.parts[0]], self.outputs[before.parts[-1]]
        return any(entered[0] is tensor and torch.equal(entered[1], value) for tensor, value in given)


def _first(network: nn.Module, trace: NetworkTrace) -> nn.Module:
    return network.get_submodule(trace.names[0])


def _row(network: nn.Module, parts: Sequence[str]) -> nn.Sequential:
    return nn.Sequential(*(network.get_submodule(part) for part in parts))


def _parts(trace: NetworkTrace, unit: Unit) -> tuple[str, ...]:
    return _chain(trace, unit.name) if unit.layers == (unit.name,) else (unit.name,)


def _chain(trace: NetworkTrace, name: str) -> tuple[str, ...]:
    """A layer, its norm and its activation."""
    layer = trace[name]
    end = () if layer.feature.module == layer.unit else (layer.feature.module,)
    return tuple(dict.fromkeys([name, *([layer.norm] if layer.norm else []), *end]))
