"""PRCL's contrast beside the same formula with all pairs held at once: time, memory, value, gradients.

    python -m benchmarks.prcl [--anchors 256] [--negatives 512] [--rounds 5] [--steps]

Everything runs on one thread in fp32 and is told in seconds of that processor. Memory is what the peak of a fresh
process grows by over one forward and backward pass. ``--steps`` times the loss of whole batches with 21 classes, too.
"""

import argparse
import multiprocessing
import resource
from collections.abc import Callable
from time import process_time

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.emo import show
from benchmarks.timing import interleaved, report
from modules.prcl.contrast import PixelContrast
from modules.prcl.similarity import Gaussians, gaussian_contrast

DIMENSIONS = 256
PIXELS = 20_000
TEMPERATURE = 100.0
TOLERANCE = 1e-5
TARGETS = {"time": 3.0, "memory": 10.0}
CLASSES = 21
STEPS = {"21 classes, Q 64, K 128": (64, 128), "21 classes, Q 256, K 512": (256, 512)}
Contrast = Callable[[Gaussians, Gaussians, Tensor], Tensor]


def full_broadcast(anchors: Gaussians, keys: Gaussians, index: Tensor) -> Tensor:
    """The formula as it reads: (A, K + 1, D) differences and sums of variances, and autograd for the rest."""
    spread = anchors.variance[:, None] + keys.variance[index]
    difference = anchors.mean[:, None] - keys.mean[index]
    scores = -0.5 * (difference**2 / spread + torch.log(spread)).sum(2)
    return functional.cross_entropy(scores / TEMPERATURE, torch.zeros(len(index), dtype=torch.int64), reduction="none")


def fused(anchors: Gaussians, keys: Gaussians, index: Tensor) -> Tensor:
    """Ours."""
    return gaussian_contrast(anchors, keys, index, TEMPERATURE)


ALTERNATIVES: dict[str, Contrast] = {"reference": full_broadcast, "fused": fused}


def problem(anchors: int, negatives: int) -> tuple[Gaussians, Gaussians, Tensor]:
    """Unit means, variances around a half, and for each anchor the rows of its keys."""
    generator = torch.Generator().manual_seed(0)
    # In place: what is allocated and freed here would hide the first megabytes of what is measured.
    mean = torch.randn(PIXELS, DIMENSIONS, generator=generator)
    mean.div_(mean.norm(dim=1, keepdim=True))
    variance = torch.rand(PIXELS, DIMENSIONS, generator=generator).mul_(0.6).add_(0.2)
    index = torch.randint(PIXELS, (anchors, negatives + 1), generator=generator)
    queries = Gaussians(mean[:anchors].clone().requires_grad_(), variance[:anchors].clone().requires_grad_())
    return queries, Gaussians(mean, variance), index


def step(contrast: Contrast, anchors: Gaussians, keys: Gaussians, index: Tensor) -> tuple[Tensor, ...]:
    """The mean loss, and its gradients with respect to the anchors' means and variances."""
    loss = contrast(anchors, keys, index).mean()
    return loss.detach(), *torch.autograd.grad(loss, anchors)


def require_equal(anchors: Gaussians, keys: Gaussians, index: Tensor) -> None:
    """Print how much value and gradients differ; stop where that is more than 1e-5 of the largest."""
    found, expected = (step(contrast, anchors, keys, index) for contrast in (fused, full_broadcast))
    for name, ours, theirs in zip(
        ("value", "gradient of means", "gradient of variances"), found, expected, strict=True
    ):
        difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        print(f"{name}: differs by {difference:.1e}, the largest is {largest:.1e}")
        if not difference <= TOLERANCE * largest:
            raise SystemExit(
                f"{name}: differs by {difference / largest:.1e} of the largest; timings would mean nothing"
            )
    print(flush=True)


def peak_growth(name: str, anchors: int, negatives: int) -> float:
    """Megabytes that the peak of this process grows by; to be called in a process of its own."""
    torch.set_num_threads(1)
    arguments = problem(anchors, negatives)
    # Libraries allocate at their first use; that is not what is measured.
    step(ALTERNATIVES[name], arguments[0], arguments[1], arguments[2][:, :2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(ALTERNATIVES[name], *arguments)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(anchors: int, negatives: int) -> None:
    """Print the peaks of both, and their ratio."""
    megabytes = {}
    for name in ALTERNATIVES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            megabytes[name] = pool.apply(peak_growth, (name, anchors, negatives))
        print(f"{name}: peak memory {megabytes[name]:.1f} MB")
    ratio = megabytes["reference"] / max(megabytes["fused"], 1e-3)
    print(f"fused: x{ratio:.1f} less (aim {TARGETS['memory']})\n", flush=True)


def whole_step(anchors: int, negatives: int) -> Callable[[], None]:
    """Loss and gradients of the pixels of a batch with all classes, a third of them hard."""
    generator = torch.Generator().manual_seed(0)
    _, keys, _ = problem(1, 1)
    labels = torch.randint(CLASSES, (PIXELS,), generator=generator)
    hard = torch.rand(PIXELS, generator=generator) < 1 / 3
    pixels = Gaussians(*(part.requires_grad_() for part in keys))
    module = PixelContrast(CLASSES, DIMENSIONS, anchors=anchors, negatives=negatives, temperature=TEMPERATURE)

    def run() -> None:
        torch.autograd.grad(module(pixels, labels, torch.ones_like(hard), hard, generator).loss, pixels)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=256)
    parser.add_argument("--negatives", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="the loss of whole batches as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # First of all, since a new process is told the peak of the one that started it where that is higher.
    memory(options.anchors, options.negatives)
    arguments = problem(options.anchors, options.negatives)
    require_equal(*arguments)
    title = f"{options.anchors} anchors x {options.negatives} negatives, D {DIMENSIONS}, forward and backward"
    calls = {name: lambda contrast=contrast: step(contrast, *arguments) for name, contrast in ALTERNATIVES.items()}
    show(title, interleaved(calls, options.rounds, 1, process_time), {"fused": TARGETS["time"]})
    if options.steps:
        for name, sizes in STEPS.items():
            seconds = interleaved({"whole step": whole_step(*sizes)}, options.rounds, 1, process_time)
            print(report(name, seconds, "whole step"), flush=True)


if __name__ == "__main__":
    main()
