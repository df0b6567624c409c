"""PRCL as a LightningModule: a student, its mean teacher, and a contrast of pixel representations between them."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from modules.optimization import epoch_poly, scaled_lr, steps_per_epoch, total_steps_of
from modules.prcl.contrast import ContrastResult, PixelContrast
from modules.prcl.losses import confidence_weighted_cross_entropy, ramp
from modules.prcl.monitoring import ClassMeans, EpochSums, PseudoLabelQuality, StepMeans
from modules.prcl.network import PixelOutputs, RepresentationHeads, flat_pixels, nearest, pixel_outputs
from modules.prcl.similarity import Gaussians, Reduction
from modules.prcl.strong_views import MixName, PseudoLabelled, StrongViews
from modules.segmentation.deeplabv3plus import DeepLabV3Plus, resize_aligned
from modules.segmentation.evaluation import (
    EvaluationScores,
    groups_of_one_size,
    logits_at_mask_size,
    multi_scale_logits,
)
from modules.segmentation.heads import resize_logits
from modules.segmentation.lightning_module import synchronise_statistics
from modules.segmentation.metrics import VOID, pixel_cross_entropy
from modules.segmentation.pictures import panel
from modules.segmentation.segmentation_module import SegmentationModule, check_segmentation

Method = Literal["prcl", "point_contrast", "mean_teacher", "supervised"]

DISTRIBUTION_TEMPERATURE, POINT_TEMPERATURE = 100.0, 0.5
PICTURES = 4


class ProbabilisticSegmenter(SegmentationModule):
    """Semi-supervised segmentation with DeepLabv3+ on any timm backbone.

    ``loss = supervised + unsupervised_weight * unsupervised + w(t) * contrast``. The teacher, an average of the
    student that a callback (``callbacks.EMATarget``) moves, labels weak views of unlabelled images, and the student
    learns from strong ones. A training batch is a dictionary of two batches, ``labeled`` and ``unlabeled``.

    Args:
        method: ``prcl``; ``point_contrast``: representations without uncertainty, compared by their cosine;
            ``mean_teacher``: without contrast; ``supervised``: with labelled images only, and without a teacher.
        backbone: timm model name.
        backbone_options: further arguments of the timm model.
        num_classes: C, from 2 to 255.
        class_names: for messages and reports; indices otherwise.
        image_size: of the training images in pixels, a side or [height, width]; at least 33.
        in_channels: channels of the input.
        main_metric: which metric is logged as ``val/main`` too: miou, aacc or macc (of the teacher if there is one).
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        palette: colour (red, green, blue in 0..255) of each class, for pictures.
        flip: whether a mirrored image shows the same classes.
        init_from: file with weights of the backbone, read when a new training run starts.
        output_stride: stride of the backbone's last map: 8, 16 or 32.
        decoder_channels: width of the decoder and of the head of the representation's mean, where a small backbone
            spends most of its time.
        sync_batchnorm: statistics of BatchNorm over all processes, on GPUs.
        dimensions: D of a pixel's representation.
        anchors: Q anchors of each class in a step.
        negatives: K negatives of each anchor.
        temperature: of the similarity; null: 100 for distributions, 0.5 for points.
        mls_reduction: ``sum`` over dimensions, or ``mean`` as in the released code.
        global_prototypes: fuse prototypes over the whole training (journal version).
        forget: factor on the old precision of these, in (0, 1].
        virtual_negatives: points of each other class drawn from its global prototype (journal version).
        virtual_radius: factor on the standard deviation they are drawn with.
        unsupervised_weight: of the cross-entropy with pseudo-labels.
        contrast_weight: of the contrast in its first epoch.
        contrast_begin: epoch from which on there is a contrast.
        contrast_end: epoch from which on its weight is ``contrast_floor``; null for the last one.
        contrast_floor: least weight of the contrast.
        contrast_rate: -5 lets the weight fall by ``exp(-5 x^2)``; 0 keeps it.
        variance_weight: of the mean variance as a further term.
        unsupervised_threshold: confidence from which on a pixel raises its image's weight.
        weak_threshold: confidence from which on an unlabelled pixel takes part in the contrast.
        strong_threshold: probability of its class below which a pixel can be an anchor.
        mix: ``classmix``, ``cutmix``, ``cutout`` or ``none``.
        strong_scale: smallest and largest factor of the size of strong views.
        photometric: change the colours of strong views.
        joint_forward: labelled and unlabelled images share the statistics of BatchNorm.
        window: side in pixels of the windows that evaluation slides over an image; null for whole images.
        window_stride: distance of neighbouring windows; null for two thirds of ``window``.
        scales: factors of the size whose predictions are averaged in evaluation.
        test_flip: average those of mirrored images as well.
        lr: learning rate of the student.
        lr_reference_batch: number of labelled images in a step that ``lr`` and ``probability_lr`` are meant for, scaled
            linearly; null: no scaling.
        head_lr_multiplier: learning rate of all but the backbone, as a multiple.
        probability_lr: of the head of the variance ("soft freezing").
        min_lr: the learning rates do not fall below it.
        weight_decay: of all parameters.
        momentum: of SGD with Nesterov's.

    Raises:
        ValueError: for a value outside its range.

    Source: Xie et al., PRCL (AAAI 2023), and its journal version (IJCV 2024) where options say so.
    """

    def __init__(
        self,
        method: Method = "prcl",
        backbone: str = "resnet101",
        backbone_options: dict[str, Any] | None = None,
        num_classes: int = 11,
        class_names: list[str] | None = None,
        image_size: int | list[int] = 64,
        in_channels: int = 3,
        main_metric: str = "miou",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        palette: list[list[int]] | None = None,
        flip: bool = True,
        init_from: str | None = None,
        output_stride: int = 16,
        decoder_channels: int = 256,
        sync_batchnorm: bool = True,
        dimensions: int = 256,
        anchors: int = 256,
        negatives: int = 512,
        temperature: float | None = None,
        mls_reduction: Reduction = "sum",
        global_prototypes: bool = False,
        forget: float = 1.0,
        virtual_negatives: int = 0,
        virtual_radius: float = 1.0,
        unsupervised_weight: float = 1.0,
        contrast_weight: float = 1.0,
        contrast_begin: float = 0.0,
        contrast_end: float | None = None,
        contrast_floor: float = 0.0,
        contrast_rate: float = -5.0,
        variance_weight: float = 0.0,
        unsupervised_threshold: float = 0.97,
        weak_threshold: float = 0.7,
        strong_threshold: float = 0.8,
        mix: MixName = "classmix",
        strong_scale: list[float] = (0.5, 1.5),
        photometric: bool = True,
        joint_forward: bool = False,
        window: int | None = None,
        window_stride: int | None = None,
        scales: list[float] = (1.0,),
        test_flip: bool = False,
        lr: float = 3.2e-3,
        lr_reference_batch: int | None = None,
        head_lr_multiplier: float = 1.0,
        probability_lr: float = 5e-5,
        min_lr: float = 1e-6,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_settings(self.hparams)
        self.student = DeepLabV3Plus(
            backbone, num_classes, in_channels, output_stride, decoder_channels, options=backbone_options
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False) if self.has_teacher else None
        self.heads = self.contrast = None
        if method in ("prcl", "point_contrast"):
            point = method == "point_contrast"
            self.heads = RepresentationHeads(
                self.student.feature_channels, dimensions, not point, channels=decoder_channels
            )
            self.contrast = PixelContrast(
                num_classes,
                dimensions,
                representation="point" if point else "distribution",
                anchors=anchors,
                negatives=negatives,
                temperature=temperature or (POINT_TEMPERATURE if point else DISTRIBUTION_TEMPERATURE),
                reduction=mls_reduction,
                global_prototypes=global_prototypes,
                forget=forget,
                virtual_negatives=virtual_negatives,
                virtual_radius=virtual_radius,
            )
        self.strong_views = StrongViews(
            strong_scale, mix, mean or [0.0] * in_channels, std or [1.0] * in_channels, photometric, flip
        )
        self.scores = nn.ModuleDict(
            {f"{stage}_{name}": EvaluationScores(num_classes) for stage in ("val", "test") for name in self.networks}
        )
        self.class_variance, self.prototype_precision = ClassMeans(num_classes), ClassMeans(num_classes)
        self.class_anchors = ClassMeans(num_classes)
        self.quality = PseudoLabelQuality(unsupervised_threshold)
        self.terms = StepMeans(self._watched_terms())
        self.loss_terms: dict[str, Tensor] = {}
        self._shown: PseudoLabelled | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether there are pseudo-labels."""
        return self.hparams.method != "supervised"

    @property
    def networks(self) -> dict[str, DeepLabV3Plus]:
        """The segmenters that are evaluated, the one that counts first."""
        return {"teacher": self.teacher, "student": self.student} if self.has_teacher else {"student": self.student}

    # Start of a run

    def setup(self, stage: str) -> None:
        """Let the processes share the statistics of BatchNorm, which a few images per GPU do not suffice for."""
        on_gpus = self.trainer.strategy.root_device.type == "cuda"
        if stage == "fit" and self.hparams.sync_batchnorm and on_gpus and self.trainer.world_size > 1:
            for name in ("student", "teacher", "heads"):
                if getattr(self, name) is not None:
                    setattr(self, name, synchronise_statistics(getattr(self, name)))

    def on_fit_start(self) -> None:
        """Take pre-trained weights at the start of a new run, and warn of a teacher that nothing would move."""
        super().on_fit_start()
        targets = [getattr(callback, "target", None) for callback in self.trainer.callbacks]
        if self.has_teacher and "teacher" not in targets:
            rank_zero_warn(
                "no callback moves the teacher, so that its pseudo-labels stay those of its first weights; set "
                "callbacks.teacher to callbacks.EMATarget with online: student and target: teacher"
            )

    def load_pretrained(self) -> None:
        """Copy the weights of ``init_from`` into the backbones of student and teacher.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if it does not fit, naming the tensors.
        """
        for network in self.networks.values():
            network.backbone.load_pretrained(self.hparams.init_from)
        rank_zero_info(f"Weights of the backbone taken from {self.hparams.init_from}.")

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Loss of one labelled and one unlabelled batch.

        Args:
            batch: ``labeled`` and, unless the method is ``supervised``, ``unlabeled``, each with ``images``
                (B, channels, H, W) and ``masks`` (B, H, W), 255 for void. The unlabelled masks are only watched. For
                ``supervised`` the labelled batch itself is enough.
            batch_idx: position in the epoch.

        Raises:
            ValueError: without one of the two, and for a batch of one image, whose mean over the image BatchNorm cannot
                normalise.
        """
        if not self.has_teacher and not isinstance(batch, dict):
            batch = {"labeled": batch}
        self._check_streams(batch)
        for part in batch.values():
            self._check_batch(len(part.images))
        labeled = batch["labeled"]
        strong = self._strong_views(batch["unlabeled"]) if self.has_teacher else None
        outputs = self._student_outputs(labeled.images, strong)
        logits = resize_aligned(outputs[0].logits.float(), labeled.images.shape[2:])
        terms = {"supervised_loss": pixel_cross_entropy(logits, labeled.masks)}
        loss = terms["supervised_loss"]
        if strong is not None:
            logits = resize_aligned(outputs[1].logits.float(), strong.images.shape[2:])
            terms["unsupervised_loss"] = confidence_weighted_cross_entropy(
                logits, strong.labels, strong.confidence, self.hparams.unsupervised_threshold
            )
            loss = loss + self.hparams.unsupervised_weight * terms["unsupervised_loss"]
        watched: dict[str, Tensor] = {}
        if self.contrast is not None:
            result, variance, watched = self._contrast(outputs, labeled.masks, strong)
            terms["contrast_loss"] = result.loss
            loss = loss + self.contrast_weight() * result.loss
            if variance is not None:
                terms["variance"] = variance
                loss = loss + self.hparams.variance_weight * variance
        self.loss_terms = {name: value.detach() for name, value in terms.items()}
        self.terms.update({"loss": loss, **terms, **watched}, len(labeled.images))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        return {"loss": loss}

    def _check_batch(self, images: int) -> None:
        synchronised = isinstance(self.student.aspp.pool.bn, nn.SyncBatchNorm)
        if images < 2 and not synchronised:
            sizes = "data.batch_size and data.unlabeled_batch_size above 1"
            if not self.has_teacher:
                sizes = "data.batch_size above 1, or set data.drop_last: true if that is the rest of an epoch"
            raise ValueError(
                "a training batch holds 1 image, but the head normalises means of whole images over a batch of at "
                f"least 2 per device: raise {sizes}"
            )

    def _check_streams(self, batch: Any) -> None:
        needed = ["labeled", "unlabeled"] if self.has_teacher else ["labeled"]
        given = list(batch) if isinstance(batch, dict) else [type(batch).__name__]
        if lost := [name for name in needed if name not in given]:
            remedy = "true, or set model.method to supervised" if self.has_teacher else "false"
            raise ValueError(
                f"method {self.hparams.method} learns from batches {' and '.join(needed)}, but the data gives "
                f"{', '.join(given)} without {' and '.join(lost)}: take datamodules.SemiSupervisedSegmentation with "
                f"data.use_unlabeled {remedy}"
            )

    def contrast_weight(self) -> float:
        """Weight of the contrast in the current epoch."""
        options = self.hparams
        end = options.contrast_end if options.contrast_end is not None else self._epochs()
        return ramp(
            self.current_epoch,
            options.contrast_begin,
            end,
            options.contrast_weight,
            options.contrast_floor,
            options.contrast_rate,
        )

    def _epochs(self) -> float:
        """Length of the run in epochs.

        Raises:
            ValueError: if it has no end, as the learning rates fall until then.
        """
        if (self.trainer.max_epochs or -1) > 0 and self.trainer.max_steps == -1:
            return self.trainer.max_epochs
        return math.ceil(total_steps_of(self.trainer, "poly") / steps_per_epoch(self.trainer))

    @torch.no_grad()
    def _strong_views(self, unlabeled: Any) -> PseudoLabelled:
        """Label the weak views with the teacher and make strong ones of them."""
        probabilities = self.teacher(unlabeled.images).float().softmax(1)
        confidence, labels = probabilities.max(1)
        self.quality.update(labels, confidence, unlabeled.masks)
        strong = self.strong_views(PseudoLabelled(unlabeled.images, labels, confidence))
        self._shown = PseudoLabelled(*(part[:PICTURES] for part in strong))
        return strong

    def _student_outputs(self, images: Tensor, strong: PseudoLabelled | None) -> list[PixelOutputs]:
        """Outputs for labelled images and, if there are some, for strong views."""
        if strong is None:
            return [pixel_outputs(self.student, self.heads, images)]
        if not self.hparams.joint_forward:
            return [pixel_outputs(self.student, self.heads, part) for part in (images, strong.images)]
        if images.shape[1:] != strong.images.shape[1:]:
            raise ValueError("joint_forward needs labelled and unlabelled images of one size; set it to false")
        both = pixel_outputs(self.student, self.heads, torch.cat([images, strong.images]))
        parts = [len(images), len(strong.images)]
        logits = both.logits.split(parts)
        if both.representation is None:
            return [PixelOutputs(part, None) for part in logits]
        mean, variance = (part.split(parts) for part in both.representation)
        return [PixelOutputs(logits[i], Gaussians(mean[i], variance[i])) for i in range(2)]

    def _contrast(
        self, outputs: Sequence[PixelOutputs], masks: Tensor, strong: PseudoLabelled
    ) -> tuple[ContrastResult, Tensor | None, dict[str, Tensor]]:
        """The contrast over labelled and unlabelled pixels, their mean variance if it is asked for, and terms to watch.

        Of these, ``trusted_share`` is the share of the strong views' pixels that take part: those whose pseudo-label
        has at least the confidence ``weak_threshold``.
        """
        labels, valid, hard, means, variances = [], [], [], [], []
        for output, full, confidence in zip(outputs, (masks, strong.labels), (None, strong.confidence), strict=True):
            size = output.logits.shape[2:]
            label = nearest(full, size)
            trusted = label != VOID
            if confidence is not None:
                trusted &= nearest(confidence, size) >= self.hparams.weak_threshold
            inside = label.masked_fill(~trusted, 0)
            own = output.logits.detach().float().softmax(1).gather(1, inside[:, None])[:, 0]
            mean, variance = flat_pixels(output.representation)
            for column, part in (
                (labels, inside.flatten()),
                (valid, trusted.flatten()),
                (hard, (own < self.hparams.strong_threshold).flatten()),
                (means, mean),
                (variances, variance),
            ):
                column.append(part)
        pixels, trusted = Gaussians(torch.cat(means), torch.cat(variances)), torch.cat(valid)
        result = self.contrast(pixels, torch.cat(labels), trusted, torch.cat(hard))
        self.class_variance.update(pixels.variance.detach().float().mean(1)[trusted], torch.cat(labels)[trusted])
        watched = self._watch(result) | {"trusted_share": valid[1].float().mean()}
        if not self.hparams.variance_weight:
            return result, None, watched
        return result, (pixels.variance.float().mean(1) * trusted).sum() / trusted.sum().clamp(min=1), watched

    def _watch(self, result: ContrastResult) -> dict[str, Tensor]:
        pools = result.anchor_pool
        self.class_anchors.update(pools.float(), torch.arange(len(pools), device=pools.device))
        seen = result.statistics.count.nonzero()[:, 0]
        self.prototype_precision.update(result.statistics.mean_precision()[seen].log().mean(1), seen)
        return {
            "contrast_weight": torch.tensor(self.contrast_weight(), device=self.device),
            "anchor_pixels": pools.sum(),
            "anchor_classes": (pools > 0).sum(),
        }

    def _watched_terms(self) -> list[str]:
        """What has a mean over the steps of an epoch: the loss, its terms, and numbers of the contrast."""
        names = ["loss", "supervised_loss"]
        if self.has_teacher:
            names.append("unsupervised_loss")
        if self.contrast is not None:
            names += ["contrast_loss", "contrast_weight", "anchor_pixels", "anchor_classes", "trusted_share"]
            names += ["variance"] if self.hparams.variance_weight else []
        return names

    def on_train_epoch_start(self) -> None:
        """Start the metrics anew, also where weights were loaded that a run left in the middle of an epoch."""
        for metric in self._epoch_metrics().values():
            metric.reset()

    def on_train_epoch_end(self) -> None:
        """Log means over the epoch's steps, and by class how many anchors there are and how certain pixels are.

        ``anchors/<class>`` is the number of pixels that could be anchors in a step and process.
        ``variance/<class>`` is the mean variance of its pixels. ``precision/<class>`` is how sure its prototypes are:
        the logarithm of their precision over the number of fused pixels (which the precision grows with, so that
        classes of different size would not compare), averaged over dimensions and steps.
        """
        metrics = [self.terms, self.quality] if self.has_teacher else [self.terms]
        values = {f"train/{name}": value for metric in metrics for name, value in metric.compute().items()}
        for prefix, metric in self._by_class().items():
            named = zip(self.class_names, metric.compute(), strict=True)
            values |= {f"{prefix}/{name}": value for name, value in named if torch.isfinite(value)}
        for metric in self._epoch_metrics().values():
            metric.reset()
        self.log_dict(values, sync_dist=True)

    def _by_class(self) -> dict[str, ClassMeans]:
        """Metrics of each class that the method has, by the prefix they are logged under."""
        if self.contrast is None:
            return {}
        anchors = {"anchors": self.class_anchors}
        if self.hparams.method == "point_contrast":
            return anchors
        return anchors | {"variance": self.class_variance, "precision": self.prototype_precision}

    def _epoch_metrics(self) -> dict[str, EpochSums]:
        return {name: metric for name, metric in self.named_children() if isinstance(metric, EpochSums)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the metrics of all processes have seen of the epoch so far."""
        for name, metric in self._epoch_metrics().items():
            for state, value in metric.over_processes(self.trainer.strategy.root_device).items():
                checkpoint["state_dict"][f"{name}.{state}"] = value

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with these in one process, as they are added up again."""
        if self.global_rank > 0:
            prefixes = tuple(f"{name}." for name in self._epoch_metrics())
            for key in [key for key in checkpoint["state_dict"] if key.startswith(prefixes)]:
                del checkpoint["state_dict"][key]

    # Evaluation

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, H, W) of normalised images (B, channels, H, W), of the teacher if there is one."""
        return self._logits(next(iter(self.networks.values())), images)

    def uncertainty(self, images: Tensor, logits: Tensor | None = None) -> Tensor:
        """How uncertain each pixel is, in [0, 1]: (B, 1, H, W).

        The mean variance of the student's representation; without a head for that, one minus the largest probability.

        Args:
            images: (B, channels, H, W), normalised.
            logits: (B, C, H, W) of these images, where they are known already; only needed without that head.
        """
        if self.heads is None or self.heads.probability is None:
            logits = self(images) if logits is None else logits
            return 1.0 - logits.float().softmax(1).amax(1, keepdim=True)
        return self.by_windows(self._mean_variance, images)

    def _mean_variance(self, images: Tensor) -> Tensor:
        variance = self.heads.probability(self.student.features(images))
        return resize_aligned(variance.mean(1, keepdim=True), images.shape[2:])

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        return multi_scale_logits(
            lambda scaled: self.by_windows(network, scaled), images, self.hparams.scales, self.hparams.test_flip
        )

    def evaluate_batch(self, batch: Any, stage: str) -> dict[str, Any]:
        """Update the metrics of teacher and student; return index and predicted masks."""
        found: dict[str, list[Tensor]] = {}
        for name, network in self.networks.items():
            scores, found[name] = self.scores[f"{stage}_{name}"], []
            for logits, masks in logits_at_mask_size(lambda images, n=network: self._logits(n, images), batch):
                found[name] += list(scores.update(logits, masks))
        return {"index": batch.index, "masks": next(iter(found.values()))}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Predictions of the size of the pictures on disk.

        Returns:
            ``index`` (B,), ``masks``: B class indices (H, W) uint8, and ``uncertainty``: B maps (H, W) in [0, 1].
        """
        masks: list[Tensor] = []
        maps: list[Tensor] = []
        for images, labels in groups_of_one_size(batch):
            size, logits = labels.shape[1:], self(images).float()
            masks += list(resize_logits(logits, size).argmax(1).byte())
            maps += list(resize_logits(self.uncertainty(images, logits).float(), size)[:, 0])
        return {"index": batch.index, "masks": masks, "uncertainty": maps}

    def pictures(self, batch: Any) -> dict[str, list[tuple[Tensor, str]]]:
        """Image, label, prediction and uncertainty of the first images, and the last strong views of training."""
        few = type(batch)(batch.images[:PICTURES], batch.masks[:PICTURES], batch.index[:PICTURES])
        with torch.no_grad():
            found = self.predict_step(few, 0)
        shown = []
        for image, label, prediction, doubt, row in zip(
            few.images, few.masks, found["masks"], found["uncertainty"], few.index.tolist(), strict=True
        ):
            caption = f"row {row}; uncertainty {doubt.min().item():.2f} to {doubt.max().item():.2f}"
            shown.append((panel(self.colours(image), label, prediction, self.palette, doubt), caption))
        pictures = {"val/segmentation": shown}
        if self._shown is not None:
            pictures["train/strong_views"] = [
                (
                    panel(self.colours(image), label, label, self.palette, 1.0 - confidence),
                    f"strong view with pseudo-labels; mean confidence {confidence.mean().item():.2f}",
                )
                for image, label, confidence in zip(*self._shown, strict=True)
            ]
        return pictures

    def confusion(self, stage: str) -> Tensor:
        """Counts (C, C) of the evaluation so far, row = label; to be called by all processes.

        Args:
            stage: ``val`` or ``test``.
        """
        return self.scores[f"{stage}_{next(iter(self.networks))}"].confusion()

    def evaluation_scores(self, stage: str) -> dict[str, Tensor]:
        """Compute and reset what the evaluation steps have gathered; empty without a labelled pixel.

        Args:
            stage: ``val`` or ``test``.

        Returns:
            Scores as ``<stage>/<name>_<network>``; ``<stage>/main`` is the one that a run is selected by.
        """
        values: dict[str, Tensor] = {}
        for network in reversed(list(self.networks)):
            result = self.scores[f"{stage}_{network}"].result()
            if not result:
                rank_zero_warn(f"{stage}: no labelled pixel, so there are no metrics.")
                return {}
            values |= {f"{stage}/{name}_{network}": value for name, value in result.items()}
            values[f"{stage}/main"] = result[self.hparams.main_metric]
        return values

    def deployable_network(self) -> nn.Module:
        """A copy of the segmenter for evaluation: images (B, channels, H, W) -> logits (B, C, H, W)."""
        return copy.deepcopy(next(iter(self.networks.values()))).eval()

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with own rates for the variance's head (and for the backbone), falling from epoch to epoch."""
        options = self.hparams
        scale = scaled_lr(self.trainer, 1.0, options.lr_reference_batch)
        probability = [] if self.heads is None or self.heads.probability is None else [self.heads.probability]
        slow = {id(parameter) for module in probability for parameter in module.parameters()}
        backbone = list(self.student.backbone.parameters())
        taken = slow | {id(parameter) for parameter in backbone}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        groups = [
            {"params": [p for p in backbone if p.requires_grad], "lr": scale * options.lr},
            {"params": rest, "lr": scale * options.lr * options.head_lr_multiplier},
        ]
        if probability:
            groups.append({"params": list(probability[0].parameters()), "lr": scale * options.probability_lr})
        optimizer = torch.optim.SGD(
            groups, lr=scale * options.lr, momentum=options.momentum, nesterov=True, weight_decay=options.weight_decay
        )
        epochs = self._epochs()
        self._warn_of_no_contrast(epochs)
        floors = [min(options.min_lr / group["lr"], 1.0) for group in groups]
        factors = [lambda epoch, floor=floor: epoch_poly(epoch, epochs, floor) for floor in floors]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "epoch"},
        }

    def _warn_of_no_contrast(self, epochs: float) -> None:
        options = self.hparams
        wanted = self.contrast is not None and max(options.contrast_weight, options.contrast_floor) > 0
        if wanted and options.contrast_begin >= epochs:
            rank_zero_warn(
                f"contrast_begin: epoch {options.contrast_begin:g} is never reached, as the run has {epochs:g} epochs, "
                "so that there is no contrast; lower model.contrast_begin or take method: mean_teacher"
            )


def check_settings(options: Any) -> None:
    """Raise a ValueError that names the first setting out of its range."""
    if options.method not in get_args(Method):
        raise ValueError(f"method: {options.method!r} is unknown; expected {', '.join(get_args(Method))}")
    check_segmentation(options)
    for field in ("unsupervised_threshold", "weak_threshold", "strong_threshold"):
        if not 0 <= options[field] <= 1:
            raise ValueError(f"{field}: {options[field]} is outside [0, 1]")
    if options.weak_threshold > options.strong_threshold:
        rank_zero_warn(
            f"weak_threshold {options.weak_threshold} is above strong_threshold {options.strong_threshold}: few pixels "
            "that the teacher trusts will be hard for the student"
        )
    for field in ("decoder_channels", "dimensions"):
        if options[field] < 1:
            raise ValueError(f"{field}: {options[field]} is below 1")
    weights = ("unsupervised_weight", "contrast_weight", "contrast_floor", "variance_weight", "weight_decay")
    for field in (*weights, "min_lr"):
        if options[field] < 0:
            raise ValueError(f"{field}: {options[field]} is negative; expected >= 0")
    low_high = list(options.strong_scale)
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
        raise ValueError(f"strong_scale: {low_high} is not two factors above 0, the smaller one first")
    for field in ("lr", "probability_lr", "head_lr_multiplier"):
        if not options[field] > 0:
            raise ValueError(f"{field}: {options[field]} is not positive")
    if not 0 < options.momentum < 1:
        raise ValueError(f"momentum: {options.momentum} is outside (0, 1), which Nesterov's needs")
    if options.temperature is not None and not options.temperature > 0:
        raise ValueError(f"temperature: {options.temperature} is not positive")
    if options.contrast_end is not None and options.contrast_end <= options.contrast_begin:
        raise ValueError(
            f"contrast_end: {options.contrast_end} is not after contrast_begin {options.contrast_begin}, so that there "
            "would be no contrast; raise it, set it to null for the end of the run, or take method: mean_teacher"
        )
    if options.method == "point_contrast":
        for field, none in (("global_prototypes", "false"), ("variance_weight", "0")):
            if options[field]:
                raise ValueError(
                    f"{field}: {options[field]} needs distributions; set model.method to prcl, or model.{field} to "
                    f"{none}"
                )
    if not options.scales or min(options.scales) <= 0:
        raise ValueError(f"scales: {list(options.scales)} are not factors above 0")
