"""Pixels attracted to the prototype of their class and pushed from pixels of others, as distributions or as points."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.prcl.prototypes import ClassStatistics, GlobalPrototypes, class_statistics
from modules.prcl.sampling import ClassPools, class_pools, draw_anchors, draw_negatives
from modules.prcl.similarity import Gaussians, Reduction, check_reduction, gaussian_contrast, mutual_likelihood_score

Representation = Literal["distribution", "point"]

# With this variance everywhere the mutual likelihood score of unit vectors is their cosine minus one.
POINT_VARIANCE = 0.5


class ContrastResult(NamedTuple):
    """One step's loss and what there is to watch.

    Args:
        loss: scalar, connected to the representation whatever happened.
        anchor_pool: (C,) int64 local pixels of each class that could be anchors.
        valid: (C,) int64 local pixels of each class that took part.
        prototypes: C Gaussians (C, D), means not normalised; variance 1 for a class that no process has seen.
        statistics: sums over the pixels of all processes that the step's prototypes follow from.
    """

    loss: Tensor
    anchor_pool: Tensor
    valid: Tensor
    prototypes: Gaussians
    statistics: ClassStatistics


class PixelContrast(nn.Module):
    """The contrastive loss of PRCL over the pixels of a batch.

    Args:
        num_classes: C, at least 2.
        dimensions: D of the representation.
        representation: ``distribution``: Gaussians and their mutual likelihood score; ``point``: unit vectors and their
            cosine (a ReCo-like loss), where variances play no part.
        anchors: Q anchors of each class.
        negatives: K negatives of each anchor.
        temperature: of the scores.
        reduction: of the score over dimensions; a cosine is a sum whatever is set here.
        global_prototypes: fuse the prototypes over the whole training (journal version).
        forget: see :class:`modules.prcl.prototypes.GlobalPrototypes`.
        virtual_negatives: further negatives from each other class, drawn from its global prototype (journal version).
        virtual_radius: factor on the standard deviation they are drawn with.

    Raises:
        ValueError: for a value out of its range.

    Source: PRCL; the journal version for global prototypes and virtual negatives, rebuilt from their description.
    """

    def __init__(
        self,
        num_classes: int,
        dimensions: int = 256,
        representation: Representation = "distribution",
        anchors: int = 256,
        negatives: int = 512,
        temperature: float = 100.0,
        reduction: Reduction = "sum",
        global_prototypes: bool = False,
        forget: float = 1.0,
        virtual_negatives: int = 0,
        virtual_radius: float = 1.0,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if representation not in get_args(Representation):
            raise ValueError(f"representation: {representation!r} is unknown; expected distribution or point")
        for field, value, least in (
            ("num_classes", num_classes, 2),
            ("dimensions", dimensions, 1),
            ("anchors", anchors, 1),
            ("negatives", negatives, 1),
            ("virtual_negatives", virtual_negatives, 0),
        ):
            if value < least:
                raise ValueError(f"{field}: {value} is below {least}")
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not virtual_radius >= 0:
            raise ValueError(f"virtual_radius: {virtual_radius} is negative")
        if virtual_negatives and not global_prototypes:
            raise ValueError("virtual_negatives are drawn from global prototypes; set global_prototypes: true")
        if global_prototypes and representation == "point":
            raise ValueError("global_prototypes are distributions; set representation: distribution")
        self.num_classes, self.representation = num_classes, representation
        self.anchors, self.negatives = anchors, negatives
        self.temperature = temperature
        self.reduction: Reduction = "sum" if representation == "point" else reduction
        self.virtual_negatives, self.virtual_radius = virtual_negatives, virtual_radius
        self.memory = GlobalPrototypes(num_classes, dimensions, forget) if global_prototypes else None

    def forward(
        self, pixels: Gaussians, labels: Tensor, valid: Tensor, hard: Tensor, generator: torch.Generator | None = None
    ) -> ContrastResult:
        """Loss of the pixels of this process; statistics of prototypes are summed over all of them.

        Args:
            pixels: means (not normalised) and variances (N, D).
            labels: (N,) int64 class of each, anything where ``valid`` is false.
            valid: (N,) bool, pixels whose label is trusted.
            hard: (N,) bool, pixels that the classifier is not sure of.
            generator: source of the random numbers; None for torch's own.

        Returns:
            See :class:`ContrastResult`. The loss is the sum of the classes' losses over the number of classes present
            here; 0 with fewer than two of these or without hard pixels.
        """
        pixels = Gaussians(pixels.mean.float(), pixels.variance.float())
        constants = Gaussians(pixels.mean.detach(), pixels.variance.detach())
        statistics = self._statistics(constants, labels, valid)
        prototypes = self._as_point(statistics.prototypes() if self.memory is None else self.memory.fuse(statistics))
        everything = class_pools(labels, valid, self.num_classes)
        candidates = class_pools(labels, valid & hard, self.num_classes)
        classes = candidates.count.nonzero()[:, 0]
        present = int((everything.count > 0).sum())
        loss = 0.0 * (pixels.mean.sum() + pixels.variance.sum())
        if present >= 2 and len(classes):
            losses = self._class_losses(pixels, constants, prototypes, (everything, candidates), classes, generator)
            loss = loss + losses.sum() / present
        return ContrastResult(loss, candidates.count, everything.count, prototypes, statistics)

    def _statistics(self, pixels: Gaussians, labels: Tensor, valid: Tensor) -> ClassStatistics:
        """Of all processes; every one of them comes by here, whatever classes it has."""
        chosen = Gaussians(*(part[valid] for part in pixels))
        if self.representation == "point":
            chosen = Gaussians(chosen.mean, torch.ones_like(chosen.variance))
        return class_statistics(chosen, labels[valid], self.num_classes).over_processes()

    def _as_point(self, gaussians: Gaussians) -> Gaussians:
        if self.representation == "distribution":
            return gaussians
        return Gaussians(gaussians.mean, torch.full_like(gaussians.variance, POINT_VARIANCE))

    def _class_losses(
        self,
        pixels: Gaussians,
        constants: Gaussians,
        prototypes: Gaussians,
        pools: tuple[ClassPools, ClassPools],
        classes: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Mean over the anchors of each class that has some: (P,)."""
        everything, candidates = pools
        centres = Gaussians(functional.normalize(prototypes.mean, dim=1), prototypes.variance)
        scores = self._scores(centres, classes)
        rows = draw_anchors(candidates, classes, self.anchors, generator)
        others = draw_negatives(everything, classes, scores, self.anchors, self.negatives, generator)
        positive = classes[:, None, None].expand(-1, self.anchors, 1)
        index = torch.cat([positive, others + self.num_classes], 2)
        keys = self._as_point(_normalised(constants))
        keys = Gaussians(torch.cat([centres.mean, keys.mean]), torch.cat([centres.variance, keys.variance]))
        if self.virtual_negatives:
            keys, index = self._with_virtual(keys, index, prototypes, classes, generator)
        anchors = self._as_point(_normalised(Gaussians(*(part[rows.flatten()] for part in pixels))))
        losses = gaussian_contrast(anchors, keys, index.flatten(0, 1), self.temperature, self.reduction)
        return losses.view(len(classes), self.anchors).mean(1)

    def _scores(self, centres: Gaussians, classes: Tensor) -> Tensor:
        """Logits (P, C) of drawing negatives of a class for anchors of another."""
        ours = Gaussians(*(part[classes, None] for part in centres))
        return mutual_likelihood_score(ours, centres, self.reduction) / self.temperature

    def _with_virtual(
        self,
        keys: Gaussians,
        index: Tensor,
        prototypes: Gaussians,
        classes: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Gaussians, Tensor]:
        """Append points drawn from each class, and to each anchor those of all classes but its own."""
        shape = (self.num_classes, self.virtual_negatives, prototypes.mean.shape[1])
        noise = torch.randn(shape, device=index.device, generator=generator)
        drawn = prototypes.mean[:, None] + self.virtual_radius * prototypes.variance.sqrt()[:, None] * noise
        points = functional.normalize(drawn, dim=2).flatten(0, 1)
        every = torch.arange(self.num_classes, device=index.device)
        other = every.expand(len(classes), -1)[every != classes[:, None]].view(len(classes), -1)
        within = torch.arange(self.virtual_negatives, device=index.device)
        rows = (len(keys.mean) + other[..., None] * self.virtual_negatives + within).flatten(1)
        keys = Gaussians(torch.cat([keys.mean, points]), torch.cat([keys.variance, torch.zeros_like(points)]))
        return keys, torch.cat([index, rows[:, None].expand(-1, self.anchors, -1)], 2)


def _normalised(gaussians: Gaussians) -> Gaussians:
    return Gaussians(functional.normalize(gaussians.mean, dim=1), gaussians.variance)
