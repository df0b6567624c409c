"""Images to one logit per pixel and class: a timm backbone and a head."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.feature_backbones import FULL_STRIDE, FeatureBackbone
from modules.segmentation.decoders import REDUCTIONS, PyramidHead
from modules.segmentation.heads import DeepLabV3Head, FCNHead, PSPHead, resize_logits

HeadName = Literal["deeplabv3", "pspnet", "semantic_fpn", "segformer", "upernet"]

SINGLE_MAP_HEADS = {"deeplabv3": DeepLabV3Head, "pspnet": PSPHead}


class SegmentationNetwork(nn.Module):
    """A backbone with a head on its last map, or on all its maps, and an auxiliary head on the last but one.

    Args:
        backbone: images -> maps, from large to small.
        head: the last map (or the list of maps, if its ``reads_pyramid`` is true) -> logits.
        auxiliary: the last map but one -> logits; of use in training only.
        size_divisor: images are padded at the right and at the bottom to multiples of this, and the logits cut back.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, auxiliary: nn.Module | None = None, size_divisor: int = 1
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.auxiliary = backbone, head, auxiliary
        self.size_divisor = size_divisor

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> logits (B, C, H, W)."""
        return self._logits(self.head, self._maps(images), images)

    def forward_both(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C, H, W) of the head and, if there is one, of the auxiliary head."""
        maps = self._maps(images)
        auxiliary = None
        if self.auxiliary is not None:
            auxiliary = self._logits(self.auxiliary, maps[:-1], images)
        return self._logits(self.head, maps, images), auxiliary

    def _maps(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[2:]
        right, bottom = -width % self.size_divisor, -height % self.size_divisor
        if right or bottom:
            images = functional.pad(images, (0, right, 0, bottom))
        return self.backbone(images)

    def _logits(self, head: nn.Module, maps: list[Tensor], images: Tensor) -> Tensor:
        """Logits at the size of the images."""
        height, width = images.shape[2:]
        logits = head(maps if head.reads_pyramid else maps[-1])
        padded = (height + -height % self.size_divisor, width + -width % self.size_divisor)
        return resize_logits(logits, padded)[..., :height, :width]


def build_network(
    backbone: str,
    head: HeadName,
    num_classes: int,
    in_channels: int = 3,
    output_stride: int = FULL_STRIDE,
    dropout: float = 0.1,
    auxiliary: bool = True,
    **backbone_arguments: Any,
) -> SegmentationNetwork:
    """Put a network together from names.

    Args:
        backbone: timm model name.
        head: ``deeplabv3`` and ``pspnet`` read the last map, ``semantic_fpn``, ``segformer`` and ``upernet`` (these
            need segmentation-models-pytorch) the last four.
        num_classes: C.
        in_channels: channels of the images.
        output_stride: stride of the last map: 32, or 8 or 16 where the backbone can; the latter not for heads that
            read four maps.
        dropout: before the classifiers.
        auxiliary: whether to add the auxiliary head.
        backbone_arguments: further arguments of :class:`modules.feature_backbones.FeatureBackbone`.

    Raises:
        ImportError: if a package is missing.
        ValueError: for unknown names, or a backbone without the maps that the head reads.
    """
    if head not in get_args(HeadName):
        raise ValueError(f"head: {head!r} is unknown; expected {', '.join(get_args(HeadName))}")
    single = head in SINGLE_MAP_HEADS
    body = FeatureBackbone(
        backbone, (-2, -1) if single else (-4, -3, -2, -1), in_channels, output_stride, **backbone_arguments
    )
    if not single and tuple(body.reductions) != REDUCTIONS:
        raise ValueError(
            f"head: {head} reads maps of strides {REDUCTIONS}, but {backbone} gives {tuple(body.reductions)}; use "
            "output_stride: 32 and a backbone with four such stages, or one of the heads deeplabv3 and pspnet"
        )
    return SegmentationNetwork(
        body,
        SINGLE_MAP_HEADS[head](body.channels[-1], num_classes, dropout=dropout)
        if single
        else PyramidHead(head, body.channels, num_classes, dropout),
        FCNHead(body.channels[-2], num_classes, dropout=dropout) if auxiliary else None,
        size_divisor=1 if single else FULL_STRIDE,
    )


def sliding_logits(network: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits of overlapping windows, averaged where they overlap.

    Args:
        network: images -> logits of the same size.
        images: (B, channels, H, W).
        window: side of a window in pixels; smaller images are one window.
        stride: distance of neighbouring windows, at most ``window``; the last window ends with the image.

    Returns:
        (B, C, H, W).
    """
    height, width = images.shape[2:]
    tops, lefts = _starts(height, window, stride), _starts(width, window, stride)
    total: Tensor | None = None
    times = images.new_zeros(1, 1, height, width)
    for top in tops:
        for left in lefts:
            place = (..., slice(top, min(top + window, height)), slice(left, min(left + window, width)))
            logits = network(images[place])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[place] += logits
            times[place] += 1
    return torch.div(total, times)


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
