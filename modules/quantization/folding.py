"""BatchNorms of a network folded into the layers before them, for deployment."""

import warnings
from collections import Counter
from typing import NamedTuple

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from modules.norm_folding import fold_after
from modules.quantization.tracing import NetworkTrace, some

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Folding(NamedTuple):
    """What became of the BatchNorms of a network.

    Args:
        folded: name of each BatchNorm that is gone -> the layer that does its work.
        kept: name of each that is still there -> why.
    """

    folded: dict[str, str]
    kept: dict[str, str]


@torch.no_grad()
def fold_norms(network: nn.Module, trace: NetworkTrace, strict: bool = False) -> Folding:
    """Fold each BatchNorm into the convolution or linear layer whose output it reads, in place.

    The network computes the same in evaluation, up to rounding. The trace still names the norms afterwards: make a new
    one. What is folded must be the only reader of the layer's output, as it is in all networks with norms behind
    their layers.

    Args:
        network: without quantizers on the layers to fold into.
        trace: of this network.
        strict: raise if any BatchNorm stays, instead of warning.

    Returns:
        Names of what was folded, and of what was not.

    Raises:
        ValueError: for a trace of another network, or if ``strict``; then nothing is changed.
    """
    readers = {layer.norm: layer.name for layer in trace.layers if layer.norm is not None}
    modules = dict(network.named_modules())
    if missing := [name for pair in readers.items() for name in pair if name not in modules]:
        raise ValueError(f"the trace is of another network: this one has no {some(missing)}")
    shared = Counter(layer.norm for layer in trace.layers)
    kept = {
        name: "no layer of the trace stands right before it"
        for name, module in modules.items()
        if isinstance(module, _BatchNorm) and name not in readers
    }
    for norm, layer in readers.items():
        if reason := _obstacle(modules[layer], modules[norm], shared[norm]):
            kept[norm] = reason
    if kept:
        text = f"{len(kept)} BatchNorms are not folded: {some([f'{name} ({reason})' for name, reason in kept.items()])}"
        if strict:
            raise ValueError(text)
        warnings.warn(text, stacklevel=2)
    folded = {norm: layer for norm, layer in readers.items() if norm not in kept}
    for norm, layer in folded.items():
        fold_after(modules[layer], modules[norm])
        network.set_submodule(norm, _what_remains(modules[norm]))
    return Folding(folded, kept)


def _obstacle(layer: nn.Module, norm: nn.Module, readings: int) -> str | None:
    if isinstance(norm, nn.Identity) or not isinstance(norm, _BatchNorm):
        return "it is no BatchNorm any more; trace the network again"
    if type(norm) not in (*PLAIN, BatchNormAct2d):
        return f"what {type(norm).__name__} computes is unknown"
    if norm.running_mean is None:
        return "it has no running statistics"
    if readings > 1:
        return f"{readings} layers share it"
    if norm.num_features != layer.weight.shape[0]:
        return f"{norm.num_features} channels behind a layer with {layer.weight.shape[0]}"
    if parametrize.is_parametrized(layer):
        return "its layer has quantizers; fold before attaching them, or take them off"
    return None


def _what_remains(norm: nn.Module) -> nn.Module:
    """The activation that timm puts into its BatchNorms, or nothing."""
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity()
    return norm.act if isinstance(norm.drop, nn.Identity) else nn.Sequential(norm.drop, norm.act)
