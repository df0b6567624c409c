"""SSDLite (MobileNetV2, section 6.2) on the last two maps of a backbone, as EMO uses it on COCO."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block

from modules.feature_backbones import FeatureBackbone

STAGES = (-2, -1)
REDUCTIONS = [16, 32]
EXTRA_WIDTHS = (512, 256, 256, 128)
# Shorter side of the anchors of each level at 320 px, and of the one that would follow.
ANCHOR_SIDES = (48, 100, 150, 202, 253, 304, 320)
REFERENCE_SIZE = 320
RATIOS = (2, 3)
SCORE_THRESHOLD = 0.02


class SSDLiteFeatures(nn.Module):
    """Two maps of a backbone (stride 16 and 32) and four more, each half as large as the one before.

    Args:
        backbone: its last map feeds the extra levels.
        widths: channels of the extra levels.
        norm_layer: builds the norms of the extra levels.
    """

    def __init__(self, backbone: FeatureBackbone, widths: Sequence[int], norm_layer: partial) -> None:
        super().__init__()
        self.backbone = backbone
        inputs = (backbone.channels[-1], *widths[:-1])
        self.extra = nn.ModuleList(
            _extra_block(width_in, width, norm_layer) for width_in, width in zip(inputs, widths, strict=True)
        )
        self.out_channels = [*backbone.channels, *widths]

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Six maps by level, each (B, out_channels[level], h, w)."""
        maps = list(self.backbone(images))
        for block in self.extra:
            maps.append(block(maps[-1]))
        # torchvision makes the anchors in the type of the maps, which is too coarse for pixels in mixed precision.
        return OrderedDict((str(level), value.float()) for level, value in enumerate(maps))


class PreciseHead(SSDLiteHead):
    """Head whose answers are decoded in float32, also in mixed precision."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """``bbox_regression`` (B, A, 4) and ``cls_logits`` (B, A, 1 + C) of the maps of all levels."""
        return {name: value.float() for name, value in super().forward(x).items()}


def build_ssdlite(
    backbone: FeatureBackbone, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> SSD:
    """An SSD with depth-wise separable heads that resizes its images to a square.

    Matching at IoU 0.5 and with the best anchor of each object, box deviations 0.1 and 0.2, smooth L1, cross-entropy
    with three hard negatives per positive. At most 1000 candidates of a class go into the suppression (IoU 0.45) and
    200 detections of an image are kept; the official code limits the candidates per level instead.

    Args:
        backbone: its maps have the strides 16 and 32.
        num_classes: without the background.
        image_size: side of the square.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].

    Raises:
        ValueError: if the maps of the backbone have other strides.
    """
    if backbone.reductions != REDUCTIONS:
        raise ValueError(
            f"backbone: the last two maps of {backbone.name} have strides {backbone.reductions}; "
            f"SSDLite needs {REDUCTIONS}"
        )
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)
    features = SSDLiteFeatures(backbone, EXTRA_WIDTHS, norm_layer)
    anchors = ssdlite_anchors(image_size)
    head = PreciseHead(features.out_channels, anchors.num_anchors_per_location(), num_classes + 1, norm_layer)
    _initialise(features.extra, partial(nn.init.trunc_normal_, std=0.03))
    _initialise(head, partial(nn.init.normal_, std=0.001))
    return SSD(
        features,
        anchors,
        (image_size, image_size),
        num_classes + 1,
        image_mean=list(mean),
        image_std=list(std),
        head=head,
        score_thresh=SCORE_THRESHOLD,
        nms_thresh=0.45,
        detections_per_img=200,
        iou_thresh=0.5,
        topk_candidates=1000,
    )


def ssdlite_anchors(image_size: int) -> DefaultBoxGenerator:
    """Six anchors per cell: two squares and the ratios 2, 1/2, 3, 1/3; sides scale with the image."""
    sides = _level_sides(image_size)
    return DefaultBoxGenerator(
        [list(RATIOS)] * len(sides),
        scales=[side / REFERENCE_SIZE for side in ANCHOR_SIDES],
        steps=[round(image_size / side) for side in sides],
        clip=False,
    )


def _level_sides(image_size: int) -> list[int]:
    sides = [-(-image_size // REDUCTIONS[0])]
    while len(sides) < len(ANCHOR_SIDES) - 1:
        sides.append(-(-sides[-1] // 2))
    return sides


def _initialise(module: nn.Module, init: partial) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            init(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
