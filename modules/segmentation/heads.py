"""Convolutional heads of semantic segmentation: atrous pyramid, pooling pyramid, and the plain auxiliary head."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

ASPP_DILATIONS = (1, 12, 24, 36)
POOL_SIZES = (1, 2, 3, 6)
CLASSIFIER_STD = 0.01


class ConvBNReLU(nn.Module):
    """Convolution without bias, BatchNorm and ReLU, which keep the size of the map.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel.
        dilation: distance between its taps.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a map seen with several dilations, and its mean, side by side.

    Args:
        in_channels: channels of the map.
        channels: channels of each branch.
        dilations: one branch each; 1 is a 1x1 convolution, others are 3x3.

    Attributes:
        out_channels: channels of the result; the branch of the mean comes first.
    """

    def __init__(self, in_channels: int, channels: int = 256, dilations: Sequence[int] = ASPP_DILATIONS) -> None:
        super().__init__()
        self.pool = ConvBNReLU(in_channels, channels)
        self.branches = nn.ModuleList(
            ConvBNReLU(in_channels, channels, 1 if dilation == 1 else 3, dilation) for dilation in dilations
        )
        self.out_channels = channels * (len(dilations) + 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        mean = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return torch.cat([mean, *(branch(x) for branch in self.branches)], 1)


class PyramidPooling(nn.Module):
    """A map and its means over ever finer grids, side by side (PSPNet).

    Args:
        in_channels: channels of the map.
        channels: channels of each mean.
        sizes: cells along a side of each grid.

    Attributes:
        out_channels: channels of the result; the map itself comes first.
    """

    def __init__(self, in_channels: int, channels: int = 256, sizes: Sequence[int] = POOL_SIZES) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.branches = nn.ModuleList(ConvBNReLU(in_channels, channels) for _ in sizes)
        self.out_channels = in_channels + channels * len(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        pooled = [
            resize_logits(branch(functional.adaptive_avg_pool2d(x, size)), x.shape[2:])
            for size, branch in zip(self.sizes, self.branches, strict=True)
        ]
        return torch.cat([x, *pooled], 1)


class PixelClassifier(nn.Module):
    """Dropout of whole channels and a 1x1 convolution with bias.

    Args:
        in_channels: channels of the features.
        num_classes: C.
        dropout: share of the channels.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(in_channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=CLASSIFIER_STD)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> logits (B, C, h, w)."""
        return self.conv(self.dropout(x))


class DeepLabV3Head(nn.Sequential):
    """ASPP, a 3x3 bottleneck and a classifier: (B, in_channels, h, w) -> logits (B, C, h, w).

    Args:
        in_channels: channels of the last map.
        num_classes: C.
        channels: channels of each branch and of the bottleneck.
        dilations: see :class:`ASPP`.
        dropout: before the classifier.
    """

    reads_pyramid: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        dilations: Sequence[int] = ASPP_DILATIONS,
        dropout: float = 0.1,
    ) -> None:
        aspp = ASPP(in_channels, channels, dilations)
        bottleneck = ConvBNReLU(aspp.out_channels, channels, 3)
        super().__init__(aspp, bottleneck, PixelClassifier(channels, num_classes, dropout))


class PSPHead(nn.Sequential):
    """Pyramid pooling, a 3x3 bottleneck and a classifier: (B, in_channels, h, w) -> logits (B, C, h, w).

    Args:
        in_channels: channels of the last map.
        num_classes: C.
        channels: channels of each mean and of the bottleneck.
        sizes: see :class:`PyramidPooling`.
        dropout: before the classifier.
    """

    reads_pyramid: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        sizes: Sequence[int] = POOL_SIZES,
        dropout: float = 0.1,
    ) -> None:
        pooling = PyramidPooling(in_channels, channels, sizes)
        bottleneck = ConvBNReLU(pooling.out_channels, channels, 3)
        super().__init__(pooling, bottleneck, PixelClassifier(channels, num_classes, dropout))


class FCNHead(nn.Sequential):
    """One 3x3 convolution and a classifier, the auxiliary head: (B, in_channels, h, w) -> logits (B, C, h, w).

    Args:
        in_channels: channels of the map.
        num_classes: C.
        channels: channels of the convolution.
        dropout: before the classifier.
    """

    reads_pyramid: ClassVar[bool] = False

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__(ConvBNReLU(in_channels, channels, 3), PixelClassifier(channels, num_classes, dropout))


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation of (B, C, h, w) to (B, C, *size), corners not aligned."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    return functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
