"""An auxiliary objective: tell which of two branches processed the harder input."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

Head = Literal["pairwise", "concat"]
WeightSchedule = Literal["constant", "linear", "cosine"]


class RankingOutput(NamedTuple):
    """What an auxiliary objective returns: the module adds ``weight * loss`` to its own loss and logs the rest."""

    loss: Tensor
    weight: float
    metrics: dict[str, Tensor]


def ranking_loss(logits: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of "the first input was harder than the second", ties left out.

    Args:
        logits: (P,) evidence that the first input of each pair is the harder one.
        first: (P,) difficulty of the first input.
        second: (P,) difficulty of the second input.

    Returns:
        The mean loss over pairs with different difficulty (0 with a graph if there is none), and the share of them
        that is ordered correctly (equal evidence counts half, chance level 0.5 if there is none); both float32.

    Source: Burges et al., "Learning to rank using gradient descent" (RankNet, 2005), equation 3.
    """
    logits = logits.float()
    decided = (first != second).to(logits.dtype)
    harder = (first > second).to(logits.dtype)
    pairs = decided.sum()
    losses = nn.functional.binary_cross_entropy_with_logits(logits, harder, reduction="none")
    loss = (losses * decided).sum() / pairs.clamp(min=1)
    with torch.no_grad():
        correct = ((logits > 0) == (harder > 0)).to(logits.dtype)
        correct = torch.where(logits == 0, 0.5, correct)
        accuracy = torch.where(pairs > 0, (correct * decided).sum() / pairs.clamp(min=1), 0.5)
    return loss, accuracy


class DifficultyObjective(nn.Module):
    """Scores features and ranks the two branches of each pair by difficulty.

    ``pairwise``: one score per feature, the logit of a pair is the difference of its scores. It is antisymmetric, so
    it cannot be solved by recognising which network made a feature. ``concat``: one logit from both features side by
    side; the order of the branches is drawn anew for each pair, for the same reason.
    Gradients reach the head and the online features, never the target features.

    Args:
        dim: width D of the features.
        weight: weight of the loss in the module's total.
        head: ``pairwise`` or ``concat``.
    """

    is_objective: ClassVar[bool] = True

    def __init__(self, dim: int, weight: float = 1.0, head: Head = "pairwise") -> None:
        super().__init__()
        self.weight = weight
        self.kind: Head = head
        self.asked = False
        width = dim if head == "pairwise" else 2 * dim
        self.head = nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, 1))

    def score(self, features: Tensor) -> Tensor:
        """Difficulty score of each input, (B, D) -> (B,); larger is harder. For ``pairwise`` heads only."""
        if self.kind != "pairwise":
            raise ValueError(f"a {self.kind!r} head compares two inputs and scores none alone; use head='pairwise'")
        return self.head(features).squeeze(-1)

    def forward(self, pairs: Sequence[Any]) -> RankingOutput:
        """Loss over all pairs of all directions.

        Args:
            pairs: one object per direction (view order) with attributes ``online`` (B, D) with gradient, ``target``
                (B, D), ``online_difficulty`` (B,) and ``target_difficulty`` (B,) in [0, 1].

        Returns:
            loss, weight, and the metrics ``rank_acc`` (share of non-tied pairs ordered correctly) and
            ``difficulty_gap`` (mean distance of the two difficulties of a pair).
        """
        self.asked = True
        online = torch.cat([pair.online for pair in pairs])
        target = torch.cat([pair.target for pair in pairs]).detach()
        first = torch.cat([pair.online_difficulty for pair in pairs])
        second = torch.cat([pair.target_difficulty for pair in pairs])
        gap = (first - second).abs().float().mean()
        if self.kind == "pairwise":
            logits = self.score(online) - self.score(target)
        else:
            swap = torch.rand(len(online), device=online.device) < 0.5
            first, second = torch.where(swap, second, first), torch.where(swap, first, second)
            swap = swap.unsqueeze(-1)
            sides = [torch.where(swap, target, online), torch.where(swap, online, target)]
            logits = self.head(torch.cat(sides, dim=-1)).squeeze(-1)
        loss, accuracy = ranking_loss(logits, first, second)
        return RankingOutput(loss, self.weight, {"rank_acc": accuracy, "difficulty_gap": gap})


class DifficultyRanking(Callback):
    """Adds the task "which branch processed the harder input" to any module with two branches.

    The callback owns the head and registers it in ``setup`` of every stage as ``pl_module.auxiliary[name]``: before
    weights are restored, optimizers are built and DDP wraps the module. The module follows a small protocol:

    - ``auxiliary``: an ``nn.ModuleDict``, empty at first;
    - ``feature_dim``: width of the features it ranks (or give ``dim``);
    - in its training step it adds ``weight * loss`` of each entry marked ``is_objective`` to its loss; ``forward``
      takes a sequence of pairs, see :meth:`DifficultyObjective.forward`;
    - its optimizer gets ``self.parameters()``;
    - optional ``perturbation_strength``: (lowest, highest) strength. Equal ends mean that all pairs tie: an error.

    Args:
        name: key of the head in ``auxiliary``.
        weight: weight lambda of the loss; 0 builds nothing at all.
        weight_schedule: ``constant``, or ``linear`` / ``cosine`` growth from 0 over ``ramp_steps``.
        ramp_steps: optimizer steps of the growth.
        head: ``pairwise`` (difference of scores) or ``concat`` (one network on both features).
        dim: width of the features: a number, or the attribute path of one in the module.

    Raises:
        ValueError: for an argument out of its range, and in ``setup`` for a module that does not fit.

    Source: auxiliary task of Li et al., "A New Perspective to Boost Vision Transformer for Medical Image
    Classification" (2023); the form of the loss is a reconstruction.

    Example::

        class TwoBranches(LightningModule):
            def __init__(self):
                super().__init__()
                self.auxiliary = nn.ModuleDict()
                self.feature_dim = 64
                ...

            def training_step(self, batch, batch_idx):
                ...
                for entry in self.auxiliary.values():
                    if getattr(entry, "is_objective", False):
                        output = entry([pair_1, pair_2])
                        loss = loss + output.weight * output.loss
                return loss

        Trainer(callbacks=[DifficultyRanking(weight=0.1)]).fit(TwoBranches(), loader)
    """

    adds_parameters = True

    def __init__(
        self,
        name: str = "rank",
        weight: float = 1.0,
        weight_schedule: WeightSchedule = "constant",
        ramp_steps: int = 0,
        head: Head = "pairwise",
        dim: str | int = "feature_dim",
    ) -> None:
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"DifficultyRanking: weight is {weight}, expected a number >= 0")
        for field, value, allowed in (("head", head, Head), ("weight_schedule", weight_schedule, WeightSchedule)):
            if value not in get_args(allowed):
                choices = ", ".join(get_args(allowed))
                raise ValueError(f"DifficultyRanking: {field} is {value!r}, expected one of {choices}")
        if weight_schedule != "constant" and ramp_steps < 1:
            raise ValueError(
                f"DifficultyRanking: ramp_steps is {ramp_steps}, expected >= 1 for weight_schedule={weight_schedule!r}"
            )
        if not name or "." in name:
            raise ValueError(f"DifficultyRanking: name is {name!r}, expected a non-empty name without dots")
        self.name = name
        self.weight = weight
        self.weight_schedule: WeightSchedule = weight_schedule
        self.ramp_steps = ramp_steps
        self.head: Head = head
        self.dim = dim

    @property
    def state_key(self) -> str:
        """Two objectives of different names live side by side."""
        return self._generate_state_key(name=self.name)

    def weight_at(self, step: int) -> float:
        """Weight of the loss at optimizer step ``step``, from 0; without memory, so a resumed run continues exactly."""
        if self.weight_schedule == "constant":
            return self.weight
        progress = min(step / self.ramp_steps, 1.0)
        if self.weight_schedule == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        return self.weight * progress

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register the head, in every stage, so that checkpoints of the fit load in the others."""
        if self.weight == 0.0:
            return
        auxiliary = getattr(pl_module, "auxiliary", None)
        if not isinstance(auxiliary, nn.ModuleDict):
            if stage != "fit":
                return
            raise ValueError(
                f"DifficultyRanking: {type(pl_module).__name__} has no nn.ModuleDict 'auxiliary' for the head; "
                f"set self.auxiliary = nn.ModuleDict() in __init__ and add the weighted losses of its entries"
            )
        self._check_strength(pl_module)
        if self.name not in auxiliary:
            head = DifficultyObjective(self._width(pl_module), self.weight_at(0), self.head)
            auxiliary[self.name] = head.to(pl_module.device)
        elif not isinstance(auxiliary[self.name], DifficultyObjective):
            raise ValueError(
                f"DifficultyRanking: auxiliary[{self.name!r}] is already a {type(auxiliary[self.name]).__name__}; "
                f"choose another name"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the head is trained."""
        if self.weight == 0.0:
            return
        trained = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        missing = [n for n, p in self._objective(pl_module).named_parameters() if id(p) not in trained]
        if missing and trainer.optimizers:
            raise ValueError(
                f"DifficultyRanking: {len(missing)} parameters of auxiliary[{self.name!r}] are in no optimizer, first "
                f"{missing[0]}; pass self.parameters() or also self.auxiliary.parameters() in configure_optimizers"
            )
        self._objective(pl_module).asked = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the weight of this step."""
        if self.weight:
            self._objective(pl_module).weight = self.weight_at(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Complain if the module never asks for the loss."""
        if self.weight and outputs and not self._objective(pl_module).asked:
            raise RuntimeError(
                f"DifficultyRanking: {type(pl_module).__name__}.training_step did not call auxiliary[{self.name!r}]; "
                f"add weight * loss of each entry of self.auxiliary to the training loss, or use weight=0"
            )

    def _objective(self, pl_module: LightningModule) -> DifficultyObjective:
        return pl_module.auxiliary[self.name]

    def _width(self, pl_module: LightningModule) -> int:
        value: Any = self.dim
        if isinstance(value, str):
            value = pl_module
            for part in str(self.dim).split("."):
                value = getattr(value, part, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"DifficultyRanking: dim={self.dim!r} gives {value!r} on {type(pl_module).__name__}, expected the "
                f"width of the features; set self.feature_dim in the module, or give dim as a number or attribute path"
            )
        return value

    def _check_strength(self, pl_module: LightningModule) -> None:
        strength = getattr(pl_module, "perturbation_strength", None)
        if strength is not None and strength[0] == strength[1]:
            raise ValueError(
                f"DifficultyRanking: weight is {self.weight}, but the module perturbs all inputs with one strength "
                f"(r_min = r_max = {strength[0]}): every pair ties and the ranking learns nothing. "
                f"Set r_min < r_max, or weight=0"
            )
