"""DeepLabv3+: an atrous pyramid on the last map, joined with an early one, on any timm backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.feature_backbones import FeatureBackbone, indices_of_reductions
from modules.segmentation.heads import ASPP, ConvBNReLU

PLUS_DILATIONS = (1, 6, 12, 18)
LOW_LEVEL_STRIDE = 4
LOW_LEVEL_CHANNELS = 48


class DeepLabV3Plus(nn.Module):
    """Images -> features at a quarter of their size -> logits.

    Args:
        backbone: timm model name.
        num_classes: C.
        in_channels: channels of the images.
        output_stride: stride of the backbone's last map: 8, 16 or 32.
        channels: width of the pyramid's branches and of the classifier.
        dilations: of the pyramid's branches.
        backbone_arguments: further arguments of :class:`modules.feature_backbones.FeatureBackbone`.

    Attributes:
        feature_channels: channels of the features, 48 + ``channels``.

    Raises:
        ValueError: for a backbone that cannot be dilated to the output stride, or has no map of stride 4.

    Source: Chen et al., "Encoder-decoder with atrous separable convolution" (2018), as PRCL uses it: plain
    convolutions, no dropout, features before the classifier shared with other heads.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        in_channels: int = 3,
        output_stride: int = 16,
        channels: int = 256,
        dilations: Sequence[int] = PLUS_DILATIONS,
        **backbone_arguments: Any,
    ) -> None:
        super().__init__()
        options = backbone_arguments.get("options")
        early = indices_of_reductions(backbone, (LOW_LEVEL_STRIDE,), in_channels, options)[0]
        self.backbone = FeatureBackbone(backbone, (early, -1), in_channels, output_stride, **backbone_arguments)
        self.aspp = ASPP(self.backbone.channels[-1], channels, dilations)
        self.project = ConvBNReLU(self.aspp.out_channels, channels)
        self.low_level = ConvBNReLU(self.backbone.channels[0], LOW_LEVEL_CHANNELS)
        self.feature_channels = LOW_LEVEL_CHANNELS + channels
        self.classifier = PixelHead(self.feature_channels, num_classes, channels)

    def features(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, feature_channels, h, w) with h = ceil(H / 4) and w = ceil(W / 4)."""
        early, last = self.backbone(images)
        pyramid = self.project(self.aspp(last))
        return torch.cat([self.low_level(early), resize_aligned(pyramid, early.shape[2:])], 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, C, H, W)."""
        return resize_aligned(self.classifier(self.features(images)), images.shape[2:])


class PixelHead(nn.Sequential):
    """3x3 convolution with BatchNorm and ReLU, and a 1x1 convolution with bias.

    Args:
        in_channels: channels of the features.
        out_channels: numbers for each pixel: classes, or dimensions of a representation.
        channels: width in between.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int = 256) -> None:
        super().__init__(ConvBNReLU(in_channels, channels, 3), nn.Conv2d(channels, out_channels, 1))


def resize_aligned(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation of (B, C, h, w) to (B, C, *size), corners aligned."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)
