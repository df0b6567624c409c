"""Write a network to ONNX, torch.export and safetensors, a quantized one packed and for int8 kernels too, and check it.

What was written must compute the same as the network.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from callbacks.atomic_files import atomic_text
from lightning_apps.errors import UserError
from modules.onnx_program import dynamic_batch, onnx_program
from modules.quantization.attachment import bake, weight_quantizers

CHECKED_BATCHES = (1, 8)
AGREEMENT_BATCH = 16
QUANTIZED_FORMATS = ("int8", "packed")
NORMALISED = "images (batch, channels, height, width), normalised float32"


def export_network(
    network: nn.Module,
    facts: dict[str, Any],
    folder: Path,
    formats: Sequence[str] = ("onnx", "safetensors"),
    opset: int = 18,
    tolerance: float = 1e-4,
    images: Tensor | None = None,
    containers: Literal["auto", "int8", "uint8"] = "auto",
    input_size: Sequence[int] | None = None,
) -> dict[str, Path]:
    """Export a network that maps images (B, C, H, W) to one tensor.

    Args:
        network: The network; an attribute `input_description` tells what its input is, if not normalised images. One
            with quantizers is written with quantized weights; float formats leave its inputs unquantized.
        facts: `image_size`, `in_channels`, and what else a user of the files needs: class names, mean, std.
        folder: Where to write.
        formats: Any of `onnx`, `safetensors`, `pt2` (a program of torch.export), and for a network with quantizers that
            have bits `packed` (weights in their bits) and `int8` (ONNX for integer kernels).
        opset: ONNX operator set.
        tolerance: Largest allowed difference between what was written and torch, relative to the largest output; not
            for `int8`, whose agreement is measured and told.
        images: (N, C, H, W), what `int8` is calibrated with.
        containers: of `int8`, see :func:`modules.quantization.onnx_int8.write_int8_onnx`.
        input_size: Height and width that `onnx` and `pt2` are made for; None for squares of `facts["image_size"]`.

    Returns:
        The file of each format, and `export.json` that describes them.

    Raises:
        UserError: A package is missing, the outputs differ, or a format needs bits that the network has not.
    """
    quantized = network.eval().cpu().float()
    size, channels = _sides(input_size, int(facts["image_size"]), formats), int(facts["in_channels"])
    check_quantized_formats(quantized, formats)
    network = bake(copy.deepcopy(quantized)) if weight_quantizers(quantized) else quantized
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    report: dict[str, Any] = {"facts": facts, "input": getattr(network, "input_description", NORMALISED)}
    report["input_shape"] = ["batch", channels, *size]
    if "safetensors" in formats:
        written["safetensors"] = write_safetensors(network, folder / "model.safetensors", facts)
    if "onnx" in formats:
        path = folder / "model.onnx"
        report |= {"opset": opset, "largest_difference": write_onnx(network, path, channels, size, opset, tolerance)}
        written["onnx"] = path
    if "pt2" in formats:
        written["pt2"] = folder / "model.pt2"
        report["largest_difference_pt2"] = write_program(network, written["pt2"], channels, size, tolerance)
    if weight_quantizers(quantized):
        chosen = [name for name in QUANTIZED_FORMATS if name in formats]
        written |= _write_quantized(quantized, folder, chosen, facts, opset, images, containers, report)
        report["quantization"] |= _deployment(quantized, written, channels, size)
    report["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    written["description"] = folder / "export.json"
    atomic_text(written["description"], json.dumps(report, indent=2) + "\n")
    for path in written.values():
        print(f"wrote {path}")
    return written


def _sides(given: Sequence[int] | None, usual: int, formats: Sequence[str]) -> tuple[int, int]:
    """Height and width of the input."""
    if given is None:
        return usual, usual
    if len(given) != 2 or min(given) < 1:
        raise UserError(f"--input_size {list(given)}: expected [height, width] in pixels, 1 or more")
    if "int8" in formats:
        raise UserError("--input_size: int8 is made for pictures of the data, whose size it has; leave one of both out")
    return int(given[0]), int(given[1])


def check_quantized_formats(network: nn.Module, formats: Sequence[str]) -> None:
    """Complain about formats that need bits, for a network that has none.

    Raises:
        UserError: The network has no quantizers, or they have no bits.
    """
    chosen = [name for name in formats if name in QUANTIZED_FORMATS]
    quantizers = weight_quantizers(network)
    if chosen and not quantizers:
        raise UserError(
            f"--formats {', '.join(chosen)}: the network has no quantizers; these formats are for a checkpoint of a "
            "run that quantizes, such as those of the csmpq app"
        )
    if chosen and not any(quantizer.width for quantizer in quantizers.values()):
        raise UserError(
            f"--formats {', '.join(chosen)}: no layer has bits yet; allocate bits first, with fit or allocate"
        )


def _write_quantized(
    network: nn.Module,
    folder: Path,
    formats: Sequence[str],
    facts: dict[str, Any],
    opset: int,
    images: Tensor | None,
    containers: str,
    report: dict[str, Any],
) -> dict[str, Path]:
    """Write the formats that keep integers, and report under `quantization` how well int8 agrees."""
    written: dict[str, Path] = {}
    report["quantization"] = {}
    if "packed" in formats:
        from modules.quantization.packing import write_packed

        written["packed"] = write_packed(folder / "model.packed.safetensors", network, facts)
    if "int8" in formats:
        _need_onnx()
        if images is None:
            raise UserError("--formats int8: needs pictures to calibrate with, and there are none")
        from modules.quantization.latency import onnx_runner
        from modules.quantization.onnx_int8 import agreement, write_int8_onnx

        result = write_int8_onnx(network, images, folder / "model.int8.onnx", containers, opset)
        with torch.inference_mode():
            expected = torch.cat([network(batch) for batch in images.split(AGREEMENT_BATCH)])
        run = onnx_runner(result.path)
        found = agreement(expected, torch.cat([run(batch) for batch in images.split(AGREEMENT_BATCH)]))
        report["quantization"]["int8"] = {
            "calibration_images": len(images),
            "top1_agreement_on_them": round(found.top1, 4),
            "relative_error_on_them": round(found.relative_error, 4),
            "containers": result.containers,
            "changed_weights": result.changed_weights,
            "float_layers": result.float_layers,
        }
        written["int8"] = result.path
    return written


def _deployment(network: nn.Module, written: dict[str, Path], channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """Sizes, BOPs, and latencies of what onnxruntime can run."""
    from modules.quantization.latency import deployment_report, measure_latency, network_bops, onnx_runner

    image = _example(1, channels, size)
    latency = None
    if "int8" in written:
        files = {name: written[name] for name in ("onnx", "int8") if name in written}
        latency = measure_latency({name: partial(onnx_runner(path), image) for name, path in files.items()})
    return deployment_report(network, written, network_bops(network, image), latency)


def write_safetensors(network: nn.Module, path: Path, facts: dict[str, Any]) -> Path:
    """Write the weights of a network, with the facts of its input as metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in network.state_dict().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "facts": json.dumps(facts)})
    os.replace(temporary, path)
    return path


def write_onnx(
    network: nn.Module, path: Path, channels: int, size: int | tuple[int, int], opset: int, tolerance: float
) -> float:
    """Write a network to ONNX with a dynamic batch, and compare it with torch at several batch sizes.

    Args:
        network: Maps images to one tensor.
        path: The file.
        channels: Of the images.
        size: Side of the images, or height and width.
        opset: ONNX operator set.
        tolerance: Largest allowed difference, relative to the largest output.

    Returns:
        The largest absolute difference seen.

    Raises:
        UserError: The extra is not installed, or outputs differ by more than the tolerance.
    """
    _need_onnx()
    temporary = path.with_name(f".{path.name}.tmp")
    program = onnx_program(network, _example(2, channels, size), opset)
    program.save(str(temporary), external_data=False)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _checked(network, run, temporary, path, (channels, size), tolerance)


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"export to ONNX needs {', '.join(missing)}: pip install 'lightning-apps[export]'")


def write_program(
    network: nn.Module, path: Path, channels: int, size: int | tuple[int, int], tolerance: float
) -> float:
    """Write a program of torch.export with a dynamic batch; arguments as of :func:`write_onnx`.

    Returns:
        The largest absolute difference seen.

    Raises:
        UserError: Outputs differ by more than the tolerance.
    """
    temporary = path.with_name(f".{path.name}.tmp.pt2")
    example = _example(2, channels, size)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=dynamic_batch()), temporary)
    program = torch.export.load(temporary).module()
    return _checked(network, program, temporary, path, (channels, size), tolerance)


def _checked(
    network: nn.Module,
    run: Callable[[Tensor], Tensor],
    temporary: Path,
    path: Path,
    input_shape: tuple[int, int | tuple[int, int]],
    tolerance: float,
) -> float:
    """Give a file its name if it computes what the network does, and return the largest difference."""
    largest = 0.0
    for batch in CHECKED_BATCHES:
        images = _example(batch, *input_shape)
        with torch.inference_mode():
            expected, found = network(images), run(images)
        difference = (found - expected).abs().max().item()
        if not difference <= tolerance * max(1.0, expected.abs().max().item()):
            temporary.unlink()
            raise UserError(
                f"{path.name} and torch differ by {difference:.2e} at batch {batch} (tolerance {tolerance:.0e})"
            )
        largest = max(largest, difference)
    os.replace(temporary, path)
    return largest


def _example(batch: int, channels: int, size: int | tuple[int, int]) -> Tensor:
    sides = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, channels, *sides, generator=torch.Generator().manual_seed(batch))
