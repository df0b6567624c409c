import warnings

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.exact_resume import ExactResume
from tests.noisy_training import NoisyData, train


def test_gradients_lost_in_the_middle_of_accumulation_are_reported(tmp_path):
    class SaveEarly(BoringModel):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 0:
                self.trainer.save_checkpoint(tmp_path / "early.ckpt", weights_only=False)

    def fit(model, resume=None):
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=1, limit_train_batches=4, limit_val_batches=0,
            accumulate_grad_batches=3, callbacks=[ExactResume()], default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, ckpt_path=resume)

    fit(SaveEarly())
    message = r"after batch 1 of an epoch, in the middle of accumulating 3 batches: the gradients of 1 batch\(es\)"
    with pytest.warns(UserWarning, match=message):
        fit(BoringModel(), tmp_path / "early.ckpt")


def test_no_warning_about_loaders_that_continue_by_themselves(tmp_path):
    train(tmp_path, NoisyData(), save=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, NoisyData(), resume=tmp_path / "batch-0-2.ckpt")
    assert not [warning for warning in caught if "resuming from a checkpoint" in str(warning.message)]
