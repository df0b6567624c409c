"""A network that maps images to one tensor, as an ONNX program with a dynamic batch."""

from typing import Any

import torch
from torch import Tensor, nn


def onnx_program(network: nn.Module, images: Tensor, opset: int) -> torch.onnx.ONNXProgram:
    """Export with torch's exporter; input `images`, output `output`.

    Args:
        network: in evaluation mode, on the CPU.
        images: (B, C, H, W) with B above 1; only the shape matters.
        opset: ONNX operator set.
    """
    return torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=["output"],
        dynamic_shapes=dynamic_batch(),
        verbose=False,
    )


def dynamic_batch() -> tuple[dict[int, Any]]:
    """For `torch.export`: the first size of the only input is free."""
    return ({0: torch.export.Dim("batch", min=1)},)
