"""Auxiliary objectives: how a callback adds a trainable loss to a module that does not know it.

A LightningModule that inherits from :class:`AuxiliaryObjectives` owns an ``nn.ModuleDict`` named ``auxiliary``. A
callback puts its head there in ``setup()`` (of every stage), which is early enough for the optimiser, the checkpoint
and DDP. An entry that is an objective says so with the class attribute ``is_objective = True`` and answers
``forward(pairs: Sequence[BranchPair]) -> AuxiliaryOutput``; entries without the mark (a fitted probe, say) are only
stored.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

PREFIX = "auxiliary."


class BranchPair(NamedTuple):
    """What two branches made of the same images, and how hard each branch's input was.

    Args:
        online: features (B, D) of the branch that is trained, with gradient.
        target: features (B, D) of the other branch, detached.
        online_difficulty: (B,) in [0, 1].
        target_difficulty: (B,) in [0, 1].
    """

    online: Tensor
    target: Tensor
    online_difficulty: Tensor
    target_difficulty: Tensor


class AuxiliaryOutput(NamedTuple):
    """What an objective returns: a scalar loss, its weight in the sum, and metrics to log under ``train/<key>``."""

    loss: Tensor
    weight: float
    metrics: dict[str, Tensor]


class AuxiliaryObjectives:
    """Mixin of a LightningModule that trains the objectives found in ``self.auxiliary``.

    Put it before ``LightningModule`` among the bases and call :meth:`init_auxiliary` in ``__init__``.
    """

    auxiliary: nn.ModuleDict

    def init_auxiliary(self) -> None:
        """Create the empty ``auxiliary`` dictionary."""
        self.auxiliary = nn.ModuleDict()

    def objectives(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the entries that are objectives."""
        return ((name, entry) for name, entry in self.auxiliary.items() if getattr(entry, "is_objective", False))

    def auxiliary_loss(self, pairs: Sequence[BranchPair]) -> Tensor:
        """Weighted sum of the objectives on these pairs; logs ``train/<name>_loss`` and the objectives' metrics.

        Args:
            pairs: one entry per direction (online on view 1 with target on view 2, and the reverse).

        Returns:
            Scalar; zero when there is no objective.
        """
        total = pairs[0].online.new_zeros(())
        for name, objective in self.objectives():
            output = objective(pairs)
            total = total + output.weight * output.loss
            metrics = {f"train/{key}": value for key, value in output.metrics.items()}
            self.log_epoch({f"train/{name}_loss": output.loss, **metrics}, batch_size=len(pairs[0].online))
        return total

    def log_epoch(self, values: dict[str, Tensor], batch_size: int | None = None) -> None:
        """Log means over the epoch and over processes."""
        self.log_dict(
            {key: value.detach() for key, value in values.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=batch_size,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the ``auxiliary.*`` part of a checkpoint fit the entries that exist now, and say what was changed.

        Raises:
            ValueError: if a training run would be resumed with other trainable entries than the checkpoint's, because
                then its optimizer state belongs to other parameters.
        """
        state = checkpoint["state_dict"]
        own = {PREFIX + key: value for key, value in self.auxiliary.state_dict().items()}
        unknown = [key for key in state if key.startswith(PREFIX) and key not in own]
        missing = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
        if unknown or missing:
            self._check_resumable(checkpoint, unknown + missing)
        for key in unknown:
            del state[key]
        for key in missing:
            state[key] = own[key].detach().clone()
        if unknown:
            rank_zero_info(f"Checkpoint: dropped {_entries(unknown)}, which no callback of this run uses.")
        if missing:
            rank_zero_info(f"Checkpoint: {_entries(missing)} not in it (or of another shape), kept as initialised.")

    def _check_resumable(self, checkpoint: dict[str, Any], changed: list[str]) -> None:
        trainer = getattr(self, "_trainer", None)
        if trainer is None or not trainer.training or not checkpoint.get("optimizer_states"):
            return
        saved = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
        present = sum(parameter.requires_grad for parameter in self.parameters())
        if saved != present:
            raise ValueError(
                f"cannot resume: the checkpoint trains {saved} tensors and this run {present}, because "
                f"{_entries(changed)} differ. Resume with the callbacks of the original run, or start a new run from "
                "the weights."
            )


def _entries(keys: Sequence[str]) -> str:
    names = sorted({key.removeprefix(PREFIX).split(".")[0] for key in keys})
    return ", ".join(f"'{PREFIX}{name}'" for name in names)
