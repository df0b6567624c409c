"""Image classification with a timm or torchvision model: from scratch, fine-tuned, or linear on frozen features."""

import copy
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

from modules.auxiliary import AuxiliaryObjectives
from modules.classification.class_weights import ClassWeight, class_weights, count_classes
from modules.classification.metrics import classification_metrics, metric_names
from modules.classification.mixing import BatchMixing, check_mixing
from modules.encoders import SMALL_VIT, SMALL_VIT_OPTIONS, PosEmbed, create_network, fix_sincos_positions
from modules.optimization import (
    CosineEnds,
    OptimizerName,
    ScheduleName,
    build_optimizer,
    check_cosine_ends,
    check_optimization,
    layer_decay_groups,
    parameter_groups,
    scaled_lr,
    with_schedule,
)
from modules.pictures import displayable
from modules.pretrained_weights import Which, classifier_names, load_weights, network_weights

SHOWN_IMAGES = 16


class ImageClassifier(AuxiliaryObjectives, LightningModule):
    """A timm model with a linear classifier.

    ``init_from`` starts from pre-trained weights (fine-tuning); with ``freeze`` only a linear layer on standardised
    features is trained (linear evaluation); without both it is the ``scratch`` baseline.

    Args:
        encoder: timm model name, or ``torchvision/`` and the name of a classifier of torchvision.
        encoder_options: arguments that change the named model (null or {} for none).
        num_classes: C.
        class_names: for messages; indices otherwise.
        image_size: side of the input in pixels.
        in_channels: channels of the input.
        main_metric: which metric is logged as ``val/main`` too: acc, balanced_acc, kappa, macro_f1, macro_precision,
            auroc, or with more than 5 classes top5.
        init_from: file with weights: a checkpoint of this suite, a timm state dictionary, or safetensors. Read when a
            new training run starts; the classifier is not taken from it.
        which: branch of a checkpoint with two networks: ``online`` or ``target``.
        freeze: train only the classifier.
        pos_embed: ``learned`` (trained, also where it comes from a file) or ``sincos`` (fixed; for ViTs).
        dropout: before the classifier.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        label_smoothing: in [0, 1).
        mixup_alpha: of the Beta distribution of Mixup's share; 0 for no Mixup.
        cutmix_alpha: of the Beta distribution of CutMix' share; 0 for no CutMix.
        mixup_prob: how often a batch is mixed.
        switch_prob: with both, how often it is CutMix.
        class_weight: ``none``, ``inverse`` or ``effective`` weights in the training loss; not together with mixing.
        layer_decay: factor of the learning rate per layer from the classifier down; 1 for none.
        optimizer: ``adamw``, ``sgd`` or ``lars``.
        lr: peak learning rate.
        lr_reference_batch: batch size that ``lr`` is meant for, scaled linearly to the global batch; null: no scaling.
        weight_decay: not applied to biases, norms, position embedding and class token.
        beta1: of AdamW.
        beta2: of AdamW.
        momentum: of SGD and LARS.
        schedule: after the warm-up, ``cosine`` to zero or ``constant``; or ``timm_cosine``, which counts from the start
            of the warm-up, so that the rate drops at its end.
        warmup_epochs: linear warm-up; null for a tenth of the run, at most 40 epochs.
        lr_min: of ``timm_cosine``, at the end; scaled like ``lr``.
        warmup_lr: of ``timm_cosine``, at the first step; scaled like ``lr``.
        lr_noise: of ``timm_cosine``: start and end, as shares of the run, of random learning rates; null for none.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        encoder: str = SMALL_VIT,
        encoder_options: dict[str, Any] | None = SMALL_VIT_OPTIONS,
        num_classes: int = 10,
        class_names: list[str] | None = None,
        image_size: int = 8,
        in_channels: int = 1,
        main_metric: str = "acc",
        init_from: str | None = None,
        which: Which = "online",
        freeze: bool = False,
        pos_embed: PosEmbed = "learned",
        dropout: float = 0.0,
        drop_path: float = 0.1,
        label_smoothing: float = 0.1,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mixup_prob: float = 1.0,
        switch_prob: float = 0.5,
        class_weight: ClassWeight = "none",
        layer_decay: float = 0.75,
        optimizer: OptimizerName = "adamw",
        lr: float = 5e-4,
        lr_reference_batch: int | None = 256,
        weight_decay: float = 0.05,
        beta1: float = 0.9,
        beta2: float = 0.999,
        momentum: float = 0.9,
        schedule: ScheduleName = "cosine",
        warmup_epochs: float | None = 5,
        lr_min: float = 0.0,
        warmup_lr: float = 0.0,
        lr_noise: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._check_settings()
        options = {"drop_rate": dropout or None, "drop_path_rate": drop_path or None, **(encoder_options or {})}
        self.network = create_network(encoder, image_size, in_channels, num_classes, options)
        if pos_embed == "sincos":
            fix_sincos_positions(self.network)
        self.standardise: nn.Module | None = None
        if freeze:
            self._freeze()
        self.mixing = self._build_mixing()
        self.register_buffer("class_weights", torch.ones(num_classes))
        self.val_metrics = classification_metrics(num_classes, "val/", class_names)
        self.test_metrics = classification_metrics(num_classes, "test/", class_names)
        # A metric, so that a process without a labelled image takes part in the reduction all the same.
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})
        self.init_auxiliary()

    @property
    def feature_dim(self) -> int:
        """Width of the features that the classifier reads."""
        return getattr(self.network, "head_hidden_size", self.network.num_features)

    def on_fit_start(self) -> None:
        """Take pre-trained weights at the start of a new training run; a resumed one brings its own."""
        if self.trainer.ckpt_path is not None:
            return
        if self.hparams.init_from:
            self.load_pretrained()
        elif self.hparams.freeze:
            rank_zero_warn("freeze without init_from: this evaluates the features of a randomly initialised encoder.")

    def load_pretrained(self) -> None:
        """Copy the weights of ``init_from`` into the network.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if it does not fit, naming the tensors.
        """
        weights = network_weights(self.hparams.init_from, self.network, self.hparams.which)
        load_weights(self.network, weights)
        rank_zero_info(f"Weights of the network taken from {self.hparams.init_from}.")

    def train(self, mode: bool = True) -> "ImageClassifier":
        """A frozen network stays in evaluation mode."""
        super().train(mode)
        if self.standardise is not None:
            self.network.eval()
        return self

    def extract_features(self, images: Tensor) -> Tensor:
        """What the classifier reads, (B, D), before dropout is of effect in evaluation mode."""
        return self.network.forward_head(self.network.forward_features(images), pre_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, channels, H, W)."""
        if self.standardise is None:
            return self.network(images)
        with torch.no_grad():
            features = self.extract_features(images)
        features = functional.dropout(self.standardise(features), self.hparams.dropout, self.training)
        return self._classifier()(features)

    def deployable_network(self) -> nn.Module:
        """A copy of the timm model for evaluation, images -> logits; its classifier includes the standardisation."""
        network = copy.deepcopy(self.network).eval()
        if self.standardise is not None:
            _fold(self.standardise, network.get_submodule(classifier_names(network)[0]))
        return network

    def on_train_start(self) -> None:
        """Weigh the classes by their number of training samples."""
        if self.hparams.class_weight != "none":
            counts = count_classes(self.trainer.train_dataloader.dataset, self.hparams.num_classes)
            self.class_weights.copy_(class_weights(counts, self.hparams.class_weight))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Cross-entropy with label smoothing and class weights, or with the targets of mixed images.

        ``train/acc`` counts the label that has the larger share of a mixed image.

        Raises:
            ValueError: for a batch of 1 with ``freeze``.
        """
        if self.standardise is not None and len(batch.labels) < 2:
            raise ValueError(
                "a training batch holds 1 image, but features are standardised over a batch of at least 2 per device: "
                "raise data.batch_size above 1, or set data.drop_last: true if that is the rest of an epoch"
            )
        images, targets = self._mix(batch, batch_idx)
        logits = _full_precision(self(images))
        loss = self._training_loss(logits, targets)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        self.log_epoch({"train/loss": loss, "train/acc": accuracy}, batch_size=len(logits))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        return {"loss": loss}

    def _mix(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Images and labels (B,), or with mixing other images and targets (B, C)."""
        if self.mixing is None:
            return batch.images, batch.labels
        seed = int(os.environ.get("PL_GLOBAL_SEED") or 0)
        return self.mixing(batch.images, batch.labels, (seed, self.global_rank, self.global_step, batch_idx))

    def _training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 2:
            return functional.cross_entropy(logits, targets.to(logits.dtype))
        smoothing = self.hparams.label_smoothing
        return functional.cross_entropy(
            logits, targets, weight=self.class_weights, label_smoothing=smoothing, ignore_index=-1
        )

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Update the metrics with labelled images; return all probabilities."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Same as the validation step."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities (B, C) and index."""
        return {"index": batch.index, "probabilities": _full_precision(self(batch.images)).softmax(1)}

    def pictures(self, batch: Any) -> dict[str, list[tuple[Tensor, str]]]:
        """The first images of a batch with the most probable class, its probability, and the label.

        Returns:
            Under ``val/predictions``: pictures (3, H, W) in [0, 1] with captions.
        """
        images = batch.images[:SHOWN_IMAGES]
        probabilities, classes = _full_precision(self(images)).softmax(1).max(1)
        names = self.hparams.class_names or [str(label) for label in range(self.hparams.num_classes)]
        labels = [
            f"label {names[label]}" if label >= 0 else "no label" for label in batch.labels[: len(images)].tolist()
        ]
        told = zip(classes.tolist(), probabilities.tolist(), labels, strict=True)
        captions = [f"{names[found]} {probability:.2f}, {label}" for found, probability, label in told]
        shown = displayable(images, getattr(self._trainer, "datamodule", None))
        return {"val/predictions": list(zip(shown, captions, strict=True))}

    def _evaluate(self, batch: Any, stage: str) -> dict[str, Tensor]:
        logits = _full_precision(self(batch.images))
        probabilities = logits.softmax(1)
        labelled = batch.labels >= 0
        if labelled.any():
            labels = batch.labels[labelled]
            self.losses[stage].update(functional.cross_entropy(logits[labelled], labels, reduction="none"))
            self._metrics(stage).update(probabilities[labelled], labels)
        return {"probabilities": probabilities, "labels": batch.labels, "index": batch.index}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and, as ``val/main``, the main one."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics and, as ``test/main``, the main one."""
        self._log_metrics("test")

    def _metrics(self, stage: str) -> nn.Module:
        return self.val_metrics if stage == "val" else self.test_metrics

    def evaluation_scores(self, stage: str) -> dict[str, Tensor]:
        """Compute and reset what the evaluation steps have gathered; empty without a labelled image.

        Args:
            stage: ``val`` or ``test``.

        Returns:
            Scores by the names they are logged under; ``<stage>/main`` is the one that a run is selected by.
        """
        metrics, losses = self._metrics(stage), self.losses[stage]
        if not torch.distributed.is_initialized() and not losses.weight:
            rank_zero_warn(f"{stage}: no labelled image, so there are no metrics.")
            return {}
        values = metrics.compute()
        values[f"{stage}/loss"] = losses.compute()
        values[f"{stage}/main"] = values[f"{stage}/{self.hparams.main_metric}"]
        metrics.reset()
        losses.reset()
        return values

    def _log_metrics(self, stage: str) -> None:
        self.log_dict(self.evaluation_scores(stage), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """Optimizer with learning rates that fall towards the first layer, warm-up and schedule."""
        settings = self.hparams
        lr = scaled_lr(self.trainer, settings.lr, settings.lr_reference_batch)
        if settings.layer_decay < 1 and not settings.freeze:
            groups = layer_decay_groups(self.network, settings.weight_decay, lr, settings.layer_decay)
            groups += parameter_groups(self.auxiliary.named_parameters(), settings.weight_decay)
        else:
            groups = parameter_groups(self.named_parameters(), settings.weight_decay)
        ends = CosineEnds(
            scaled_lr(self.trainer, settings.lr_min, settings.lr_reference_batch),
            scaled_lr(self.trainer, settings.warmup_lr, settings.lr_reference_batch),
            settings.lr_noise,
        )
        betas = (settings.beta1, settings.beta2)
        optimizer = build_optimizer(groups, settings.optimizer, lr, betas=betas, momentum=settings.momentum)
        return with_schedule(self, optimizer, settings.schedule, settings.warmup_epochs, ends)

    def _classifier(self) -> nn.Module:
        if not hasattr(self.network, "get_classifier"):
            raise ValueError(f"freeze: {self.hparams.encoder} has no features to evaluate; take a timm model")
        return self.network.get_classifier()

    def _freeze(self) -> None:
        classifier = self._classifier()
        if not isinstance(classifier, nn.Linear):
            raise ValueError(
                f"freeze: {self.hparams.encoder} has a {type(classifier).__name__} as classifier; "
                "linear evaluation needs a model with one Linear layer"
            )
        self.network.requires_grad_(False)
        classifier.requires_grad_(True)
        # The statistics of frozen features stand still, so all batches count alike and no initial value has a share.
        self.standardise = nn.BatchNorm1d(classifier.in_features, affine=False, momentum=None)

    def _build_mixing(self) -> BatchMixing | None:
        settings = self.hparams
        alphas = (settings.mixup_alpha, settings.cutmix_alpha)
        if not any(alphas):
            return None
        shares = (settings.mixup_prob, settings.switch_prob)
        return BatchMixing(settings.num_classes, *alphas, *shares, settings.label_smoothing)

    def _check_settings(self) -> None:
        settings = self.hparams
        check_optimization(settings.lr, settings.weight_decay, settings.warmup_epochs, settings.lr_reference_batch)
        ends = CosineEnds(settings.lr_min, settings.warmup_lr, settings.lr_noise)
        check_cosine_ends(settings.schedule, settings.lr, ends)
        shares = (settings.mixup_prob, settings.switch_prob)
        check_mixing(settings.mixup_alpha, settings.cutmix_alpha, *shares, settings.class_weight)
        for field in ("dropout", "drop_path", "label_smoothing"):
            if not 0 <= settings[field] < 1:
                raise ValueError(f"{field}: {settings[field]} is outside [0, 1)")
        if not 0 < settings.layer_decay <= 1:
            raise ValueError(f"layer_decay: {settings.layer_decay} is outside (0, 1]")
        if settings.num_classes < 2:
            raise ValueError(f"num_classes: {settings.num_classes} is below 2; classification needs labelled classes")
        known = metric_names(settings.num_classes)
        if settings.main_metric not in known:
            raise ValueError(f"main_metric: {settings.main_metric!r} is unknown; expected {', '.join(known)}")
        names = settings.class_names
        if names is not None and len(names) != settings.num_classes:
            raise ValueError(f"class_names: {len(names)} names for {settings.num_classes} classes")


def _full_precision(logits: Tensor) -> Tensor:
    """Logits in at least 32 bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _fold(norm: nn.BatchNorm1d, linear: nn.Linear) -> None:
    scale = (norm.running_var + norm.eps).rsqrt()
    linear.weight.mul_(scale)
    linear.bias.sub_(linear.weight @ norm.running_mean)
