"""A file that holds the weights of each layer in as many bits as it was given, and everything else as float32."""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.quantization.attachment import float_names, input_quantizers, quantized_weights, weight_quantizers
from modules.quantization.quantizers import QuantizedWeight, check_bits, integer_range
from modules.quantization.tracing import some

FORMAT = "packed-weights-1"
SCALE, ZERO_POINT = "scale", "zero_point"


@dataclass(frozen=True)
class InputGrid:
    """How the input of a layer was quantized: ``(integers - zero_point) * scale``.

    Args:
        bits: of the integers.
        scale: above 0.
        zero_point: an integer.
        signed: whether integers start at ``-2^(bits - 1)``, or at 0.
    """

    bits: int
    scale: float
    zero_point: int
    signed: bool


@dataclass(frozen=True)
class PackedWeights:
    """What a packed file holds.

    Args:
        weights: integers of each quantized layer, by the layer's name.
        tensors: all other tensors of the network, by their names in its state dictionary.
        inputs: grids of the layers whose inputs were quantized too.
        facts: what the writer said of the network.
    """

    weights: dict[str, QuantizedWeight]
    tensors: dict[str, Tensor]
    inputs: dict[str, InputGrid] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        """State dictionary of the network without quantizers, its weights as their integers stand for them."""
        return {**self.tensors, **{_weight(name): weight.dequantized() for name, weight in self.weights.items()}}


def pack(integers: Tensor, bits: int) -> Tensor:
    """Put integers one after the other without gaps, least significant bits first.

    Args:
        integers: of any shape, in ``-2^(bits - 1) .. 2^bits - 1``; negative ones as two's complement.
        bits: 2..8.

    Returns:
        (ceil(numbers * bits / 8),) uint8.
    """
    codes = (integers.flatten().to(torch.int16).numpy() & (2**bits - 1)).astype(np.uint8)
    digits = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(digits, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: Iterable[int], signed: bool) -> Tensor:
    """The integers that :func:`pack` was given.

    Args:
        packed: (bytes,) uint8.
        bits: 2..8.
        shape: of the integers.
        signed: whether they are two's complement.

    Returns:
        int16 of that shape.
    """
    shape = tuple(shape)
    digits = np.unpackbits(packed.numpy(), count=math.prod(shape) * bits, bitorder="little").reshape(-1, bits)
    codes = np.packbits(digits, axis=1, bitorder="little").astype(np.int16).reshape(shape)
    if signed:
        codes -= (codes >= 2 ** (bits - 1)).astype(np.int16) * np.int16(2**bits)
    return torch.from_numpy(codes)


def packed_mib(network: nn.Module) -> float:
    """MiB (2^20 bytes) of the integers of all quantized layers; scales, biases, norms and other layers not counted.

    Args:
        network: with quantizers that have bits.
    """
    weights = quantized_weights(network).values()
    return sum(math.ceil(weight.bits * weight.integers.numel() / 8) for weight in weights) / 2**20


def write_packed(path: str | Path, network: nn.Module, facts: Mapping[str, Any] | None = None) -> Path:
    """Write a network: its quantized weights packed, everything else as it is, floats as float32.

    A safetensors file. The weight of a quantized layer is one row of bytes under the weight's own name, beside
    ``<name>.scale`` (channels,) and, where quantization is asymmetric, ``<name>.zero_point``. Bits, shapes, grids of
    inputs and checksums are in the metadata. The file appears under its name once it is complete.

    Args:
        path: to write to.
        network: with quantizers; layers without bits are written as floats.
        facts: anything that JSON can hold.

    Returns:
        The path.

    Raises:
        ValueError: if no layer has bits, or integers do not fit into theirs.
    """
    path = Path(path)
    weights = quantized_weights(network)
    if not weights:
        raise ValueError(f"{path}: there is nothing to pack, for no layer has bits; allocate bits first")
    rest = {name: _plain(value) for name, value in float_names(network.state_dict()).items()}
    tensors, layers = {}, {}
    for name, weight in weights.items():
        del rest[_weight(name)]
        parts = _parts(name, weight)
        tensors |= parts
        layers[name] = {
            "bits": weight.bits,
            "shape": list(weight.integers.shape),
            "signed": _is_signed(weight),
            "crc32": _checksum(parts),
        }
    for name, grid in _input_grids(network).items():
        layers.setdefault(name, {})["input"] = vars(grid)
    metadata = {
        "format": FORMAT,
        "layers": json.dumps(layers, separators=(",", ":")),
        "crc32": str(_checksum(rest)),
        "facts": json.dumps(dict(facts or {})),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({**rest, **tensors}, temporary, metadata=metadata)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return path


def read_packed(path: str | Path) -> PackedWeights:
    """Read what :func:`write_packed` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, cut short or damaged; layers that are concerned are named.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    try:
        layers = json.loads(metadata["layers"])
        packed = {name: entry for name, entry in layers.items() if "bits" in entry}
        inputs = {name: InputGrid(**entry["input"]) for name, entry in layers.items() if "input" in entry}
        facts, checksum = json.loads(metadata["facts"]), int(metadata["crc32"])
        weights, broken = {}, []
        for name, entry in packed.items():
            parts = {key: tensors.pop(key) for key in _keys(name) if key in tensors}
            if _weight(name) not in parts or _checksum(parts) != entry["crc32"]:
                broken.append(name)
                continue
            weights[name] = _unpacked(name, parts, entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its description of layers is damaged ({error}); write it anew") from error
    if broken:
        raise ValueError(f"{path}: {len(broken)} layers are missing or damaged ({some(broken)}); write it anew")
    if _checksum(tensors) != checksum:
        raise ValueError(
            f"{path}: its tensors other than packed weights are damaged or incomplete ({some(list(tensors))}); "
            "write it anew"
        )
    return PackedWeights(weights, tensors, inputs, facts)


def load_packed(network: nn.Module, path: str | Path) -> PackedWeights:
    """Load a packed file into a network without quantizers; grids of inputs are in what is returned, not applied.

    Args:
        network: of the architecture that was written; changed in place.
        path: of the file.

    Returns:
        What the file holds.

    Raises:
        ValueError: the network has quantizers or is another one, or as :func:`read_packed`.
    """
    if weight_quantizers(network):
        raise ValueError(f"{path}: is for a network without quantizers; build it without them, or bake them first")
    packed = read_packed(path)
    found, expected = packed.state_dict(), network.state_dict()
    problems = [
        f"{len(names)} tensors are {where} ({some(names)})"
        for names, where in (
            ([name for name in expected if name not in found], "missing in the file"),
            ([name for name in found if name not in expected], "not in the network"),
        )
        if names
    ]
    problems += [
        f"{name} is {tuple(value.shape)} in the file and {tuple(expected[name].shape)} in the network"
        for name, value in found.items()
        if name in expected and value.shape != expected[name].shape
    ][:3]
    if problems:
        raise ValueError(f"{path}: does not fit {type(network).__name__}: {'; '.join(problems)}")
    network.load_state_dict(found)
    return packed


def _weight(layer: str) -> str:
    return f"{layer}.weight"


def _keys(layer: str) -> tuple[str, str, str]:
    name = _weight(layer)
    return name, f"{name}.{SCALE}", f"{name}.{ZERO_POINT}"


def _plain(value: Tensor) -> Tensor:
    """A tensor of its own, floats as float32."""
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous().clone()


def _is_signed(weight: QuantizedWeight) -> bool:
    """Whether two's complement holds the integers; where both do, it does not matter."""
    return int(weight.integers.max()) < 2 ** (weight.bits - 1)


def _parts(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a quantized layer, by their names in the file."""
    integers = weight.integers.cpu()
    low, high = integer_range(weight.bits, _is_signed(weight))
    if integers.min() < low or integers.max() > high:
        raise ValueError(
            f"{layer}: integers {int(integers.min())}..{int(integers.max())} do not fit into {weight.bits} bits"
        )
    packed, scale, zero_point = _keys(layer)
    parts = {packed: pack(integers, weight.bits), scale: _plain(weight.scale)}
    if weight.zero_point.any():
        parts[zero_point] = _plain(weight.zero_point)
    return parts


def _unpacked(layer: str, parts: Mapping[str, Tensor], entry: Mapping[str, Any]) -> QuantizedWeight:
    packed, scale, zero_point = (parts.get(key) for key in _keys(layer))
    bits = check_bits(entry["bits"], f"{layer}: bits")
    integers = unpack(packed, bits, entry["shape"], entry["signed"])
    if zero_point is None:
        zero_point = torch.zeros(len(scale), dtype=torch.int16)
    return QuantizedWeight(integers, scale, zero_point, bits)


def _input_grids(network: nn.Module) -> dict[str, InputGrid]:
    grids = {}
    for name, quantizer in input_quantizers(network).items():
        if quantizer.width and int(quantizer.batches):
            scale, zero_point, signed = quantizer.grid()
            grids[name] = InputGrid(quantizer.width, float(scale), int(zero_point), signed)
    return grids


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), value))
    return value


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: is not a readable packed file ({error}); it may be cut short, write it anew"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: holds no packed weights (format {metadata.get('format')!r}, expected {FORMAT!r}); a float file "
            "is loaded with safetensors.torch.load_file"
        )
    return metadata, tensors
