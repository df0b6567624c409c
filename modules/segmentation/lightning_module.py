"""Semantic segmentation with any timm backbone and one of five heads."""

import copy
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from modules.optimization import (
    OptimizerName,
    build_optimizer,
    check_optimization,
    groups_by_name,
    parameter_groups,
    scaled_lr,
    with_schedule,
)
from modules.segmentation.evaluation import EvaluationScores, logits_at_mask_size
from modules.segmentation.metrics import VOID, pixel_cross_entropy
from modules.segmentation.network import SINGLE_MAP_HEADS, HeadName, build_network
from modules.segmentation.pictures import panel
from modules.segmentation.segmentation_module import SegmentationModule, check_segmentation

PICTURES = 4


class DenseSegmenter(SegmentationModule):
    """A timm backbone with a segmentation head.

    The loss is the pixel-wise cross-entropy of the head plus ``auxiliary_weight`` times that of a small head on the
    last map but one. Evaluation compares at the size of the masks, whatever the size of the images.

    Args:
        backbone: timm model name.
        backbone_options: further arguments of the timm model, such as window_size and drop_path_rate of EMO.
        head: ``deeplabv3`` or ``pspnet`` on the last map; ``semantic_fpn``, ``segformer`` or ``upernet`` on the last
            four (these need the extra ``dense``).
        num_classes: C, from 2 to 255.
        class_names: for messages and reports; indices otherwise.
        image_size: side of the training images in pixels.
        in_channels: channels of the input.
        main_metric: which metric is logged as ``val/main`` too: miou, aacc or macc.
        mean: per channel, of values in [0, 1]; used to show pictures.
        std: per channel, of values in [0, 1]; used to show pictures.
        palette: colour (red, green, blue in 0..255) of each class, for pictures.
        init_from: file with weights of the backbone, read when a new training run starts.
        output_stride: stride of the last map: 32, or 8 or 16 for a backbone that can be dilated.
        frozen_stages: the first so many stages of the backbone stay as they are.
        norm_eval: the running statistics of the backbone's BatchNorm stay as they are.
        sync_batchnorm: statistics of BatchNorm over all processes, on GPUs.
        dropout: of channels before the classifiers.
        auxiliary_weight: of the auxiliary head's loss; 0 for none.
        class_weights: weight of each class in the training loss; null for equal ones.
        window: side in pixels of the windows that evaluation slides over an image; null for whole images.
        window_stride: distance of neighbouring windows; null for two thirds of ``window``.
        optimizer: ``adamw``, ``sgd`` or ``lars``.
        lr: peak learning rate of the backbone.
        lr_reference_batch: batch size that ``lr`` is meant for, scaled linearly to the global batch; null: no scaling.
        head_lr_multiplier: learning rate of the heads, as a multiple.
        weight_decay: not applied to biases and norms.
        official_decay: decay as in the official runs: all parameters but those with ``norm`` in their name.
        beta1: of AdamW.
        beta2: of AdamW.
        momentum: of SGD and LARS.
        schedule: after the warm-up, ``poly`` (power 0.9) or ``cosine`` to zero, or ``constant``.
        warmup_epochs: linear warm-up; null for a tenth of the run, at most 40 epochs.

    Raises:
        ValueError: for a value outside its range.
        ImportError: for a head whose package is missing.
    """

    def __init__(
        self,
        backbone: str = "emo_1m",
        backbone_options: dict[str, Any] | None = None,
        head: HeadName = "deeplabv3",
        num_classes: int = 11,
        class_names: list[str] | None = None,
        image_size: int = 64,
        in_channels: int = 3,
        main_metric: str = "miou",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        palette: list[list[int]] | None = None,
        init_from: str | None = None,
        output_stride: int = 32,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        sync_batchnorm: bool = True,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.4,
        class_weights: list[float] | None = None,
        window: int | None = None,
        window_stride: int | None = None,
        optimizer: OptimizerName = "adamw",
        lr: float = 1.2e-4,
        lr_reference_batch: int | None = None,
        head_lr_multiplier: float = 1.0,
        weight_decay: float = 0.01,
        official_decay: bool = False,
        beta1: float = 0.9,
        beta2: float = 0.999,
        momentum: float = 0.9,
        schedule: Literal["poly", "cosine", "constant"] = "poly",
        warmup_epochs: float | None = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._check_settings()
        self.network = build_network(
            backbone,
            head,
            num_classes,
            in_channels,
            output_stride,
            dropout,
            auxiliary=auxiliary_weight > 0,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            options=backbone_options,
        )
        weights = torch.ones(num_classes) if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights)
        self.scores = nn.ModuleDict({stage: EvaluationScores(num_classes) for stage in ("val", "test")})

    def setup(self, stage: str) -> None:
        """Let the processes share the statistics of BatchNorm, which a few images per GPU do not suffice for."""
        on_gpus = self.trainer.strategy.root_device.type == "cuda"
        if stage == "fit" and self.hparams.sync_batchnorm and on_gpus and self.trainer.world_size > 1:
            self.network = synchronise_statistics(self.network)

    def load_pretrained(self) -> None:
        """Copy the weights of ``init_from`` into the backbone.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if it does not fit, naming the tensors.
        """
        self.network.backbone.load_pretrained(self.hparams.init_from)
        rank_zero_info(f"Weights of the backbone taken from {self.hparams.init_from}.")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, H, W) of normalised images (B, channels, H, W)."""
        return self.network(images) if self.training else self.by_windows(self.network, images)

    def deployable_network(self) -> nn.Module:
        """A copy for evaluation without the auxiliary head: images (B, channels, H, W) -> logits (B, C, H, W)."""
        network = copy.deepcopy(self.network).eval()
        network.auxiliary = None
        return network

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Cross-entropy of both heads over labelled pixels.

        Raises:
            ValueError: for a batch of one image with a head that normalises means of whole images.
        """
        self._check_batch(len(batch.images))
        logits, auxiliary = self.network.forward_both(batch.images)
        logits = logits.float()
        loss = pixel_cross_entropy(logits, batch.masks, self.class_weights)
        values = {"train/acc": _pixel_accuracy(logits.detach().argmax(1), batch.masks)}
        if auxiliary is not None:
            values["train/auxiliary_loss"] = pixel_cross_entropy(auxiliary.float(), batch.masks, self.class_weights)
            loss = loss + self.hparams.auxiliary_weight * values["train/auxiliary_loss"]
        values = {"train/loss": loss, **values}
        self.log_dict(
            {name: value.detach() for name, value in values.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(logits),
        )
        self.log("loss", loss.detach(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        return {"loss": loss}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Index (B,) and a list of B masks (H, W) uint8 of the size of the pictures on disk."""
        masks = [logits.argmax(1).byte() for logits, _ in logits_at_mask_size(self, batch)]
        return {"index": batch.index, "masks": [mask for group in masks for mask in group]}

    def pictures(self, batch: Any) -> dict[str, list[tuple[Tensor, str]]]:
        """Image, label and prediction side by side, of the first images of a batch."""
        few = type(batch)(batch.images[:PICTURES], batch.masks[:PICTURES], batch.index[:PICTURES])
        with torch.no_grad():
            found = self.predict_step(few, 0)["masks"]
        shown = []
        for image, label, prediction, row in zip(few.images, few.masks, found, few.index.tolist(), strict=True):
            accuracy = _pixel_accuracy(prediction, label).item()
            shown.append(
                (panel(self.colours(image), label, prediction, self.palette), f"row {row}: {accuracy:.0%} of pixels")
            )
        return {"val/segmentation": shown}

    def evaluate_batch(self, batch: Any, stage: str) -> dict[str, Any]:
        """Update the metrics; return index and predicted masks."""
        found: list[Tensor] = []
        for logits, masks in logits_at_mask_size(self, batch):
            found += list(self.scores[stage].update(logits, masks))
        return {"index": batch.index, "masks": found}

    def confusion(self, stage: str) -> Tensor:
        """Counts (C, C) of the evaluation so far, row = label; to be called by all processes.

        Args:
            stage: ``val`` or ``test``.
        """
        return self.scores[stage].confusion()

    def evaluation_scores(self, stage: str) -> dict[str, Tensor]:
        """Compute and reset what the evaluation steps have gathered; empty without a labelled pixel.

        Args:
            stage: ``val`` or ``test``.

        Returns:
            Scores by the names they are logged under; ``<stage>/main`` is the one that a run is selected by.
        """
        values = self.scores[stage].result()
        if not values:
            rank_zero_warn(f"{stage}: no labelled pixel, so there are no metrics.")
            return {}
        return {f"{stage}/{name}": value for name, value in values.items()} | {
            f"{stage}/main": values[self.hparams.main_metric]
        }

    def configure_optimizers(self) -> dict[str, Any]:
        """Optimizer with own rates for backbone and heads, and the schedule."""
        settings = self.hparams
        lr = scaled_lr(self.trainer, settings.lr, settings.lr_reference_batch)
        split = groups_by_name if settings.official_decay else parameter_groups
        groups = []
        for inside, rate in ((True, lr), (False, lr * settings.head_lr_multiplier)):
            named = [
                (name, parameter)
                for name, parameter in self.network.named_parameters()
                if name.startswith("backbone.") is inside
            ]
            groups += [group | {"lr": rate} for group in split(named, settings.weight_decay)]
        betas = (settings.beta1, settings.beta2)
        optimizer = build_optimizer(groups, settings.optimizer, lr, betas=betas, momentum=settings.momentum)
        return with_schedule(self, optimizer, settings.schedule, settings.warmup_epochs)

    def _check_batch(self, images: int) -> None:
        synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in self.network.head.modules())
        if images < 2 and self.hparams.head in SINGLE_MAP_HEADS and not synchronised:
            raise ValueError(
                f"a training batch holds 1 image, but the head {self.hparams.head} normalises means of whole images "
                "over a batch of at least 2 per device: raise data.batch_size above 1, or set data.drop_last: true if "
                "that is the rest of an epoch"
            )

    def _check_settings(self) -> None:
        settings = self.hparams
        check_optimization(settings.lr, settings.weight_decay, settings.warmup_epochs, settings.lr_reference_batch)
        check_segmentation(settings)
        if not 0 <= settings.dropout < 1:
            raise ValueError(f"dropout: {settings.dropout} is outside [0, 1)")
        if settings.auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight: {settings.auxiliary_weight} is negative; expected >= 0")
        if not settings.head_lr_multiplier > 0:
            raise ValueError(f"head_lr_multiplier: {settings.head_lr_multiplier} is not positive")
        weights = settings.class_weights
        if weights is not None and len(weights) != settings.num_classes:
            raise ValueError(f"class_weights: {len(weights)} values for {settings.num_classes} classes")


def synchronise_statistics(network: nn.Module) -> nn.Module:
    """Replace each BatchNorm by one with statistics over all processes; timm's keep their activation."""
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(network)


def _pixel_accuracy(predictions: Tensor, masks: Tensor) -> Tensor:
    """Share of labelled pixels that are right; 0 where none is labelled."""
    labelled = masks != VOID
    return ((predictions == masks) & labelled).sum() / labelled.sum().clamp(min=1)
