"""What there is to watch while PRCL trains: terms of the loss, quality of pseudo-labels, and uncertainty by class."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from modules.segmentation.metrics import VOID

PIXELS = 1024  # of a class mean that are added one by one; their sums are added in a tree


class EpochSums(Metric):
    """Sums over the steps of an epoch that are part of the state dictionary, as the weights are.

    So a run that is interrupted within an epoch and resumed tells of all of that epoch. A subclass adds its states with
    :meth:`add_sum`. Sums stay float32 where a network becomes coarser: in bfloat16 a sum of 512 does not grow by 1.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> "EpochSums":
        kept = {name: state for name, state in self.metric_state.items() if state.is_floating_point()}
        super()._apply(fn, exclude_state)
        for name, state in kept.items():
            device = getattr(self, name).device
            setattr(self, name, state.to(device))
            self._defaults[name] = torch.zeros_like(state, device=device)
        return self

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Add a state of zeros."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum", persistent=True)

    def over_processes(self, device: torch.device) -> dict[str, Tensor]:
        """The states, summed over all processes; to be called by all of them.

        Args:
            device: that processes talk through; after a run the states are back on the CPU, which NCCL does not serve.
        """
        states = {name: state.to(device, copy=True) for name, state in self.metric_state.items()}
        if dist.is_available() and dist.is_initialized():
            for state in states.values():
                dist.all_reduce(state)
        return {name: state.to(getattr(self, name).device) for name, state in states.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take the states, or none of them if they are those of other settings or of an older version."""
        own = {f"{prefix}{name}": state for name, state in self.metric_state.items()}
        given = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        if given.keys() == own.keys() and all(given[key].shape == state.shape for key, state in own.items()):
            state_dict |= {key: given[key].to(state) for key, state in own.items()}
            # Otherwise torchmetrics warns of a metric without update, where nothing is left of the epoch but its end.
            self._update_count = 1
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class StepMeans(EpochSums):
    """Means over steps of some named numbers.

    Args:
        names: of the numbers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_sum("total", len(self.names))
        self.add_sum("weight")

    def update(self, values: dict[str, Tensor], weight: float) -> None:
        """Add a step.

        Args:
            values: a scalar for each name.
            weight: of the step, for example its number of images.
        """
        self.total += weight * torch.stack([values[name].detach().to(self.total) for name in self.names])
        self.weight += weight

    def compute(self) -> dict[str, Tensor]:
        """Mean of each number; empty without a step."""
        return dict(zip(self.names, self.total / self.weight, strict=True)) if self.weight > 0 else {}


class ClassMeans(EpochSums):
    """Mean of a value of each class over its pixels, or over steps, and over processes.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_sum("total", num_classes)
        self.add_sum("count", num_classes, dtype=torch.int64)

    def update(self, values: Tensor, labels: Tensor) -> None:
        """Add pixels.

        Args:
            values: (N,).
            labels: (N,) int64 classes.
        """
        # Not all pixels one by one, so that float32 (the best that some devices have) suffices.
        groups = -(-len(labels) // PIXELS)
        place = torch.arange(len(labels), device=labels.device) // PIXELS * self.num_classes + labels
        sums = self.total.new_zeros(groups * self.num_classes).index_add_(0, place, values.to(self.total))
        self.total += sums.view(groups, self.num_classes).sum(0)
        self.count.index_add_(0, labels, torch.ones_like(labels))

    def compute(self) -> Tensor:
        """(C,) float32 means, NaN for a class without pixels."""
        return self.total / self.count


class PseudoLabelQuality(EpochSums):
    """How many pseudo-labels are confident, and how many are right where the hidden labels are known.

    Args:
        threshold: confidence from which on a label counts as confident.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        for name in ("pixels", "confident", "known", "right", "known_confident", "right_confident"):
            self.add_sum(name, dtype=torch.int64)

    def update(self, labels: Tensor, confidence: Tensor, truth: Tensor) -> None:
        """Add a batch.

        Args:
            labels: (B, H, W) int64 pseudo-labels.
            confidence: (B, H, W).
            truth: (B, H, W) int64 hidden labels, 255 where unknown.
        """
        confident, known = confidence >= self.threshold, truth != VOID
        right = (labels == truth) & known
        self.pixels += labels.numel()
        self.confident += confident.sum()
        self.known += known.sum()
        self.right += right.sum()
        self.known_confident += (known & confident).sum()
        self.right_confident += (right & confident).sum()

    def compute(self) -> dict[str, Tensor]:
        """Shares.

        Returns:
            ``pseudo_coverage`` of all pixels are confident; where hidden labels are known, ``pseudo_accuracy`` of the
            known pixels are right, and ``pseudo_confident_accuracy`` of the confident ones among these. A share of
            nothing is left out.
        """
        shares = {
            "pseudo_coverage": (self.confident, self.pixels),
            "pseudo_accuracy": (self.right, self.known),
            "pseudo_confident_accuracy": (self.right_confident, self.known_confident),
        }
        return {name: part / whole for name, (part, whole) in shares.items() if whole > 0}
