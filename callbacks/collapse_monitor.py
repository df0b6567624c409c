"""Notices when all inputs are mapped to the same representation."""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

Action = Literal["warn", "stop"]
BATCHES_PER_LOOK = 10  # reading a number waits for the device, so it is not done after every batch


def relative_spread(z: Tensor) -> Tensor:
    """Standard deviation of L2-normalised rows, averaged over dimensions, times sqrt(D).

    Args:
        z: (B, D) representations, B >= 2.

    Returns:
        Scalar float32: about 1 for directions spread evenly over the sphere, 0 if all are equal.

    Source: Chen and He, "Exploring simple Siamese representation learning" (2021), section 4.1.
    """
    directions = nn.functional.normalize(z.detach().float(), dim=1)
    return directions.std(dim=0).mean() * z.shape[1] ** 0.5


class CollapseMonitor(Callback):
    """Warns, or stops the run, when representations stay close to collapse.

    After each training batch it takes the output z (B, D) of one submodule and compares the standard deviation of
    the L2-normalised z with ``threshold / sqrt(D)``. If it stays below for
    ``patience`` optimiser steps on end, it acts, once.
    If the submodule runs several times per batch, the mean over its outputs counts.

    Args:
        watch: attribute path of the submodule whose output is z, for example ``online.projector``.
        threshold: share of the spread of evenly distributed directions, in (0, 1).
        patience: number of optimiser steps.
        action: ``warn``, or ``stop`` to end training after the batch; all ranks stop together.
        log_as: name under which the spread relative to 1/sqrt(D) is logged; None logs nothing.

    Raises:
        ValueError: for an argument out of its range, and in ``setup`` if there is no such submodule.

    Example::

        Trainer(callbacks=[CollapseMonitor("student.projector", action="stop")]).fit(module, loader)
    """

    def __init__(
        self,
        watch: str,
        threshold: float = 0.1,
        patience: int = 200,
        action: Action = "warn",
        log_as: str | None = None,
    ) -> None:
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"CollapseMonitor: threshold is {threshold}, expected a number in (0, 1)")
        if patience < 1:
            raise ValueError(f"CollapseMonitor: patience is {patience}, expected >= 1")
        if action not in get_args(Action):
            raise ValueError(f"CollapseMonitor: action is {action!r}, expected one of {', '.join(get_args(Action))}")
        self.watch = watch
        self.threshold = threshold
        self.patience = patience
        self.action: Action = action
        self.log_as = log_as
        self._seen: list[Tensor] = []
        self._below: Tensor | int = 0
        self._acted = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def state_key(self) -> str:
        """Monitors of different submodules keep separate states."""
        return self._generate_state_key(watch=self.watch)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the submodule exists."""
        if stage == "fit":
            self._below, self._acted = 0, False
            self._watched(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._step = trainer.global_step
        self._hook = self._watched(pl_module).register_forward_hook(self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimiser steps below the threshold and act when there were too many on end."""
        if self._seen and trainer.global_step > self._step:
            self._step = trainer.global_step
            spread = torch.stack(self._seen).mean()
            self._seen = []
            self._below = torch.where(spread < self.threshold, self._below + 1, 0)
            if self.log_as:
                pl_module.log(self.log_as, spread)
        if not self._acted and (trainer.fit_loop.total_batch_idx + 1) % min(BATCHES_PER_LOOK, self.patience) == 0:
            collapsed = int(self._below) >= self.patience
            if trainer.strategy.reduce_boolean_decision(collapsed, all=False):
                self._act(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching."""
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._unhook()

    def state_dict(self) -> dict[str, Any]:
        """Number of batches below the threshold on end, and whether the monitor has acted."""
        return {"below": int(self._below), "acted": self._acted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of an interrupted run."""
        self._below, self._acted = state_dict["below"], state_dict["acted"]

    def _act(self, trainer: Trainer) -> None:
        self._acted = True
        remedy = "stopping" if self.action == "stop" else "see the learning rate, the EMA momentum and the predictor"
        rank_zero_warn(
            f"CollapseMonitor: step {trainer.global_step}: the output of {self.watch!r} has collapsed; the standard "
            f"deviation of the normalised vectors was below {self.threshold}/sqrt(dim) for {self.patience} batches on "
            f"end ({remedy})"
        )
        if self.action == "stop":
            trainer.should_stop = True

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or output.ndim != 2:
            kind = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"CollapseMonitor: {self.watch!r} returns {kind}, expected a tensor (B, D); watch another submodule"
            )
        if len(output) > 1:
            self._seen.append(relative_spread(output))

    def _watched(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.watch)
        except AttributeError:
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise ValueError(
                f"CollapseMonitor: watch={self.watch!r} is no module of {type(pl_module).__name__}; give the attribute "
                f"path of the submodule whose output is the representation. Its children are: {children}"
            ) from None

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._seen = None, []
