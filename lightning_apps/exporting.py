"""Write a plain network to ONNX, torch.export and safetensors, and check that what was written computes the same."""

import json
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.atomic_files import atomic_text
from lightning_apps.errors import UserError

CHECKED_BATCHES = (1, 8)
NORMALISED = "images (batch, channels, height, width), normalised float32"


def export_network(
    network: nn.Module,
    facts: dict[str, Any],
    folder: Path,
    formats: Sequence[str] = ("onnx", "safetensors"),
    opset: int = 18,
    tolerance: float = 1e-4,
) -> dict[str, Path]:
    """Export a network that maps images (B, C, H, W) to one tensor.

    Args:
        network: The network; an attribute `input_description` tells what its input is, if not normalised images.
        facts: `image_size`, `in_channels`, and what else a user of the files needs: class names, mean, std.
        folder: Where to write.
        formats: Any of `onnx`, `safetensors` and `pt2` (a program of torch.export).
        opset: ONNX operator set.
        tolerance: Largest allowed difference between what was written and torch, relative to the largest output.

    Returns:
        The file of each format, and `export.json` that describes them.

    Raises:
        UserError: A package is missing, or the outputs differ.
    """
    network = network.eval().cpu().float()
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    report: dict[str, Any] = {"facts": facts, "input": getattr(network, "input_description", NORMALISED)}
    size, channels = int(facts["image_size"]), int(facts["in_channels"])
    if "safetensors" in formats:
        written["safetensors"] = write_safetensors(network, folder / "model.safetensors", facts)
    if "onnx" in formats:
        path = folder / "model.onnx"
        report |= {"opset": opset, "largest_difference": write_onnx(network, path, channels, size, opset, tolerance)}
        written["onnx"] = path
    if "pt2" in formats:
        written["pt2"] = folder / "model.pt2"
        report["largest_difference_pt2"] = write_program(network, written["pt2"], channels, size, tolerance)
    report["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    written["description"] = folder / "export.json"
    atomic_text(written["description"], json.dumps(report, indent=2) + "\n")
    for path in written.values():
        print(f"wrote {path}")
    return written


def write_safetensors(network: nn.Module, path: Path, facts: dict[str, Any]) -> Path:
    """Write the weights of a network, with the facts of its input as metadata."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in network.state_dict().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "facts": json.dumps(facts)})
    os.replace(temporary, path)
    return path


def write_onnx(network: nn.Module, path: Path, channels: int, size: int, opset: int, tolerance: float) -> float:
    """Write a network to ONNX with a dynamic batch, and compare it with torch at several batch sizes.

    Returns:
        The largest absolute difference seen.

    Raises:
        UserError: The extra is not installed, or outputs differ by more than the tolerance.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"export to ONNX needs {', '.join(missing)}: pip install 'lightning-apps[export]'")
    temporary = path.with_name(f".{path.name}.tmp")
    example = _example(2, channels, size)
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=["output"],
        dynamic_shapes=_dynamic_batch(),
        verbose=False,
    )
    program.save(str(temporary), external_data=False)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _checked(network, run, temporary, path, (channels, size), tolerance)


def write_program(network: nn.Module, path: Path, channels: int, size: int, tolerance: float) -> float:
    """Write a program of torch.export with a dynamic batch, and compare it with torch at several batch sizes.

    Returns:
        The largest absolute difference seen.

    Raises:
        UserError: Outputs differ by more than the tolerance.
    """
    temporary = path.with_name(f".{path.name}.tmp.pt2")
    example = _example(2, channels, size)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=_dynamic_batch()), temporary)
    program = torch.export.load(temporary).module()
    return _checked(network, program, temporary, path, (channels, size), tolerance)


def _checked(
    network: nn.Module,
    run: Callable[[Tensor], Tensor],
    temporary: Path,
    path: Path,
    input_shape: tuple[int, int],
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


def _example(batch: int, channels: int, size: int) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))


def _dynamic_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)
