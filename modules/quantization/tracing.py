"""What happens in a network when images go through it: its layers with weights, their norms, blocks and features."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modules.quantization.quantizers import Quantizer

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
MAX_UNIT_LAYERS = 8
SHOWN = 5


@dataclass(frozen=True)
class Tap:
    """One output of a module: of its ``call``-th call in a forward pass."""

    module: str
    call: int


@dataclass(frozen=True)
class TracedLayer:
    """A convolution or a linear layer, as it was met in a forward pass.

    Args:
        name: dotted name in the network.
        kind: ``conv`` or ``linear``.
        weight_shape: (out, in / groups, k, k) or (out, in).
        has_bias: whether the layer has a bias of its own.
        groups: of a convolution; 1 otherwise.
        positions: places per image at which it is applied: pixels of its output, tokens, or 1.
        norm: name of the BatchNorm that reads its output, or None.
        feature: what the layer's feature is: its output after norm and activation, and for the last layer of a block
            the output of the block.
        unit: name of the block it belongs to; its own name outside of blocks.
        partner: the layer of its block that it is added to, for a convolution in a shortcut; None otherwise.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    has_bias: bool
    groups: int
    positions: int
    norm: str | None
    feature: Tap
    unit: str
    partner: str | None = None

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight_shape[0]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return torch.Size(self.weight_shape).numel()

    @property
    def parameters(self) -> int:
        """Weights, bias, and scale and shift of the norm."""
        return self.weights + self.out_channels * (self.has_bias + 2 * (self.norm is not None))

    @property
    def macs(self) -> int:
        """Multiplications with additions per image."""
        return self.weights * self.positions


@dataclass(frozen=True)
class Unit:
    """A block that is quantized as a whole, or a layer outside of blocks.

    Args:
        name: dotted name of the module.
        layers: its quantized layers, in the order they run.
        follows: whether its input is the output of the unit before, untouched.
        simple: whether it maps one tensor to one tensor.
    """

    name: str
    layers: tuple[str, ...]
    follows: bool
    simple: bool


@dataclass(frozen=True)
class NetworkTrace:
    """Layers and units of a network, in the order they run.

    Args:
        layers: those that can be quantized.
        units: what they are grouped to.
    """

    layers: tuple[TracedLayer, ...]
    units: tuple[Unit, ...]

    def __getitem__(self, name: str) -> TracedLayer:
        return next(layer for layer in self.layers if layer.name == name)

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return [layer.name for layer in self.layers]

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Layers that share their bits: each with the shortcuts that are added to it."""
        return [
            (layer.name, *(other.name for other in self.layers if other.partner == layer.name))
            for layer in self.layers
            if layer.partner is None
        ]


@dataclass
class _Event:
    name: str
    call: int
    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: Any
    start: int
    """How many events had ended when the module was called."""


def layer_names(network: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Names of all convolutions and linear layers.

    Args:
        network: any module.
        exclude: names or patterns (``blocks.*.attn.*``) to leave out.

    Raises:
        ValueError: for a pattern that matches nothing, or a weight that two layers share.
    """
    found = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(f"exclude: {pattern!r} matches none of the {len(found)} layers ({some(found)})")
    owners: dict[int, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, LAYERS):
            weight = module.parametrizations.weight.original if hasattr(module, "parametrizations") else module.weight
            first = owners.setdefault(id(weight), name)
            if first != name and not any(fnmatchcase(name, pattern) for pattern in exclude):
                raise ValueError(
                    f"{first} and {name} share their weight, which one number of bits cannot describe; name one in "
                    "exclude"
                )
    return [name for name in found if not any(fnmatchcase(name, pattern) for pattern in exclude)]


@torch.no_grad()
def trace_network(
    network: nn.Module,
    images: Tensor,
    exclude: Sequence[str] = (),
    max_unit_layers: int = MAX_UNIT_LAYERS,
) -> NetworkTrace:
    """Watch a network in evaluation mode at work on a few images.

    Args:
        network: any module with one tensor as input.
        images: (B, channels, H, W); two will do.
        exclude: names or patterns of layers to leave alone.
        max_unit_layers: a module with more layers is not one unit but those of its parts.

    Raises:
        ValueError: for a layer that is not reached or runs more than once, and as :func:`layer_names`.
    """
    names = layer_names(network, exclude)
    events = _watch(network, images)
    calls = {name: [event for event in events if event.name == name] for name in names}
    _check_calls(calls)
    blocks = _blocks(network, names, max_unit_layers)
    units, members = _units(blocks, calls, events)
    ends = {name: _feature_end(calls[name][0], events) for name in names}
    layers = {}
    for unit in units:
        partners = _partners(unit, members[unit.name], calls, ends, events)
        main = [name for name in unit.layers if name not in partners]
        for name in unit.layers:
            norm, last = ends[name]
            tap = Tap(last.name, last.call)
            if len(unit.layers) > 1 and name == main[-1]:
                tap = Tap(unit.name, members[unit.name].call)
            layers[name] = _describe(calls[name][0], norm, tap, unit.name, partners.get(name))
    ordered = sorted(layers.values(), key=lambda layer: calls[layer.name][0].start)
    return NetworkTrace(tuple(ordered), tuple(units))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and back into the mode that each was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def inputs_seen(network: nn.Module, look: Callable[[str, Tensor], None], names: Iterable[str]) -> Iterator[None]:
    """Show the input of layers to a function while the block runs, with the network in evaluation mode.

    Args:
        network: any module.
        look: called with the name of a layer and its input, each time before it runs.
        names: of the layers.
    """

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: look(name, arguments[0])

    with ExitStack() as stack, evaluating(network):
        for name in names:
            stack.enter_context(network.get_submodule(name).register_forward_pre_hook(hook_of(name)))
        yield


def _watch(network: nn.Module, images: Tensor) -> list[_Event]:
    events: list[_Event] = []
    open_calls: list[tuple[tuple[Tensor, ...], int]] = []
    counts: dict[str, int] = {}

    def enter(module: nn.Module, inputs: tuple) -> None:
        open_calls.append((tuple(value for value in inputs if isinstance(value, Tensor)), len(events)))

    def leave(module: nn.Module, inputs: tuple, output: Any) -> None:
        tensors, start = open_calls.pop()
        name = names[module]
        events.append(_Event(name, counts.get(name, 0), module, tensors, output, start))
        counts[name] = counts.get(name, 0) + 1

    names = {
        module: name
        for name, module in network.named_modules()
        if "parametrizations" not in name.split(".") and not isinstance(module, Quantizer)
    }
    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(enter, prepend=True))  # before its input is quantized
        handles.append(module.register_forward_hook(leave))
    try:
        with evaluating(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return events


def _check_calls(calls: dict[str, list[_Event]]) -> None:
    if unreached := [name for name, found in calls.items() if not found]:
        raise ValueError(
            f"{len(unreached)} layers are not called in a forward pass ({some(unreached)}): they are unused, or used "
            "by another function than their own; name them in exclude"
        )
    if repeated := [name for name, found in calls.items() if len(found) > 1]:
        raise ValueError(
            f"{len(repeated)} layers are called more than once in a forward pass ({some(repeated)}), which one range "
            "of inputs cannot describe; name them in exclude"
        )


def _blocks(network: nn.Module, names: list[str], max_layers: int) -> dict[str, list[str]]:
    """Name of each unit -> its layers."""
    found: dict[str, list[str]] = {}

    def visit(module: nn.Module, path: str) -> None:
        prefix = f"{path}." if path else ""
        inside = [name for name in names if name == path or name.startswith(prefix)]
        if not inside:
            return
        if isinstance(module, LAYERS) or (path and type(module) not in CONTAINERS and len(inside) <= max_layers):
            found[path] = inside
            return
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}")

    visit(network, "")
    return found


def _units(
    blocks: dict[str, list[str]], calls: dict[str, list[_Event]], events: list[_Event]
) -> tuple[list[Unit], dict[str, _Event]]:
    """Units in the order they run, and the call of each."""
    runs: dict[str, _Event] = {}
    for name, inside in blocks.items():
        found = [event for event in events if event.name == name]
        for part in (name,) if len(found) == 1 and found[0].inputs else inside:
            runs[part] = next(event for event in events if event.name == part)
    units = []
    previous: Any = None
    for name, event in sorted(runs.items(), key=lambda item: item[1].start):
        inside = sorted((layer for layer in blocks.get(name, [name])), key=lambda layer: calls[layer][0].start)
        simple = len(event.inputs) == 1 and isinstance(event.output, Tensor)
        units.append(Unit(name, tuple(inside), simple and event.inputs[0] is previous, simple))
        previous = event.output if simple else None
    return units, runs


def _feature_end(layer: _Event, events: list[_Event]) -> tuple[str | None, _Event]:
    """The BatchNorm that reads a layer's output, and the last module of the chain layer, norm, activation."""
    norm, last, output = None, layer, layer.output
    for event in events[events.index(layer) + 1 :]:
        if not event.inputs or event.inputs[0] is not output:
            continue
        if norm is None and last is layer and isinstance(event.module, _BatchNorm):
            norm, last, output = event.name, event, event.output
        elif is_activation(event.module):
            return norm, event
    return norm, last


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function without weights, of torch or timm."""
    home = type(module).__module__
    known = home == "torch.nn.modules.activation" or home.startswith("timm.layers.activations")
    return known and not isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.MultiheadAttention))


def _partners(
    unit: Unit,
    call: _Event,
    calls: dict[str, list[_Event]],
    ends: dict[str, tuple[str | None, _Event]],
    events: list[_Event],
) -> dict[str, str]:
    """Convolutions in shortcuts: they read the block's input, pooled or not, and give to no other layer."""
    if len(unit.layers) < 2 or not unit.simple:
        return {}
    first, *others = unit.layers
    read = {id(tensor) for event in events for tensor in event.inputs if event.name in calls}
    entrances = _untouched(calls[first][0].inputs[0], events[: events.index(call)])
    shortcuts = [
        name
        for name in others
        if any(calls[name][0].inputs[0] is entrance for entrance in entrances)
        and id(ends[name][1].output) not in read
        and ends[name][1].output.shape == getattr(call.output, "shape", None)
    ]
    main = [name for name in unit.layers if name not in shortcuts]
    return dict.fromkeys(shortcuts, main[-1])


def _untouched(entrance: Tensor, events: list[_Event]) -> list[Tensor]:
    """A tensor, and what modules without weights other than activations, such as pooling, make of it."""
    found = [entrance]
    for event in events:
        plain = next(event.module.parameters(), None) is None and not is_activation(event.module)
        if plain and event.inputs and any(event.inputs[0] is tensor for tensor in found):
            found.append(event.output)
    return found


def _describe(layer: _Event, norm: str | None, tap: Tap, unit: str, partner: str | None) -> TracedLayer:
    module, output = layer.module, layer.output
    conv = not isinstance(module, nn.Linear)
    return TracedLayer(
        name=layer.name,
        kind="conv" if conv else "linear",
        weight_shape=tuple(module.weight.shape),
        has_bias=module.bias is not None,
        groups=module.groups if conv else 1,
        positions=output[0, 0].numel() if conv else output[0].numel() // output.shape[-1],
        norm=norm,
        feature=tap,
        unit=unit,
        partner=partner,
    )


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
