"""What a network costs at given bits: size in MiB and bit operations, by the counting rules of different papers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from modules.quantization.tracing import NetworkTrace, TracedLayer, some

Rule = Literal["macs", "hawq", "mobilenet"]
BITS_PER_MIB = 8 * 2**20
FLOAT_BITS = 32
HAWQ_EXTRAS = 5
"""Operations that HAWQ-v3 adds for each output of a convolution, for its norm and activation."""


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs per bit of its weight.

    Args:
        shape: of the weight.
        parameters: weights, bias, and scale and shift of the norm; all are counted at the weight's bits.
        operations: per image, at the resolution that was traced.
    """

    shape: tuple[int, ...]
    parameters: int
    operations: int


def count_costs(trace: NetworkTrace, rule: Rule = "macs") -> dict[str, LayerCost]:
    """Parameters and operations of each layer.

    Args:
        trace: of the network, on images of the size that operations are to be counted at.
        rule: ``macs``: multiplications with additions, nothing else. ``hawq``: 5 more for each output of a convolution,
            and ``(2 * inputs + 1) * outputs`` for a linear layer. ``mobilenet``: as ``macs``, but
            ``(2 * inputs - 1) * outputs`` for a linear layer. The last two are those of the published tables.

    Returns:
        By name of the layer, in the order they run.

    Raises:
        ValueError: for an unknown rule.

    Source: Yao et al., HAWQ-v3 (2021); the cost formulas of OMPQ and CSMPQ.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule: {rule!r} is unknown; expected {', '.join(get_args(Rule))}")
    return {
        layer.name: LayerCost(layer.weight_shape, layer.parameters, _operations(layer, rule)) for layer in trace.layers
    }


def _operations(layer: TracedLayer, rule: Rule) -> int:
    if rule == "macs":
        return layer.macs
    if layer.kind == "conv":
        return layer.macs + (HAWQ_EXTRAS * layer.out_channels * layer.positions if rule == "hawq" else 0)
    sign = 1 if rule == "hawq" else -1
    return 2 * layer.macs + sign * layer.out_channels * layer.positions


def size_mib(costs: Mapping[str, LayerCost], bits: float | Mapping[str, int] = FLOAT_BITS) -> float:
    """Size of all layers in MiB.

    Args:
        costs: see :func:`count_costs`.
        bits: of weights, one number for all (which may be a mean) or one per layer; 32 by default, the size before
            quantization.

    Raises:
        ValueError: if layers are without bits.
    """
    widths = bits_of_all(costs, bits)
    return sum(cost.parameters * widths[name] for name, cost in costs.items()) / BITS_PER_MIB


def bops(
    costs: Mapping[str, LayerCost], weight_bits: int | Mapping[str, int], activation_bits: int | Mapping[str, int]
) -> float:
    """Bit operations per image, in G: operations times bits of the weight times bits of the input.

    Args:
        costs: see :func:`count_costs`.
        weight_bits: one number for all layers or one per layer.
        activation_bits: the same, of each layer's input.

    Raises:
        ValueError: if layers are without bits.
    """
    weights = bits_of_all(costs, weight_bits)
    inputs = bits_of_all(costs, activation_bits)
    return sum(cost.operations * weights[name] * inputs[name] for name, cost in costs.items()) / 1e9


def as_published_resnet50(costs: Mapping[str, LayerCost]) -> dict[str, LayerCost]:
    """The operations of torchvision's ResNet-50 with the two errors that the published tables contain.

    The first convolution of stage 1 is counted at twice its resolution, and the classifier as if it had 512 inputs.

    Args:
        costs: of a ResNet-50, counted with ``rule="hawq"``.

    Raises:
        ValueError: for another network, or another rule.
    """
    first, last = costs.get("layer1.0.conv1"), costs.get("fc")
    if first is None or last is None or first.shape != (64, 64, 1, 1) or last.shape[1:] != (2048,):
        raise ValueError(
            "only a ResNet-50 was published with errors: layer1.0.conv1 must be (64, 64, 1, 1) and fc (classes, 2048)"
        )
    classes = last.shape[0]
    if last.operations != (2 * 2048 + 1) * classes:
        raise ValueError("the published operations of ResNet-50 follow rule hawq; count the costs with it")
    return {
        **costs,
        "layer1.0.conv1": replace(first, operations=4 * first.operations),
        "fc": replace(last, operations=(2 * 512 + 1) * classes),
    }


def bits_of_all(costs: Mapping[str, LayerCost], bits: float | Mapping[str, int]) -> Mapping[str, float]:
    """Bits by name of the layer, where one number may stand for all.

    Raises:
        ValueError: if layers are without bits.
    """
    if isinstance(bits, (int, float)):
        return dict.fromkeys(costs, bits)
    if missing := [name for name in costs if name not in bits]:
        raise ValueError(f"{len(missing)} of {len(costs)} layers have no bits ({some(missing)})")
    return bits
