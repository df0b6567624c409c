"""Continue a run exactly where its checkpoint was written, also between a batch and the validation that follows it."""

import warnings

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import RestartStage as ValidationRestart
from lightning.pytorch.loops.training_epoch_loop import RestartStage as BatchRestart
from lightning.pytorch.utilities import rank_zero_warn


class ExactResume(Callback):
    """Set Lightning's counters right for the checkpoints after which its own restart leaves something out.

    A checkpoint written right after a training batch misses the validation that was due next, and at an epoch's last
    batch also the end of that epoch; the counters of the next epoch are then one short, so that a second interruption
    repeats batches. With ``max_steps`` a checkpoint of an epoch's end counts that epoch twice. One written during
    validation takes the validation for done. This callback makes all of them continue with what was due.

    Put it before callbacks that read the epoch in ``on_train_start``. Written for Lightning 2.6.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume()], logger=False, accelerator="cpu")
    """

    _epoch_end_due = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the training loaders made anew, if they were made before the counters of the checkpoint are restored.

        That is so when ``configure_optimizers`` asks for ``trainer.estimated_stepping_batches``.
        """
        if trainer.ckpt_path is not None:
            trainer.fit_loop._combined_loader = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repair the restart, after Lightning classified the checkpoint and before it acts on that."""
        self._epoch_end_due = False
        fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if not fit.restarting:
            return
        if _loaders_know_their_place(trainer):
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        if fit.restarted_on_epoch_end:
            _finish_epoch(trainer)
        elif epoch.restarted_on_train_batch_end:
            _warn_of_lost_gradients(trainer)
            if epoch.batch_progress.is_last_batch or _validation_follows(trainer):
                self._continue_after_batch(trainer)
        elif epoch.restarted_on_last and _validation_unfinished(trainer):
            _run_validation_next(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the next epoch start afresh, where the epoch loop had nothing left to do but to end."""
        if self._epoch_end_due:
            self._epoch_end_due = False
            trainer.fit_loop.epoch_loop.restarting = False
            trainer.fit_loop.epoch_loop.reset_restart_stage()

    def _continue_after_batch(self, trainer: Trainer) -> None:
        fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if epoch.batch_progress.is_last_batch:
            # Lightning has just counted the epoch as over.
            for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
                progress.processed -= 1
                progress.completed -= 1
        epoch.batch_progress.increment_completed()
        epoch._restart_stage = BatchRestart.RESTARTED_ON_LAST
        if _validation_follows(trainer):
            _run_validation_next(trainer)
            return
        epoch._batches_that_stepped += 1
        epoch.val_loop._has_run = True
        self._epoch_end_due = True


def _loaders_know_their_place(trainer: Trainer) -> bool:
    """Whether all batch samplers take their position from the trainer, which Lightning's warning does not see."""
    loaders = trainer.fit_loop._combined_loader
    samplers = [getattr(loader, "batch_sampler", None) for loader in loaders.flattened] if loaders else []
    return bool(samplers) and all(getattr(sampler, "trainer", None) is trainer for sampler in samplers)


def _finish_epoch(trainer: Trainer) -> None:
    """Count an epoch as over whose end the checkpoint was written at, in a run limited by steps."""
    fit = trainer.fit_loop
    fit.epoch_progress.increment_completed()
    fit._restarting = False
    fit.reset_restart_stage()
    fit.epoch_loop.restarting = False
    fit.epoch_loop.reset_restart_stage()
    fit.epoch_loop.val_loop.reset_restart_stage()


def _run_validation_next(trainer: Trainer) -> None:
    """Start validation from its first batch before any training."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation._restart_stage = ValidationRestart.RESTARTED_MID_EVALUATION
    validation.restarting = False


def _validation_follows(trainer: Trainer) -> bool:
    epoch = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    if not epoch._should_check_val_fx(fetcher):
        return False
    if trainer.val_dataloaders is None:
        trainer.validating = True
        epoch.val_loop.setup_data()
        trainer.training = True
    return sum(trainer.num_val_batches) > 0


def _validation_unfinished(trainer: Trainer) -> bool:
    batches = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    finished = batches.is_last_batch and batches.current.completed == batches.current.ready
    return batches.current.ready > 0 and not finished


def _warn_of_lost_gradients(trainer: Trainer) -> None:
    batches = trainer.fit_loop.epoch_loop.batch_progress
    lost = batches.current.ready % trainer.accumulate_grad_batches
    if lost and not batches.is_last_batch:
        rank_zero_warn(
            f"The checkpoint was written after batch {batches.current.ready} of an epoch, in the middle of "
            f"accumulating {trainer.accumulate_grad_batches} batches: the gradients of {lost} batch(es) are not in it, "
            "and the resumed run will differ slightly. ModelCheckpoint(every_n_train_steps=...) saves between steps."
        )
