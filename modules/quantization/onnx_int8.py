"""A quantized network as an ONNX file that onnxruntime runs with integer kernels, with the weights' own integers."""

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from modules.onnx_program import onnx_program
from modules.quantization.attachment import bake, input_quantizers, quantized_weights
from modules.quantization.folding import fold_norms
from modules.quantization.latency import adds_in_32_bits
from modules.quantization.quantizers import QuantizedWeight, integer_range
from modules.quantization.tracing import inputs_seen, some, trace_network

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Container = Literal["auto", "int8", "uint8"]
WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
INTEGER_OPERATORS = (*WITH_WEIGHTS, "Add", "Relu", "Clip", "MaxPool", "Concat")
"""What is quantized; others stay float: an average in 8 bits, say, would lose much and gain little time."""

MIDDLE = 128
STEPS = 255
CALIBRATION_BATCH = 16
FOLDING_TOLERANCE = 1e-3
BIAS_MARGIN = 4.0


@dataclass(frozen=True)
class Int8File:
    """What was written.

    Args:
        path: the file.
        containers: ``int8``, or ``uint8`` with zero point 128, of each quantized layer.
        changed_weights: of a layer, how many of its integers are other ones than the network's; layers without any
            are left out.
        float_layers: operators with weights that stayed float, as they had no bits.
    """

    path: Path
    containers: dict[str, str]
    changed_weights: dict[str, int]
    float_layers: list[str]


class Agreement(NamedTuple):
    """How much one network answers like another.

    Args:
        top1: share of places (images, or pixels of masks) whose largest output is of the same class.
        relative_error: norm of the difference over the norm of what was expected.
    """

    top1: float
    relative_error: float


class _Range(NamedTuple):
    bits: int
    low: float
    high: float


class _Stored(NamedTuple):
    scale: np.ndarray
    changed: int


def agreement(expected: Tensor, found: Tensor) -> Agreement:
    """Compare outputs (N, classes, ...) of two networks."""
    same = expected.argmax(1) == found.argmax(1)
    return Agreement(same.float().mean().item(), ((found - expected).norm() / expected.norm()).item())


def write_int8_onnx(
    network: nn.Module, images: Tensor, path: str | Path, container: Container = "auto", opset: int = 18
) -> Int8File:
    """Write a network for 8-bit kernels: BatchNorms folded, integers of any 2..8 bits as bytes, no ``Clip`` nodes.

    Folding multiplies the scale of a channel by the size of the norm's factor and its integers by its sign, so they
    stay the same but for two rare cases, which are counted: -128 whose sign turns, and channels so small beside their
    bias that 32 bits could not hold it in their units.

    Inputs of layers are in 8 bits: on the range of the layer's input quantizer where it has bits (with fewer than 8,
    that range is divided more finely than in training), otherwise on the range that onnxruntime sees in ``images``,
    as are sums, concatenations, and outputs of convolutions. Layers without bits stay float.

    On x86 processors without VNNI, kernels for unsigned inputs and signed weights add two products in 16 bits, which
    8-bit weights overflow and weights of up to 7 bits cannot.

    Args:
        network: with quantizers that have bits; not changed.
        images: (N, C, H, W), normalised as for the network, to calibrate with.
        path: of the file, which appears once it is complete.
        container: ``int8`` writes all signed, right for processors with VNNI or of ARM, and fastest there; ``uint8``
            all unsigned, exact everywhere; ``auto`` writes signed ones where this processor is known to be of the first
            kind, and elsewhere 8-bit weights as ``uint8`` and others as ``int8``.
        opset: ONNX operator set.

    Returns:
        What was written.

    Raises:
        ValueError: no layer has bits, weights are asymmetric or unsigned, a layer is not found in the exported graph,
            or folding changes what the network computes.
    """
    if container not in get_args(Container):
        raise ValueError(f"container: {container!r} is unknown; expected {', '.join(get_args(Container))}")
    network = copy.deepcopy(network).cpu().float().eval()
    images = images.detach().cpu().float()
    weights = quantized_weights(network)
    _check_weights(weights)
    ranges = {name: _quantizer_range(quantizer) for name, quantizer in input_quantizers(network).items()}
    _fold(network, images[:2])
    model = onnx_program(network, images.new_zeros(2, *images.shape[1:]), opset).model_proto
    nodes = _find_nodes(model, network, weights)
    steps = _input_steps(network, list(weights), images[:CALIBRATION_BATCH])
    if container == "auto" and adds_in_32_bits():
        container = "int8"
    overrides, containers, changed = {}, {}, {}
    for name, node in nodes.items():
        stored = _stored(model, node, name, weights[name], steps[name])
        containers[name] = ("uint8" if weights[name].bits == 8 else "int8") if container == "auto" else container
        overrides[node.input[1]] = _channel_overrides(stored.scale, containers[name], _axis(node))
        if stored.changed:
            changed[name] = stored.changed
    overrides |= _input_overrides(model, nodes, {name: found for name, found in ranges.items() if found})
    chosen = {node.name for node in nodes.values()}
    left = [node.name for node in model.graph.node if node.op_type in WITH_WEIGHTS and node.name not in chosen]
    _quantize(model, images, Path(path), left, overrides)
    return Int8File(Path(path), containers, changed, left)


def _check_weights(weights: Mapping[str, QuantizedWeight]) -> None:
    if not weights:
        raise ValueError("int8: no layer has bits; allocate bits first")
    asymmetric = [name for name, weight in weights.items() if weight.zero_point.any()]
    if asymmetric:
        raise ValueError(
            f"int8: weights of {len(asymmetric)} layers are quantized asymmetrically ({some(asymmetric)}), and a zero "
            "point for each channel has no fast kernel; quantize weights symmetrically, or export packed"
        )
    unsigned = [name for name, weight in weights.items() if int(weight.integers.max()) >= 2 ** (weight.bits - 1)]
    if unsigned:
        raise ValueError(f"int8: weights of {len(unsigned)} layers are unsigned ({some(unsigned)}); use signed ones")


def _quantizer_range(quantizer: nn.Module) -> _Range | None:
    """The numbers that an input quantizer can give."""
    if not quantizer.width:
        return None
    scale, zero_point, signed = quantizer.grid()
    low, high = integer_range(quantizer.width, signed)
    return _Range(quantizer.width, (low - float(zero_point)) * float(scale), (high - float(zero_point)) * float(scale))


@torch.no_grad()
def _fold(network: nn.Module, images: Tensor) -> None:
    """Bake weights and fold norms, in place."""
    bake(network)
    before = network(images)
    fold_norms(network, trace_network(network, images))
    difference = (network(images) - before).abs().max().item()
    if not difference <= FOLDING_TOLERANCE * max(1.0, before.abs().max().item()):
        raise ValueError(
            f"int8: folding the BatchNorms changes the outputs by {difference:.1e}: something else reads the output "
            "of a layer before its norm"
        )


@torch.no_grad()
def _input_steps(network: nn.Module, names: list[str], images: Tensor) -> dict[str, float]:
    """About the scale that 8 bits give to the input of each layer."""
    steps: dict[str, float] = {}

    def look(name: str, inputs: Tensor) -> None:
        steps[name] = (inputs.amax().clamp(min=0) - inputs.amin().clamp(max=0)).item() / STEPS

    with inputs_seen(network, look, names):
        network(images)
    return steps


def _constants(model: "ModelProto") -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _axis(node: "NodeProto") -> int:
    """Axis of the output channels in a node's weight."""
    return 1 if node.op_type == "MatMul" else 0


def _find_nodes(model: "ModelProto", network: nn.Module, names: Mapping[str, Any]) -> dict[str, "NodeProto"]:
    """The node of each layer: by the weight's name, or by its values where the exporter transposed it."""
    constants = _constants(model)
    nodes = {
        node.input[1]: node for node in model.graph.node if node.op_type in WITH_WEIGHTS and node.input[1] in constants
    }
    found = {}
    for name in names:
        weight = network.get_submodule(name).weight.detach().numpy()
        keys = [f"{name}.weight", *(key for key, node in nodes.items() if node.op_type == "MatMul")]
        for key in keys:
            if key in nodes and np.array_equal(np.transpose(constants[key]) if _axis(nodes[key]) else weight, weight):
                found[name] = nodes[key]
                break
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"int8: {len(missing)} layers are not found in the exported graph ({some(missing)})")
    return found


def _stored(model: "ModelProto", node: "NodeProto", name: str, weight: QuantizedWeight, input_step: float) -> _Stored:
    """Scales of a layer's channels after folding, from what stands in the graph."""
    constants = _constants(model)
    values = np.moveaxis(constants[node.input[1]].astype(np.float64), _axis(node), 0)
    values = values.reshape(len(values), -1)
    integers = weight.integers.numpy().reshape(len(values), -1).astype(np.float64)
    scale = np.abs(values).max(1) / np.maximum(np.abs(integers).max(1), 1)
    scale = np.where(scale > 0, scale, weight.scale.numpy())
    expected = integers * np.sign((values * integers).sum(1, keepdims=True))
    if not np.array_equal(np.round(values / scale[:, None]), expected):
        raise ValueError(f"int8: {name}: the weights in the exported graph are not those of the network")
    if node.op_type != "MatMul" and len(node.input) == 3 and node.input[2] in constants:
        least = BIAS_MARGIN * np.abs(constants[node.input[2]]) / (2**31 * max(input_step, 1e-12))
        scale = np.maximum(scale, least)
    found = np.round(values / scale[:, None]).clip(-MIDDLE, MIDDLE - 1)
    return _Stored(scale.astype(np.float32), int((found != expected).sum()))


def _channel_overrides(scale: np.ndarray, container: str, axis: int) -> list[dict[str, Any]]:
    from onnxruntime.quantization import QuantType

    kind, zero_point = (QuantType.QInt8, 0) if container == "int8" else (QuantType.QUInt8, MIDDLE)
    return [{"quant_type": kind, "scale": value, "zero_point": zero_point, "axis": axis} for value in scale]


def _input_overrides(
    model: "ModelProto", nodes: Mapping[str, "NodeProto"], ranges: Mapping[str, _Range]
) -> dict[str, list[dict[str, Any]]]:
    """Grids of inputs that have quantizers, by the tensor's name; of its readers the one with most bits decides."""
    from onnxruntime.quantization import QuantType

    producers = {output: node for node in model.graph.node for output in node.output}
    constants = _constants(model)
    wanted: dict[str, _Range] = {}
    for name, found in ranges.items():
        tensor = nodes[name].input[0] if name in nodes else None
        while tensor is not None:
            wanted[tensor] = max(wanted.get(tensor, found), found, key=lambda item: (item.bits, item.high - item.low))
            producer = producers.get(tensor)
            pooled = producer is not None and producer.op_type == "MaxPool"  # one grid for both of its ends
            tensor = producer.input[0] if pooled else None
    overrides = {}
    for tensor, found in wanted.items():
        # onnxruntime leaves an activation out, so the range has to do its work
        least, largest = _bounds(producers.get(tensor), constants)
        low, high = max(found.low, least), min(found.high, largest)
        scale = max((high - low) / STEPS, 1e-8)
        overrides[tensor] = [
            {
                "quant_type": QuantType.QUInt8,
                "scale": np.array(scale, np.float32),
                "zero_point": np.array(round(-low / scale), np.uint8),
            }
        ]
    return overrides


def _bounds(producer: "NodeProto | None", constants: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Between what numbers the output of an activation is."""
    if producer is not None and producer.op_type == "Relu":
        return 0.0, np.inf
    limits = producer.input[1:] if producer is not None and producer.op_type == "Clip" else []
    low, high = (constants.get(name) for name in (*limits, "", "")[:2])
    return -np.inf if low is None else float(low), np.inf if high is None else float(high)


def _quantize(
    model: "ModelProto", images: Tensor, path: Path, left: list[str], overrides: dict[str, list[dict[str, Any]]]
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(images.split(CALIBRATION_BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        prepared, written = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(model, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            written,
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(INTEGER_OPERATORS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=left,
            extra_options={
                "TensorQuantOverrides": overrides,
                "OpTypesToExcludeOutputQuantization": ["Gemm"],  # the kernel can give floats: no ties between logits
                "MatMulConstBOnly": True,
            },
        )
        os.replace(written, path)
