"""Latency and size of ResNet-18 for int8 kernels, beside the same network in float32, both in onnxruntime.

    python -m benchmarks.csmpq_latency [--rounds 30] [--bits 8] [--size 224]

needs `pip install '.[export]'`. One image, one thread, processor time, so that other processes disturb little. Weights
are random: what is timed does not depend on them. Bits of the weights below 8 change which containers `auto` chooses,
and nothing else of the speed.
"""

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path

import onnxruntime
import torch
import torchvision
from torch import Tensor, nn

from lightning_apps.exporting import write_onnx
from modules.quantization.attachment import attach_quantizers, input_quantizers, set_bits
from modules.quantization.latency import measure_latency, onnx_runner, processor
from modules.quantization.onnx_int8 import write_int8_onnx
from modules.quantization.tracing import layer_names


def quantized_resnet18(bits: int, images: Tensor) -> nn.Module:
    """ResNet-18 with random weights of so many bits, and inputs of 8, calibrated."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    names = layer_names(network)
    attach_quantizers(network, names)
    set_bits(network, dict.fromkeys(names, bits), dict.fromkeys(names, 8))
    with torch.no_grad():
        network(images)  # in training mode: statistics of norms, ranges of inputs
    for quantizer in input_quantizers(network).values():
        quantizer.frozen = True
    return network.eval()


def main() -> None:
    """Write both files, time them in turn, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    images = torch.randn(4, 3, options.size, options.size)
    network = quantized_resnet18(options.bits, images)
    with tempfile.TemporaryDirectory() as folder:
        files = {"float32": Path(folder) / "float32.onnx"}
        write_onnx(torchvision.models.resnet18().eval(), files["float32"], 3, options.size, 18, 1e-3)
        for container in ("auto", "int8"):
            name = f"int8, containers {container}"
            files[name] = write_int8_onnx(network, images, Path(folder) / f"{container}.onnx", container).path
        runners = {name: partial(onnx_runner(path), images[:1]) for name, path in files.items()}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        medians = measure_latency(runners, options.rounds)
    print(f"{processor()}, onnxruntime {onnxruntime.__version__}")
    print(f"ResNet-18, {options.size} px, {options.bits}-bit weights, {options.rounds} rounds")
    print("| | median ms | float32 / this | MB | / float32 |\n| --- | --- | --- | --- | --- |")
    for name, median in medians.items():
        ratio, share = medians["float32"] / median, sizes[name] / sizes["float32"]
        print(f"| {name} | {median:.1f} | {ratio:.2f} | {sizes[name] / 1e6:.1f} | {share:.3f} |")


if __name__ == "__main__":
    main()
