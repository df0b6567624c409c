"""The head that predicts how uncertain each pixel's representation is."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

FLOOR = 1e-6


class NormalisedConv(nn.Conv2d):
    """1x1 convolution without bias whose rows have length 1 at every use.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        return functional.conv2d(x, functional.normalize(self.weight, dim=1))


class ProbabilityHead(nn.Module):
    """Features -> variance of each dimension of the representation, between 1e-6 and 1, about 0.5 at the start.

    The variance is ``sigmoid(log(exp(x) + 1e-6))`` of a number x that two normalised 1x1 convolutions and a learned
    scale and shift give.

    Args:
        in_channels: channels of the features.
        dimensions: D.

    Source: PRCL, probability head; the released code calls its output sigma, but uses it as a variance.
    """

    def __init__(self, in_channels: int = 304, dimensions: int = 256) -> None:
        super().__init__()
        self.first = NormalisedConv(in_channels, dimensions)
        self.first_norm = nn.BatchNorm2d(dimensions)
        self.second = NormalisedConv(dimensions, dimensions)
        self.second_norm = nn.BatchNorm2d(dimensions, affine=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> variances (B, D, h, w)."""
        hidden = functional.relu(self.first_norm(self.first(features)))
        logits = self.scale * self.second_norm(self.second(hidden)) + self.shift
        return variance_of(logits.float())


def variance_of(logits: Tensor) -> Tensor:
    """``sigmoid(log(exp(x) + 1e-6))`` without overflow."""
    return torch.logaddexp(logits, logits.new_tensor(math.log(FLOOR))).sigmoid()
