"""Folding a BatchNorm in evaluation into the layer beside it: one affine map of channels instead of two."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def fold_after(layer: nn.Module, norm: _BatchNorm) -> None:
    """Fold a BatchNorm that follows a convolution or a linear layer into it, in place.

    Args:
        layer: its first dimension of ``weight`` is that of output channels; it gets a bias.
        norm: with running statistics.
    """
    scale, shift = _affine(norm)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    _set(layer, layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1)), bias * scale + shift)


@torch.no_grad()
def fold_before(norm: _BatchNorm, conv: nn.Conv2d) -> None:
    """Fold a BatchNorm that precedes an unpadded, ungrouped convolution into it, in place."""
    scale, shift = _affine(norm)
    weight = conv.weight.double()
    bias = 0.0 if conv.bias is None else conv.bias.double()
    _set(conv, weight * scale[None, :, None, None], bias + torch.einsum("dckl,c->d", weight, shift))


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm in evaluation, in double precision."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = norm.weight.double() * scale
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else norm.bias.double() + shift


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    layer.weight.copy_(weight)
