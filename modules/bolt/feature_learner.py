"""What self-supervised image modules share: features for evaluation, prediction by a fitted probe, optimisation."""

import copy
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from modules.auxiliary import AuxiliaryObjectives
from modules.optimization import build_optimizer, check_optimization, parameter_groups, scaled_lr, with_schedule

PredictOutput = Literal["probabilities", "features"]
PROBE = "linear_probe"


class FeatureLearner(AuxiliaryObjectives, LightningModule):
    """Base of modules that learn an encoder without labels.

    A subclass gives ``feature_encoder`` (images -> features), calls ``save_hyperparameters`` and writes
    ``training_step``. Its hyper-parameters are expected to hold optimizer, lr, lr_reference_batch, weight_decay, beta1,
    beta2, momentum, schedule, warmup_epochs and predict_output.
    """

    @property
    def feature_encoder(self) -> nn.Module:
        """The encoder that is kept after pre-training."""
        raise NotImplementedError

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return self.feature_encoder.num_features

    def extract_features(self, images: Tensor) -> Tensor:
        """Features (B, D) of normalised images (B, C, H, W), unperturbed."""
        return self.feature_encoder(images)

    def forward(self, images: Tensor) -> Tensor:
        """Same as :meth:`extract_features`."""
        return self.extract_features(images)

    def deployable_network(self) -> nn.Module:
        """A copy of the encoder as timm defines it, in evaluation mode: images (B, C, H, W) -> features (B, D)."""
        return copy.deepcopy(self.feature_encoder).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Features with labels and index, for probes."""
        return {"features": self.extract_features(batch.images), "labels": batch.labels, "index": batch.index}

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Same as the validation step."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities of the fitted linear probe, or features, as ``predict_output`` says.

        Raises:
            ValueError: if probabilities are asked for and no fitted probe came with the checkpoint.
        """
        features = self.extract_features(batch.images)
        if self.hparams.predict_output == "features":
            return {"index": batch.index, "features": features}
        probe = getattr(self.auxiliary, PROBE, None)
        if probe is None or not bool(probe.fitted):
            raise ValueError(
                "predict: this checkpoint holds no fitted linear probe, so there are no class probabilities. Train it "
                "with the callback FeatureProbes(linear=True) on labelled data, or set model.predict_output: features, "
                "or fine-tune."
            )
        return {"index": batch.index, "probabilities": probe.predict_proba(features)}

    def configure_optimizers(self) -> dict[str, Any]:
        """Optimizer over everything trainable, with warm-up and schedule per optimizer step."""
        settings = self.hparams
        lr = scaled_lr(self.trainer, settings.lr, settings.lr_reference_batch)
        optimizer = build_optimizer(
            parameter_groups(self.named_parameters(), settings.weight_decay),
            settings.optimizer,
            lr,
            betas=(settings.beta1, settings.beta2),
            momentum=settings.momentum,
        )
        return with_schedule(self, optimizer, settings.schedule, settings.warmup_epochs)

    def check_settings(self) -> None:
        """Check the shared hyper-parameters."""
        settings = self.hparams
        check_optimization(settings.lr, settings.weight_decay, settings.warmup_epochs, settings.lr_reference_batch)
