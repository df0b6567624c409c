"""Decoders of segmentation-models-pytorch on the last four maps of a backbone."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from modules.segmentation.heads import PixelClassifier

DecoderName = Literal["semantic_fpn", "segformer", "upernet"]

REDUCTIONS = (4, 8, 16, 32)


class PyramidHead(nn.Module):
    """Semantic FPN, SegFormer's MLP decoder or UPerNet, with a classifier; logits at a quarter of the input.

    Args:
        name: ``semantic_fpn`` (256 channels in the pyramid, 128 in the branches), ``segformer`` (256) or ``upernet``
            (256).
        in_channels: channels of the four maps of strides 4, 8, 16 and 32.
        num_classes: C.
        dropout: before the classifier.

    Raises:
        ImportError: if segmentation-models-pytorch is not installed.
        ValueError: for an unknown name.
    """

    reads_pyramid: ClassVar[bool] = True

    def __init__(self, name: DecoderName, in_channels: Sequence[int], num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.decoder, width = _decoder(name, list(in_channels))
        self.classifier = PixelClassifier(width, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps, each exactly half as large as the one before, -> logits (B, C, h, w) of the first one's size."""
        batch, _, height, width = maps[0].shape
        # The decoders expect the image and a map of stride 2 in front, of which they read no more than the size.
        image = maps[0].new_empty(batch, 0, 4 * height, 4 * width)
        return self.classifier(self.decoder([image, image, *maps]))


def _decoder(name: str, in_channels: list[int]) -> tuple[nn.Module, int]:
    """The decoder without its classifier, and its width."""
    if name not in get_args(DecoderName):
        raise ValueError(f"head: {name!r} is unknown; expected {', '.join(get_args(DecoderName))}")
    try:
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as error:
        raise ImportError(
            f"head: {name} needs segmentation-models-pytorch: pip install 'lightning-apps[dense]'"
        ) from error
    arguments: dict[str, Any] = {"encoder_channels": [3, 0, *in_channels], "encoder_depth": 5}
    if name == "semantic_fpn":
        return FPNDecoder(**arguments, pyramid_channels=256, segmentation_channels=128, dropout=0.0), 128
    if name == "segformer":
        return SegformerDecoder(**arguments, segmentation_channels=256), 256
    return UPerNetDecoder(**arguments, decoder_channels=256), 256
