"""Let a run that is told to stop leave a checkpoint from which it continues exactly."""

import os
import re
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Timed out waiting|timed out")


class GracefulStop(Callback):
    """On Ctrl-C or SIGTERM finish the optimiser step, save ``last.ckpt``, and end the process.

    The signal handler only makes a note. The ranks compare notes where all of them are between two steps (Lightning's
    own handler of SIGTERM starts a broadcast wherever the signal happens to strike, which can wait forever), so it is
    enough that one rank receives the signal. The same signal a second time interrupts at once. A signal during
    validation takes effect after the current validation batch; the resumed run repeats that validation.

    The checkpoint goes where the first ``ModelCheckpoint`` keeps its ``last.ckpt``, or to
    ``<default_root_dir>/checkpoints`` if there is none. The exit status is 128 + signal number (130 for Ctrl-C, 143 for
    SIGTERM). Use it with ``ExactResume``, as the signal may come at the last batch of an epoch.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GracefulStop()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._signal = 0
        self._exit: SIGTERMException | None = None
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Become the last callback, so that what is saved includes the work of all others."""
        # A new list, because Lightning is walking through the present one.
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, after Lightning has installed its own handlers."""
        self._signal, self._exit = 0, None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a rank was told to stop, unless gradients are still being accumulated.

        The run ends at the next hook, after Lightning has logged this batch.
        """
        if not trainer.fit_loop._should_accumulate() and self._is_told(trainer):
            self._exit = self._save_and_explain(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, if the step before was the last one."""
        self._leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave, if the step before was the last one."""
        self._leave()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave, if the step before was the last one."""
        self._leave()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and leave if a rank was told to stop, as validation can be long."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._is_told(trainer):
            self._exit = self._save_and_explain(trainer)
            self._leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand the signals back, and explain an error that only says that another rank is gone."""
        self._restore()
        if trainer.world_size > 1 and isinstance(exception, RuntimeError) and LOST_RANK.search(str(exception)):
            exception.add_note(
                f"Rank {trainer.global_rank} lost the connection to another rank, which probably died: the cause is in "
                "the output of that rank (an error further up, or killed for lack of memory). "
                "Resume from the last checkpoint."
            )

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == number:
            raise KeyboardInterrupt
        if not self._signal:
            self._signal = number
            name = signal.Signals(number).name
            # print could be interrupted halfway through a print
            os.write(2, f"\n{name}: finishing this step and saving; once more to stop at once.\n".encode())

    def _is_told(self, trainer: Trainer) -> bool:
        if trainer.world_size > 1:
            highest = torch.tensor(self._signal, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            self._signal = int(highest)
        return self._signal != 0

    def _save_and_explain(self, trainer: Trainer) -> SIGTERMException:
        path = _save_last(trainer)
        name = signal.Signals(self._signal).name
        rank_zero_info(f"Stopped by {name} after step {trainer.global_step}; continue with --ckpt_path {path}")
        # Lightning's launcher kills rank 0 while it is still closing its loggers if another rank reports a failure.
        return SIGTERMException(128 + self._signal if trainer.is_global_zero else 0)

    def _leave(self) -> None:
        if self._exit is not None:
            raise self._exit

    def _restore(self) -> None:
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            signal.signal(number, handler)


def _save_last(trainer: Trainer) -> str:
    """Save all states to the path at which ``ModelCheckpoint`` expects its last checkpoint, and tell it so."""
    keeper = next(
        (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)), None
    )
    if keeper is None:
        path = str(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
    else:
        path = trainer.strategy.broadcast(keeper.last_model_path or _unused_path(keeper))
        # Before saving, because it is part of the state.
        keeper.last_model_path = path
    trainer.save_checkpoint(path, weights_only=False)
    return path


def _unused_path(keeper: ModelCheckpoint) -> str:
    """``last.ckpt``, or ``last-v1.ckpt`` and so on where an earlier run has left one."""
    folder = Path(keeper.dirpath or ".")
    names = [keeper.CHECKPOINT_NAME_LAST, *(f"{keeper.CHECKPOINT_NAME_LAST}-v{number}" for number in range(1, 1000))]
    return str(next(path for name in names if not (path := folder / f"{name}{keeper.FILE_EXTENSION}").exists()))
