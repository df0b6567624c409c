"""Quantizers on the layers of any network, by parametrization of weights and hooks on inputs; no class is rewritten."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modules.quantization.quantizers import (
    InputQuantizer,
    InputScheme,
    QuantizedWeight,
    WeightQuantizer,
    WeightScale,
)
from modules.quantization.tracing import some

INPUT = "input_quantizer"
ORIGINAL = "parametrizations.weight.original"


def attach_quantizers(
    network: nn.Module,
    names: Iterable[str],
    weight_scale: WeightScale = "max",
    input_scheme: InputScheme | None = "affine",
    momentum: float = 0.99,
) -> None:
    """Give layers quantizers that let everything pass until they get bits; layers that have some keep them.

    State dictionaries of the network without quantizers can still be loaded into it.

    Args:
        network: changed in place.
        names: dotted names of convolutions and linear layers.
        weight_scale: see :class:`WeightQuantizer`.
        input_scheme: see :class:`InputQuantizer`; None leaves inputs alone.
        momentum: of the ranges of inputs.

    Raises:
        ValueError: for a layer with another parametrization, such as a weight norm.
    """
    for name in names:
        layer = network.get_submodule(name)
        if parametrize.is_parametrized(layer):
            first = layer.parametrizations.weight[0] if "weight" in layer.parametrizations else None
            if isinstance(first, WeightQuantizer):
                continue
            raise ValueError(f"{name} has a parametrization of its own, which is not combined with one; exclude it")
        quantizer = WeightQuantizer(layer.weight, weight_scale).train(layer.training)
        parametrize.register_parametrization(layer, "weight", quantizer)
        if input_scheme is not None:
            inputs = InputQuantizer(input_scheme, momentum).to(layer.weight.device)
            layer.add_module(INPUT, inputs.train(layer.training))
            layer.register_forward_pre_hook(_quantize_input)
        layer.register_load_state_dict_pre_hook(_accept_float)


def weight_quantizers(network: nn.Module) -> dict[str, WeightQuantizer]:
    """The quantizer of each layer's weight, by the layer's name."""
    found = {}
    for name, module in network.named_modules():
        first = module.parametrizations.weight[0] if parametrize.is_parametrized(module, "weight") else None
        if isinstance(first, WeightQuantizer):
            found[name] = first
    return found


def input_quantizers(network: nn.Module) -> dict[str, InputQuantizer]:
    """The quantizer of each layer's input, by the layer's name."""
    return {
        name.removesuffix(f".{INPUT}"): module
        for name, module in network.named_modules()
        if isinstance(module, InputQuantizer)
    }


def set_bits(network: nn.Module, weight_bits: Mapping[str, int], input_bits: Mapping[str, int] | None = None) -> None:
    """Quantize layers with so many bits from now on; 0 for not at all.

    Args:
        network: with quantizers attached.
        weight_bits: by name of the layer.
        input_bits: the same for inputs.

    Raises:
        ValueError: for a name without a quantizer, or bits outside 2..8.
    """
    for found, bits in ((weight_quantizers(network), weight_bits), (input_quantizers(network), input_bits or {})):
        if unknown := [name for name in bits if name not in found]:
            raise ValueError(
                f"{len(unknown)} layers have no quantizer ({some(unknown)}); those with one: {some(list(found))}"
            )
        for name, number in bits.items():
            found[name].set_bits(number)


def quantized_weights(network: nn.Module) -> dict[str, QuantizedWeight]:
    """Integers, scale and zero point of every layer with bits, by name."""
    return {
        name: quantizer.quantized(network.get_submodule(name).parametrizations.weight.original)
        for name, quantizer in weight_quantizers(network).items()
        if quantizer.width
    }


def float_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer before quantization."""
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight


@torch.no_grad()
def bake(network: nn.Module, inputs: bool = False) -> nn.Module:
    """Put the quantized weights in the place of the originals and take the quantizers off, in place.

    Args:
        network: with or without quantizers.
        inputs: keep the quantizers of inputs.

    Returns:
        The network.
    """
    for name in weight_quantizers(network):
        _bake_weight(network.get_submodule(name))
    if not inputs:
        for name in input_quantizers(network):
            layer = network.get_submodule(name)
            delattr(layer, INPUT)
            layer._forward_pre_hooks = type(layer._forward_pre_hooks)(
                (key, hook) for key, hook in layer._forward_pre_hooks.items() if hook is not _quantize_input
            )
    return network


def _bake_weight(layer: nn.Module) -> None:
    """As ``remove_parametrizations``, which would spoil all copies of the layer, since they share their class."""
    trained = layer.parametrizations.weight.original.requires_grad
    weight = layer.weight.detach().clone()
    del layer._modules["parametrizations"]
    layer.__class__ = type(layer).__bases__[0]
    layer.register_parameter("weight", nn.Parameter(weight, trained))


def float_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dictionary under the names it has without quantizers.

    Args:
        state: of a network with or without quantizers.
    """
    return {
        name.replace(f".{ORIGINAL}", ".weight"): value
        for name, value in state.items()
        if not (".parametrizations.weight.0." in f".{name}" or f".{INPUT}." in f".{name}")
    }


def _quantize_input(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.get_submodule(INPUT)(arguments[0]), *arguments[1:])


def _accept_float(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let the weight of a network without quantizers be loaded: these keep what they have."""
    if f"{prefix}weight" not in state or not parametrize.is_parametrized(layer, "weight"):
        return
    state[f"{prefix}{ORIGINAL}"] = state.pop(f"{prefix}weight")
    for name, value in layer.state_dict().items():
        state.setdefault(f"{prefix}{name}", value)
