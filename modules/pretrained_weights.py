"""Weights from files into image networks: checkpoints of this suite, released files of others, safetensors."""

import math
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from modules.efficientnet_lite import FIRST_KEY, PACKAGED, packaged_file, timm_names
from modules.quantization.attachment import float_names

Which = Literal["online", "target"]

WRAPPERS = ("state_dict", "net_E", "net", "model", "model_state_dict")
"""Keys under which files hold their weights; EMO's training checkpoints have averaged ones (net_E) and raw ones."""

PREFIXES = ("encoder.", "network.", "backbone.", "model.", "module.", "")
SHOWN = 5


class NetworkWeights(NamedTuple):
    """Tensors under the names that a timm model gives them, and where they come from.

    Args:
        tensors: name -> tensor.
        source: the file, for messages.
        made_by: hyper-parameters of the module that wrote the file; empty if it does not tell.
    """

    tensors: dict[str, Tensor]
    source: str
    made_by: dict[str, Any]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and hyper-parameters in a .ckpt, .pth, .pt, .bin or .safetensors file.

    ``efficientnet-lite0`` stands for the ImageNet weights that the extra ``weights`` installs.

    Raises:
        ImportError: if these are asked for and not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read or holds no dictionary of tensors.
    """
    path = packaged_file() if str(path) == PACKAGED else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"init_from: there is no file {path.absolute()}; pre-train first, or give the weights with "
            "--model.init_from FILE"
        )
    try:
        content = _read(path)
    except Exception as error:
        raise ValueError(f"init_from: {path} cannot be read as a weights file; {_remedy(error)}") from error
    hyper_parameters = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"init_from: {path} holds no dictionary of tensors (a state_dict)")
    tensors = float_names({key: value for key, value in content.items() if isinstance(value, Tensor)})
    return timm_names(tensors) if FIRST_KEY in tensors else tensors, dict(hyper_parameters)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _remedy(error: Exception) -> str:
    """What to do about a file that cannot be read, and why, in the first sentence of the error."""
    told = str(error).strip().split("\n")[0].partition(". ")[0]
    cause = f"{type(error).__name__}: {told}" if told else type(error).__name__
    refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
    if refused:
        return (
            f"it holds a {refused[1]} beside its tensors; if you trust who wrote it, save its state dictionary alone: "
            f"torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW) ({cause})"
        )
    return (
        "expected a state dictionary that torch.save (.ckpt, .pth, .pt, .bin) or safetensors (.safetensors) wrote, not "
        f"cut off ({cause})"
    )


def network_weights(path: str | Path, network: nn.Module, which: Which = "online") -> NetworkWeights:
    """The part of a file that belongs to a network.

    Args:
        path: see :func:`read_weights`.
        network: tells which names to expect.
        which: branch of a checkpoint with two networks; of no effect on other files.

    Raises:
        ValueError: if no part of the file has names of this network.
    """
    tensors, made_by = read_weights(path)
    has_branches = any(key.startswith(("online.", "target.")) for key in tensors)
    prefixes = [f"{which}.{prefix}" for prefix in PREFIXES] if has_branches else list(PREFIXES)
    expected = set(float_names(network.state_dict())) - _classifier_keys(network)
    found = {
        prefix: {key[len(prefix) :] for key in tensors if key.startswith(prefix)} & expected for prefix in prefixes
    }
    prefix = max(prefixes, key=lambda candidate: len(found[candidate]))
    if not found[prefix]:
        tops = sorted({key.split(".")[0] for key in tensors})
        raise ValueError(
            f"init_from: nothing in {path} fits {type(network).__name__}; it holds {_some(tops)}, "
            f"expected names such as {_some(sorted(expected))}"
        )
    own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    return NetworkWeights(own, str(path), made_by)


def load_weights(network: nn.Module, weights: NetworkWeights, with_classifier: bool = False) -> None:
    """Copy everything, or everything but the classifier, into a network.

    A position embedding of another grid is interpolated, and a first convolution for colours fitted to other channels.

    Args:
        network: of timm or torchvision; quantizers of its layers stay as they are.
        weights: see :func:`network_weights`.
        with_classifier: the classifier too.

    Raises:
        ValueError: naming the tensors that are missing, not used, or of another shape.
    """
    tensors = dict(weights.tensors)
    _fit_positions(network, tensors, weights.source)
    _fit_channels(network, tensors, weights.source)
    left_out = () if with_classifier else _classifier_prefixes(network)
    expected = {key: value for key, value in float_names(network.state_dict()).items() if not key.startswith(left_out)}
    given = {key: value for key, value in tensors.items() if not key.startswith(left_out)}
    mismatching = [
        f"{key}: {tuple(given[key].shape)} in the file, {tuple(value.shape)} in the network"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    problems = {
        "of another shape": mismatching,
        "missing in the file": sorted(expected.keys() - given.keys()),
        "not in the network": sorted(given.keys() - expected.keys()),
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in problems.items() if names)
        raise ValueError(
            f"init_from: {weights.source} does not fit {type(network).__name__}: {told}."
            f"{_origin(weights)}{_other_network(given)}"
        )
    network.load_state_dict(given, strict=False)


def _fit_positions(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    own, given = getattr(network, "pos_embed", None), tensors.get("pos_embed")
    if own is None or given is None or given.shape == own.shape or given.shape[-1] != own.shape[-1]:
        return
    from timm.layers import resample_abs_pos_embed

    new = tuple(network.patch_embed.grid_size)
    prefix = own.shape[1] - new[0] * new[1]
    side = math.isqrt(given.shape[1] - prefix)
    if side * side != given.shape[1] - prefix:
        return
    tensors["pos_embed"] = resample_abs_pos_embed(given, list(new), [side, side], prefix)
    rank_zero_info(
        f"init_from: position embedding of {source} interpolated from {side}x{side} to {new[0]}x{new[1]} patches."
    )


def _fit_channels(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    name = f"{(getattr(network, 'pretrained_cfg', None) or {}).get('first_conv')}.weight"
    own, given = network.state_dict().get(name), tensors.get(name)
    if own is None or given is None or given.shape[1:2] != (3,) or own.shape[1] == 3:
        return
    from timm.models import adapt_input_conv

    tensors[name] = adapt_input_conv(own.shape[1], given)
    rank_zero_info(f"init_from: {name} of {source} fitted from 3 channels to {own.shape[1]}.")


def classifier_names(network: nn.Module) -> tuple[str, ...]:
    """Dotted names of the classification layers of a timm model."""
    names = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _classifier_prefixes(network: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in classifier_names(network))


def _classifier_keys(network: nn.Module) -> set[str]:
    return {key for key in network.state_dict() if key.startswith(_classifier_prefixes(network))}


def _origin(weights: NetworkWeights) -> str:
    told = {key: weights.made_by[key] for key in ("encoder", "encoder_options", "image_size") if key in weights.made_by}
    if not told:
        return ""
    settings = ", ".join(f"{key}: {value}" for key, value in told.items())
    return f" The file was written with {settings}; use the same encoder and options."


def _other_network(tensors: dict[str, Tensor]) -> str:
    from modules.emo.released_weights import EMO_V2_MARKS

    if any(mark in f"{key}." for key in tensors for mark in EMO_V2_MARKS):
        return " It is a file of EMOv2, another network than EMO."
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
