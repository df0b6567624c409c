"""RetinaNet (Lin et al., 2017) on the last three maps of a backbone, as EMO uses it on COCO.

It differs from torchvision's in what the official configuration has otherwise: no ReLU between P6 and P7, anchors that
do not end on whole pixels and lie on fixed strides, no logit for the background, and losses that are sums over a batch
divided by its number of positive anchors.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from modules.feature_backbones import FeatureBackbone

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

STAGES = (-3, -2, -1)
REDUCTIONS = [8, 16, 32]
STRIDES = (8, 16, 32, 64, 128)
WIDTH = 256
RATIOS = (0.5, 1.0, 2.0)
OCTAVES = tuple(2 ** (octave / 3) for octave in range(3))
SIDE_PER_STRIDE = 4
SCORE_THRESHOLD = 0.05


class CoarseLevels(ExtraFPNBlock):
    """P6 from the last map of the backbone and P7 from P6, both by a 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append two levels to those of the pyramid; ``x`` are the maps of the backbone."""
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class PyramidFeatures(nn.Module):
    """Five maps of equal width, of strides 8 to 128."""

    def __init__(self, backbone: FeatureBackbone, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(backbone.channels, width, CoarseLevels(backbone.channels[-1], width))
        self.out_channels = width

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Maps by level, each (B, out_channels, h, w)."""
        maps = self.fpn(OrderedDict((str(level), value) for level, value in enumerate(self.backbone(images))))
        # torchvision makes the anchors in the type of the maps, which is too coarse for pixels in mixed precision.
        return OrderedDict((name, value.float()) for name, value in maps.items())


class PyramidAnchors(AnchorGenerator):
    """Nine anchors around the corner of each cell, on fixed strides and with exact sides."""

    def __init__(self) -> None:
        sides = tuple(tuple(SIDE_PER_STRIDE * stride * octave for octave in OCTAVES) for stride in STRIDES)
        super().__init__(sides, (RATIOS,) * len(STRIDES))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Boxes (9, 4) around the origin; a ratio is height by width."""
        boxes = [
            (-side / ratio**0.5 / 2, -side * ratio**0.5 / 2, side / ratio**0.5 / 2, side * ratio**0.5 / 2)
            for ratio in aspect_ratios
            for side in scales
        ]
        return torch.tensor(boxes, dtype=dtype, device=device)

    def forward(self, image_list: "ImageList", feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors (A, 4) of each image, the same for all."""
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        strides = [[torch.tensor(stride, device=first.device)] * 2 for stride in STRIDES]
        anchors = torch.cat(self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], strides))
        return [anchors for _ in image_list.image_sizes]


class BatchLossHead(RetinaNetHead):
    """Head whose losses are divided by the positive anchors of the whole batch; its answers are float32 throughout."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """``cls_logits`` (B, A, C) and ``bbox_regression`` (B, A, 4) of the maps of all levels."""
        return {name: value.float() for name, value in super().forward(x).items()}

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Focal loss (alpha 0.25, gamma 2) of anchors that are matched or background, and L1 of encoded boxes.

        Args:
            targets: ``labels`` (n,) from 1 and ``boxes`` (n, 4) of each image.
            head_outputs: ``cls_logits`` (B, A, C) and ``bbox_regression`` (B, A, 4).
            anchors: (A, 4) of each image.
            matched_idxs: (A,) of each image: the object, -1 for background, -2 for anchors in between.
        """
        logits, regression = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        wanted = torch.zeros_like(logits)
        encoded, positives = [], []
        for image, (target, matched) in enumerate(zip(targets, matched_idxs, strict=True)):
            positive = (matched >= 0).nonzero()[:, 0]
            objects = matched[positive]
            wanted[image, positive, target["labels"][objects] - 1] = 1.0
            coder = self.regression_head.box_coder
            encoded.append(coder.encode_single(target["boxes"][objects], anchors[image][positive]))
            positives.append(regression[image, positive])
        valid = torch.stack(matched_idxs) != self.classification_head.BETWEEN_THRESHOLDS
        count = max(1, sum(len(boxes) for boxes in encoded))
        return {
            "classification": sigmoid_focal_loss(logits[valid], wanted[valid], reduction="sum") / count,
            "bbox_regression": functional.l1_loss(torch.cat(positives), torch.cat(encoded), reduction="sum") / count,
        }


class UnscaledTransform(GeneralizedRCNNTransform):
    """Normalises images and pads a batch to a multiple of 32; the size is chosen by whoever loads the images."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The image as it is."""
        return image, target


class LabelledRetinaNet(RetinaNet):
    """RetinaNet with one logit per class, whose labels start at 1."""

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Detections after suppression, as torchvision makes them, with labels from 1."""
        detections = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [{**found, "labels": found["labels"] + 1} for found in detections]


def build_retinanet(
    backbone: FeatureBackbone, num_classes: int, mean: Sequence[float], std: Sequence[float]
) -> LabelledRetinaNet:
    """RetinaNet with a feature pyramid of 256 channels.

    An anchor is matched from IoU 0.5 (and the best one of each object in any case) and background below 0.4. At most
    1000 candidates of a level with a score above 0.05 go into the suppression (IoU 0.5); 100 detections are kept.

    Args:
        backbone: its maps have the strides 8, 16 and 32.
        num_classes: without the background.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].

    Raises:
        ValueError: if the maps of the backbone have other strides.
    """
    if backbone.reductions != REDUCTIONS:
        raise ValueError(
            f"backbone: the last three maps of {backbone.name} have strides {backbone.reductions}; "
            f"RetinaNet needs {REDUCTIONS}"
        )
    anchors = PyramidAnchors()
    network = LabelledRetinaNet(
        PyramidFeatures(backbone, WIDTH),
        num_classes,
        image_mean=list(mean),
        image_std=list(std),
        anchor_generator=anchors,
        head=BatchLossHead(WIDTH, anchors.num_anchors_per_location()[0], num_classes),
        score_thresh=SCORE_THRESHOLD,
        nms_thresh=0.5,
        detections_per_img=100,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.4,
        topk_candidates=1000,
    )
    network.transform = UnscaledTransform(1, 1, list(mean), list(std), size_divisible=STRIDES[2])
    return network
