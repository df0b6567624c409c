"""How long exported networks take on one thread of this processor, and what a report on a quantized network says."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules.quantization.attachment import input_quantizers, weight_quantizers
from modules.quantization.costs import FLOAT_BITS, bops, count_costs
from modules.quantization.packing import packed_mib
from modules.quantization.tracing import layer_names, trace_network
from modules.timing import interleaved

ROUNDS = 30
MIB = 2**20
EXACT_INSTRUCTIONS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
NOTE = (
    "Bits below 8 make the packed file and the BOPs smaller. No kernel here computes in fewer than 8 bits: the int8 "
    "latency is that of 8-bit kernels, of which the container decides (uint8 is slower on x86 without VNNI)."
)


def onnx_runner(path: str | Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A function that runs an ONNX file of one input and one output on the CPU.

    Args:
        path: the file.
        threads: of the kernels; more spin while they wait.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def measure_latency(
    sessions: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median milliseconds of each session, all run in turn in every round.

    Args:
        sessions: name -> what to time; on one thread each, for the default clock adds up what all threads take.
        rounds: that are measured, after three more.
        clock: processor time by default, which other processes disturb least.
    """
    seconds = interleaved(sessions, rounds, clock=clock)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def network_bops(network: nn.Module, image: Tensor) -> float:
    """Bit operations of the layers with quantizers, in G: multiplications with additions, times bits of both sides.

    Args:
        network: with quantizers; weights and inputs without bits count as 32.
        image: (1, C, H, W).
    """
    weights, inputs = weight_quantizers(network), input_quantizers(network)
    others = [name for name in layer_names(network) if name not in weights]
    costs = count_costs(trace_network(network, image, exclude=others))
    return bops(
        costs,
        {name: weights[name].width or FLOAT_BITS for name in costs},
        {name: (inputs[name].width if name in inputs else 0) or FLOAT_BITS for name in costs},
    )


def deployment_report(
    network: nn.Module,
    files: Mapping[str, str | Path],
    bops_g: float | None = None,
    latency_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Sizes, BOPs and latencies of a quantized network, each under its own name.

    Args:
        network: with quantizers that have bits.
        files: name -> file that was written, such as ``packed``, ``onnx`` and ``int8``.
        bops_g: bit operations per image in G, as the caller counts them.
        latency_ms: of :func:`measure_latency`.
    """
    bits = {name: quantizer.width for name, quantizer in weight_quantizers(network).items()}
    report: dict[str, Any] = {
        "weight_bits": bits,
        "packed_weights_mib": round(packed_mib(network), 4),
        "files_mib": {name: round(Path(path).stat().st_size / MIB, 4) for name, path in files.items()},
        "note": NOTE,
    }
    if bops_g is not None:
        report["bops_g"] = round(bops_g, 4)
    if latency_ms:
        report["latency_ms"] = {name: round(value, 3) for name, value in latency_ms.items()}
        report["latency_of"] = f"one image, one thread, median of processor time, {processor()}"
    return report


def processor() -> str:
    """This processor, and whether it has the instructions that decide the speed of 8-bit kernels."""
    name, flags = _processor_information()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    return f"{name} ({', '.join(flag for flag in wanted if flag in flags) or 'no 8-bit instructions known'})"


def adds_in_32_bits() -> bool:
    """Whether this processor is known to add products of 8-bit numbers in 32 bits, which nothing overflows."""
    return not _processor_information()[1].isdisjoint(EXACT_INSTRUCTIONS)


def _processor_information() -> tuple[str, set[str]]:
    name, flags = platform.machine(), set()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    return name, flags
