"""What LightningModules of semantic segmentation have in common."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from modules.segmentation.evaluation import Segmenter
from modules.segmentation.metrics import METRIC_NAMES, VOID
from modules.segmentation.network import sliding_logits
from modules.segmentation.pictures import hue_palette

OUTPUT_STRIDES = (8, 16, 32)


class SegmentationModule(LightningModule):
    """Names, colours, windows, and the hooks of evaluation.

    A subclass saves the hyper-parameters ``num_classes``, ``class_names``, ``palette``, ``mean``, ``std``,
    ``main_metric``, ``init_from``, ``output_stride``, ``window`` and ``window_stride``, and has
    :meth:`load_pretrained`, :meth:`evaluate_batch` and :meth:`evaluation_scores`.
    """

    @property
    def palette(self) -> list[list[int]]:
        """Colour (red, green, blue in 0..255) of each class."""
        return self.hparams.palette or hue_palette(self.hparams.num_classes)

    @property
    def class_names(self) -> list[str]:
        """Name of each class."""
        return self.hparams.class_names or [str(label) for label in range(self.hparams.num_classes)]

    def load_pretrained(self) -> None:
        """Copy the weights of ``init_from`` into the backbone."""
        raise NotImplementedError

    def evaluate_batch(self, batch: Any, stage: str) -> dict[str, Any]:
        """Count a batch of ``val`` or ``test``; return index and predicted masks."""
        raise NotImplementedError

    def evaluation_scores(self, stage: str) -> dict[str, Tensor]:
        """Compute and reset what the evaluation steps of ``val`` or ``test`` have gathered, by the names logged."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Take pre-trained weights at the start of a new training run; a resumed one brings its own."""
        if self.trainer.ckpt_path is None and self.hparams.init_from:
            self.load_pretrained()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Update the metrics; return index and predicted masks."""
        return self.evaluate_batch(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Same as the validation step."""
        return self.evaluate_batch(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and, as ``val/main``, the main one."""
        self.log_dict(self.evaluation_scores("val"), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the metrics and, as ``test/main``, the main one."""
        self.log_dict(self.evaluation_scores("test"), sync_dist=True)

    def by_windows(self, segmenter: Segmenter, images: Tensor) -> Tensor:
        """Run a network on whole images, or on the windows that the settings ask for."""
        window = self.hparams.window
        if window is None:
            return segmenter(images)
        return sliding_logits(segmenter, images, window, self.hparams.window_stride or max(2 * window // 3, 1))

    def colours(self, image: Tensor) -> Tensor:
        """A normalised image (channels, H, W) as it looked: (3, H, W)."""
        mean, std = (
            torch.tensor(values or [default], device=image.device).view(-1, 1, 1)
            for values, default in ((self.hparams.mean, 0.0), (self.hparams.std, 1.0))
        )
        return (image * std + mean).expand(3, -1, -1)


def check_segmentation(options: Any) -> None:
    """Raise a ValueError that names the first of the shared settings that is out of its range."""
    if not 2 <= options.num_classes <= VOID:
        raise ValueError(f"num_classes: {options.num_classes} is outside 2..{VOID}")
    if options.main_metric not in METRIC_NAMES:
        raise ValueError(f"main_metric: {options.main_metric!r} is unknown; expected {', '.join(METRIC_NAMES)}")
    if options.output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride: {options.output_stride} is none of 8, 16 and 32")
    for field in ("class_names", "palette"):
        if options[field] is not None and len(options[field]) != options.num_classes:
            raise ValueError(f"{field}: {len(options[field])} values for {options.num_classes} classes")
    if options.window is not None and options.window < 1:
        raise ValueError(f"window: {options.window} is below 1; expected pixels, or null for whole images")
    if options.window_stride is not None and not 1 <= options.window_stride <= (options.window or 0):
        raise ValueError(
            f"window_stride: {options.window_stride} is outside 1..window ({options.window}); windows would leave gaps"
        )
