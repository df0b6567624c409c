"""Files of released EMO networks made to fit the networks of this package."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("net_E", "net", "state_dict", "model")
"""Keys under which files hold their weights, the averaged ones (net_E) before the raw ones (net)."""

PREFIXES = ("module.", "backbone.")
EMO_V2_MARKS = ("eops.", "ls.gamma")
STEM_WEIGHT = "stage0.0.convs.0.0.weight"
HEAD = ("head.weight", "head.bias")
FINAL_LAYERS = ("norm.norm.weight", "norm.norm.bias", *HEAD)
SHOWN = 5


def fit_released_weights(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The state dictionary for a network out of the content of a file; timm calls it (``pretrained_filter_fn``).

    Args:
        content: a plain state dictionary, a training checkpoint ``{'net', 'net_E', ...}`` (the averaged weights
            ``net_E`` are taken), or a dense-prediction checkpoint whose names begin with ``backbone.``.
        model: the :class:`~modules.emo.EMO` that is to take it.

    Raises:
        ValueError: if it is a file of EMOv2, or tensors are missing, unexpected or of another shape.
    """
    tensors = _strip_prefixes(_unwrap(content))
    if any(mark in f"{key}." for key in tensors for mark in EMO_V2_MARKS):
        raise ValueError(
            "pretrained: this is a file of EMOv2 (its names have 'eops.' or 'ls.gamma'), another network than EMO; "
            "give the net.pth of EMO-1M, 2M, 5M or 6M"
        )
    expected = model.state_dict()
    if "norm.norm.weight" not in tensors and "head.weight" not in tensors:
        own = {key: expected[key] for key in FINAL_LAYERS if key in expected}
        if own and expected.keys() - own.keys() <= tensors.keys():
            warnings.warn(
                "pretrained: the file has no final norm and classifier; they stay as initialised", stacklevel=2
            )
            tensors = {**tensors, **own}
    tensors = _fit_classifier(tensors, expected, model)
    _check(tensors, expected)
    return tensors


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"pretrained: the file holds no tensors, only {_some(sorted(map(str, content)))}")
    return tensors


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers; of a network with heads, the backbone alone."""
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    return tensors


def _fit_classifier(tensors: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors with a classifier of the network's width: its own one where the file has another number of classes.

    timm drops the classifier of the file by itself unless the network has as many classes as ``pretrained_cfg`` says.
    """
    if "head.weight" not in tensors or "head.weight" not in expected:
        return tensors
    found, wanted = tensors["head.weight"].shape[0], expected["head.weight"].shape[0]
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", wanted)
    if (found == wanted) != (declared == wanted):
        warnings.warn(
            f"pretrained: the file's classifier of {found} classes is not used, the network of {wanted} classes starts "
            f"with a new one; to keep it, give num_classes={found} and "
            f"pretrained_cfg_overlay=dict(file=..., num_classes={found})",
            stacklevel=2,
        )
    if found == wanted:
        return tensors
    return {**tensors, **{key: expected[key] for key in HEAD}}


def _check(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = sorted(expected.keys() - tensors.keys() - set(HEAD))
    unexpected = sorted(tensors.keys() - expected.keys() - set(HEAD))
    differing = [
        f"{key} {tuple(tensors[key].shape)}, the network has {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and not _same_shape(key, tensors[key], value)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    if not any(problems.values()):
        return
    told = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names)
    fitting = _fitting_sizes(tensors)
    remedy = f"the file fits {' and '.join(fitting)}" if fitting else "the file fits no size of EMO"
    raise ValueError(f"pretrained: the file does not fit this network: {told}; {remedy}")


def _same_shape(key: str, found: Tensor, expected: Tensor) -> bool:
    """Equal shapes; the images may have other channels, which timm adapts."""
    if key == STEM_WEIGHT:
        return found.ndim == 4 and found.shape[:1] + found.shape[2:] == expected.shape[:1] + expected.shape[2:]
    return found.shape == expected.shape


def _fitting_sizes(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the networks that have these tensors, classifier and channels of the images aside."""
    from modules.emo.network import ARCHITECTURES, EMO

    fitting = []
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            shapes = EMO(**architecture).state_dict()
        ignored = {*HEAD, STEM_WEIGHT, *FINAL_LAYERS}
        body = {key: value.shape for key, value in shapes.items() if key not in ignored}
        if body == {key: value.shape for key, value in tensors.items() if key not in ignored}:
            fitting.append(name)
    return fitting


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{shown}, ..." if len(names) > SHOWN else shown
