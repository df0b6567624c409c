"""Class prototypes: the precision-weighted fusion of all pixels of a class, from statistics that add up over ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.prcl.similarity import Gaussians


class ClassStatistics(NamedTuple):
    """What the prototypes of C classes follow from; sums over pixels, and so over processes.

    Args:
        precision: (C, D) sum of 1 / variance.
        weighted: (C, D) sum of mean / variance.
        count: (C,) number of pixels.
    """

    precision: Tensor
    weighted: Tensor
    count: Tensor

    def over_processes(self) -> "ClassStatistics":
        """The sums over all processes, the same on each; to be called by all of them."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        together = torch.cat([self.precision, self.weighted, self.count[:, None]], 1)
        dist.all_reduce(together)
        dimensions = self.precision.shape[1]
        return ClassStatistics(*together.split([dimensions, dimensions, 1], 1)[:2], together[:, -1])

    def mean_precision(self) -> Tensor:
        """Mean of 1 / variance over the pixels of each class, (C, D): 0 for one without pixels.

        Unlike the precision of a prototype, it does not grow with the number of pixels that are fused.
        """
        return self.precision / self.count.clamp(min=1)[:, None]

    def prototypes(self) -> Gaussians:
        """``1 / v_c = sum 1 / v_i`` and ``m_c = v_c sum m_i / v_i``; mean 0, variance 1 for one without pixels."""
        variance = torch.where(self.precision > 0, 1.0 / self.precision, 1.0)
        return Gaussians(self.weighted * variance, variance)


@torch.no_grad()
def class_statistics(pixels: Gaussians, labels: Tensor, num_classes: int) -> ClassStatistics:
    """Sums over the pixels of each class.

    Args:
        pixels: N Gaussians, means (not normalised) and variances (N, D).
        labels: (N,) int64 class of each.
        num_classes: C.

    Source: PRCL, the fusion of pixel representations into a prototype.
    """
    precision = pixels.variance.float().reciprocal()
    member = torch.nn.functional.one_hot(labels, num_classes).to(precision.dtype)
    # Sums of thousands of pixels need all digits, also where the network runs in half precision.
    with torch.autocast(precision.device.type, enabled=False):
        return ClassStatistics(member.T @ precision, member.T @ (precision * pixels.mean.float()), member.sum(0))


class GlobalPrototypes(nn.Module):
    """Prototypes that are fused with those of each batch over the whole training (the journal version of PRCL).

    ``1 / v <- forget / v + 1 / v_batch``, and the means likewise; they start at mean 1 and variance 1. Without
    forgetting the precision grows for ever and new batches lose all influence. The state is the same on all ranks as
    long as the statistics are, and is part of the checkpoint.

    Args:
        num_classes: C.
        dimensions: D.
        forget: factor on the old precision in (0, 1].

    Raises:
        ValueError: for a factor out of its range.
    """

    precision: Tensor
    weighted: Tensor

    def __init__(self, num_classes: int, dimensions: int, forget: float = 1.0) -> None:
        super().__init__()
        if not 0 < forget <= 1:
            raise ValueError(f"forget: {forget} is outside (0, 1]")
        self.forget = forget
        self.register_buffer("precision", torch.ones(num_classes, dimensions))
        self.register_buffer("weighted", torch.ones(num_classes, dimensions))

    @torch.no_grad()
    def fuse(self, statistics: ClassStatistics) -> Gaussians:
        """Take in a batch's statistics of all processes and return the prototypes."""
        seen = statistics.count[:, None] > 0
        for total, new in ((self.precision, statistics.precision), (self.weighted, statistics.weighted)):
            total.copy_(torch.where(seen, self.forget * total + new, total))
        return self.prototypes()

    def prototypes(self) -> Gaussians:
        """The fused prototypes, means and variances (C, D)."""
        return Gaussians(self.weighted / self.precision, 1.0 / self.precision)
