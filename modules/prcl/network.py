"""Student of PRCL: a segmenter with a representation of each pixel and its uncertainty."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from modules.prcl.contrast import POINT_VARIANCE
from modules.prcl.probability_head import ProbabilityHead
from modules.prcl.similarity import Gaussians
from modules.segmentation.deeplabv3plus import DeepLabV3Plus, PixelHead


class PixelOutputs(NamedTuple):
    """What the student says of each pixel, at a quarter of the image's size.

    Args:
        logits: (B, C, h, w).
        representation: means and variances (B, D, h, w); None without the heads.
    """

    logits: Tensor
    representation: Gaussians | None


class RepresentationHeads(nn.Module):
    """Features -> mean and variance of each pixel's representation.

    Args:
        in_channels: channels of the features.
        dimensions: D.
        probabilistic: learn the variance; otherwise it is a constant.
        channels: width of the head of the mean.
    """

    def __init__(
        self, in_channels: int, dimensions: int = 256, probabilistic: bool = True, channels: int = 256
    ) -> None:
        super().__init__()
        self.mean = PixelHead(in_channels, dimensions, channels)
        self.probability = ProbabilityHead(in_channels, dimensions) if probabilistic else None

    def forward(self, features: Tensor) -> Gaussians:
        """(B, in_channels, h, w) -> means (not normalised) and variances (B, D, h, w)."""
        mean = self.mean(features)
        if self.probability is None:
            return Gaussians(mean, mean.new_full((), POINT_VARIANCE).expand_as(mean))
        return Gaussians(mean, self.probability(features))


def pixel_outputs(segmenter: DeepLabV3Plus, heads: RepresentationHeads | None, images: Tensor) -> PixelOutputs:
    """Run the segmenter and, where there are some, the heads on its features."""
    features = segmenter.features(images)
    return PixelOutputs(segmenter.classifier(features), None if heads is None else heads(features))


def flat_pixels(gaussians: Gaussians) -> Gaussians:
    """(B, D, h, w) -> (B h w, D)."""
    return Gaussians(*(part.movedim(1, -1).flatten(0, 2) for part in gaussians))


def nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Class indices or confidences (B, H, W) at another size (B, h, w), not interpolated."""
    return functional.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].to(labels.dtype)
