"""Object detection: SSDLite or RetinaNet on any timm model."""

import copy
import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from modules.auxiliary import AuxiliaryObjectives
from modules.detection.average_precision import SCORES, AveragePrecision
from modules.detection.raw_detections import RawDetections
from modules.feature_backbones import FeatureBackbone
from modules.optimization import (
    build_optimizer,
    check_optimization,
    groups_by_name,
    parameter_groups,
    scaled_lr,
    with_epoch_cosine,
    with_schedule,
)

DetectorName = Literal["ssdlite", "retinanet"]

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LOSSES = {"classification": "train/classification", "bbox_regression": "train/regression"}
SHOWN_IMAGES = 8
DIVISOR = 32


class Detector(AuxiliaryObjectives, LightningModule):
    """A timm model with the head of a one-stage detector, trained from images in [0, 1] and boxes.

    The network normalises the images itself. Labels start at 1, and 0 is the background.

    Args:
        detector: ``ssdlite`` (images resized to a square) or ``retinanet`` (images as they come, padded in a batch).
        backbone: timm model name.
        backbone_options: further arguments of the timm model, such as ``window_size``.
        num_classes: C, without the background; the background is added inside.
        class_names: of the classes, for pictures and metrics; numbers otherwise.
        image_size: side of the square of SSDLite, and of the images of an exported network.
        in_channels: channels of the images.
        main_metric: which metric is logged as ``val/main`` too: map, map_50, map_75, map_small, map_medium, map_large.
        mean: per channel, of values in [0, 1]; null for that of ImageNet.
        std: per channel, of values in [0, 1]; null for that of ImageNet.
        init_from: file with weights of the backbone: a checkpoint of this suite, a timm state dictionary, or
            safetensors. Read when a new training run starts; the heads are not taken from it.
        frozen_stages: the first so many stages of the backbone keep their weights.
        norm_eval: the statistics of all norms of the backbone stay as they are loaded.
        score_threshold: lowest score of a detection; null for the recipe's (SSDLite 0.02, RetinaNet 0.05).
        picture_threshold: lowest score of a box that is drawn.
        class_metrics: log the average precision of each class too.
        lr: peak learning rate of AdamW.
        lr_reference_batch: batch size that ``lr`` is meant for, scaled linearly to the global batch; null: no scaling.
        weight_decay: not applied to parameters with one axis.
        official_decay: decay as the official runs do: everything but what has ``norm`` in its name.
        beta1: of AdamW.
        beta2: of AdamW.
        schedule: ``epoch_cosine`` (a cosine to zero in steps of an epoch), ``cosine`` or ``constant``.
        warmup_steps: optimizer steps of the linear warm-up of ``epoch_cosine``.
        warmup_epochs: linear warm-up of the other schedules; null for a tenth of the run, at most 40 epochs.

    Raises:
        ValueError: for a value outside its range.
        ModuleNotFoundError: if no package computes average precision.
    """

    def __init__(
        self,
        detector: DetectorName = "ssdlite",
        backbone: str = "emo_1m",
        backbone_options: dict[str, Any] | None = None,
        num_classes: int = 80,
        class_names: list[str] | None = None,
        image_size: int = 320,
        in_channels: int = 3,
        main_metric: str = "map",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        init_from: str | None = None,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        score_threshold: float | None = None,
        picture_threshold: float = 0.3,
        class_metrics: bool = False,
        lr: float = 1.2e-3,
        lr_reference_batch: int | None = 192,
        weight_decay: float = 0.05,
        official_decay: bool = False,
        beta1: float = 0.9,
        beta2: float = 0.999,
        schedule: Literal["epoch_cosine", "cosine", "constant"] = "epoch_cosine",
        warmup_steps: int = 500,
        warmup_epochs: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._check_settings()
        self.network = self._build()
        if score_threshold is not None:
            self.network.score_thresh = score_threshold
        names = (class_names or [str(label) for label in range(1, num_classes + 1)]) if class_metrics else None
        self.val_metric, self.test_metric = AveragePrecision(names), AveragePrecision(names)
        self.init_auxiliary()

    @property
    def features(self) -> FeatureBackbone:
        """The timm model below the head."""
        return self.network.backbone.backbone

    def on_fit_start(self) -> None:
        """Take pre-trained weights at the start of a new training run; a resumed one brings its own."""
        if self.trainer.ckpt_path is not None:
            return
        settings = self.hparams
        if settings.init_from:
            self.features.load_pretrained(settings.init_from)
            rank_zero_info(f"Weights of the backbone taken from {settings.init_from}.")
        elif settings.frozen_stages or settings.norm_eval:
            rank_zero_warn(
                f"frozen_stages: {settings.frozen_stages} and norm_eval: {settings.norm_eval} without init_from keep "
                "random weights and statistics as they are; give weights with --model.init_from, or set 0 and false."
            )

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of images (C, h, w) in [0, 1], in evaluation mode.

        Returns:
            For each image ``boxes`` (n, 4) xyxy in its pixels, ``labels`` (n,) from 1 and ``scores`` (n,), best first.
        """
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Sum of the losses of classes and boxes.

        Raises:
            ValueError: for a batch of 1 with SSDLite, whose last levels are single cells that norms need two of.
        """
        if self.hparams.detector == "ssdlite" and len(batch.images) < 2:
            raise ValueError(
                "a training batch holds 1 image, but the norms of SSDLite need at least 2 per device: raise "
                "data.batch_size above 1, or set data.drop_last: true if that is the rest of an epoch"
            )
        targets = [{key: target[key] for key in ("boxes", "labels")} for target in batch.targets]
        parts = self.network(batch.images, targets)
        loss = sum(parts.values())
        logged = {"train/loss": loss} | {LOSSES[name]: value for name, value in parts.items()}
        self.log_epoch(logged, batch_size=len(batch.images))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Update the metric; return detections and index."""
        return self._evaluate(batch, self.val_metric)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Same as the validation step."""
        return self._evaluate(batch, self.test_metric)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Index (B,) and detections of each image, boxes in pixels of the picture on disk."""
        return {"index": batch.index, "detections": self._detections(batch)}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and, as ``val/main``, the main one."""
        self._log_metric(self.val_metric, "val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics and, as ``test/main``, the main one."""
        self._log_metric(self.test_metric, "test")

    def evaluation_scores(self, stage: str) -> dict[str, Tensor]:
        """Compute and reset what the evaluation steps have gathered.

        Args:
            stage: ``val`` or ``test``.

        Returns:
            Scores by the names they are logged under; ``<stage>/main`` is the one that a run is selected by.
        """
        metric = self.val_metric if stage == "val" else self.test_metric
        values = {f"{stage}/{name}": value for name, value in metric.compute().items()}
        metric.reset()
        return values | {f"{stage}/main": values[f"{stage}/{self.hparams.main_metric}"]}

    def pictures(self, batch: Any) -> dict[str, list[tuple[Tensor, str]]]:
        """Boxes of the data (green) and of the network (red) on the first images of a batch.

        Args:
            batch: its first images are shown.

        Returns:
            Under ``val/boxes``: pictures (3, H, W) in [0, 1] with the numbers of boxes.
        """
        images, targets = batch.images[:SHOWN_IMAGES], batch.targets[:SHOWN_IMAGES]
        training = self.training
        with torch.no_grad():
            found = self.eval()(images)
        self.train(training)
        return {"val/boxes": [self._picture(*shown) for shown in zip(images, targets, found, strict=True)]}

    def deployable_network(self) -> RawDetections:
        """A copy for evaluation: square images (B, channels, S, S) in [0, 1] to (B, anchors, 4 + C).

        The first four columns are boxes xyxy in pixels, the others scores of the classes, of every anchor: the score
        threshold and the suppression of overlapping boxes are left to whoever runs it.
        """
        settings = self.hparams
        size = settings.image_size
        if settings.detector == "retinanet":
            size = math.ceil(size / DIVISOR) * DIVISOR
        softmax = settings.detector == "ssdlite"
        return RawDetections(copy.deepcopy(self.network).cpu().eval(), size, settings.in_channels, softmax).eval()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with warm-up and schedule."""
        settings = self.hparams
        lr = scaled_lr(self.trainer, settings.lr, settings.lr_reference_batch)
        make_groups = groups_by_name if settings.official_decay else parameter_groups
        groups = make_groups(self.named_parameters(), settings.weight_decay)
        optimizer = build_optimizer(groups, "adamw", lr, betas=(settings.beta1, settings.beta2), momentum=0.0)
        if settings.schedule == "epoch_cosine":
            return with_epoch_cosine(self, optimizer, settings.warmup_steps)
        return with_schedule(self, optimizer, settings.schedule, settings.warmup_epochs)

    def _evaluate(self, batch: Any, metric: AveragePrecision) -> dict[str, Any]:
        detections = self._detections(batch)
        metric.update(detections, _on_disk(batch.targets, batch), batch.index)
        return {"index": batch.index, "detections": detections}

    def _detections(self, batch: Any) -> list[dict[str, Tensor]]:
        return _on_disk(self(batch.images), batch)

    def _log_metric(self, metric: AveragePrecision, stage: str) -> None:
        if metric.update_called:
            self.log_dict(self.evaluation_scores(stage), sync_dist=True)

    def _picture(self, image: Tensor, target: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[Tensor, str]:
        kept = found["scores"] >= self.hparams.picture_threshold
        boxes, labels, scores = (found[key][kept].cpu() for key in ("boxes", "labels", "scores"))
        names = [self._name(label) for label in labels.tolist()]
        texts = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
        true_names = [self._name(label) for label in target["labels"].tolist()]
        shown = _draw(image.detach().cpu(), target["boxes"].cpu(), true_names, "lime")
        return _draw(shown, boxes, texts, "red"), f"{len(true_names)} objects, {len(texts)} detections"

    def _name(self, label: int) -> str:
        names = self.hparams.class_names
        return names[label - 1] if names else str(label)

    def _build(self) -> nn.Module:
        from modules.detection import retinanet, ssdlite

        settings = self.hparams
        recipe = ssdlite if settings.detector == "ssdlite" else retinanet
        backbone = FeatureBackbone(
            settings.backbone,
            recipe.STAGES,
            settings.in_channels,
            frozen_stages=settings.frozen_stages,
            norm_eval=settings.norm_eval,
            options=settings.backbone_options,
        )
        mean, std = settings.mean or IMAGENET_MEAN, settings.std or IMAGENET_STD
        if recipe is ssdlite:
            return ssdlite.build_ssdlite(backbone, settings.num_classes, settings.image_size, mean, std)
        return retinanet.build_retinanet(backbone, settings.num_classes, mean, std)

    def _check_settings(self) -> None:
        settings = self.hparams
        check_optimization(settings.lr, settings.weight_decay, settings.warmup_epochs, settings.lr_reference_batch)
        if settings.detector not in ("ssdlite", "retinanet"):
            raise ValueError(f"detector: {settings.detector!r} is unknown; expected ssdlite or retinanet")
        if settings.warmup_steps < 0:
            raise ValueError(f"warmup_steps: {settings.warmup_steps} is negative; expected >= 0")
        if settings.num_classes < 1:
            raise ValueError(f"num_classes: {settings.num_classes} is below 1; it counts classes without background")
        if settings.image_size < DIVISOR:
            raise ValueError(f"image_size: {settings.image_size} is below {DIVISOR}, the stride of the last map")
        if settings.main_metric not in SCORES:
            raise ValueError(f"main_metric: {settings.main_metric!r} is unknown; expected {', '.join(SCORES)}")
        for field in ("score_threshold", "picture_threshold"):
            if settings[field] is not None and not 0 <= settings[field] < 1:
                raise ValueError(f"{field}: {settings[field]} is outside [0, 1)")
        for field in ("mean", "std"):
            if len(settings[field] or IMAGENET_MEAN) != settings.in_channels:
                raise ValueError(f"{field}: expected {settings.in_channels} values, one per channel (in_channels)")
        names = settings.class_names
        if names is not None and len(names) != settings.num_classes:
            raise ValueError(f"class_names: {len(names)} names for {settings.num_classes} classes")


def _on_disk(boxes: list[dict[str, Tensor]], batch: Any) -> list[dict[str, Tensor]]:
    """Boxes in pixels of the image that the network was given, in pixels of the picture on disk."""
    scaled = []
    for found, image, target in zip(boxes, batch.images, batch.targets, strict=True):
        height, width = image.shape[-2:]
        factors = target["size"].flip(0) / target["size"].new_tensor([width, height])
        scaled.append({**found, "boxes": found["boxes"] * factors.repeat(2)})
    return scaled


def _draw(image: Tensor, boxes: Tensor, labels: list[str], colour: str) -> Tensor:
    if not labels:
        return image
    from torchvision.utils import draw_bounding_boxes

    pixels = (image.clamp(0, 1) * 255).round().byte()
    return draw_bounding_boxes(pixels, boxes, labels, colors=colour).float() / 255
