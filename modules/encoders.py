"""Image encoders: timm models by name, taken apart into patch tokens and blocks, and loaded from files."""

import difflib
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

PosEmbed = Literal["sincos", "learned"]

TORCHVISION = "torchvision/"

SMALL_VIT = "vit_tiny_patch16_224"
SMALL_VIT_OPTIONS: dict[str, Any] = {"patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}
"""The encoder for 8x8 digits: 16 tokens of width 64 through 3 blocks."""


def create_network(
    name: str, image_size: int, in_channels: int, num_classes: int, options: dict[str, Any] | None = None
) -> nn.Module:
    """A timm or torchvision model by name, without downloading weights.

    Args:
        name: timm model name, or ``torchvision/`` and the name of a classifier of torchvision.
        image_size: side of the square input in pixels; given to models that are built for one size.
        in_channels: channels of the input.
        num_classes: outputs; 0 for features.
        options: further arguments of the model, such as patch_size, embed_dim, depth, num_heads, drop_path_rate.

    Raises:
        ValueError: unknown name (with the nearest ones), an option the model does not have, or an image size that the
            patch size does not divide.
    """
    options = dict(options or {})
    if name.startswith(TORCHVISION):
        return _torchvision_model(name, in_channels, num_classes, options)
    require_timm_model(name, "encoder")
    if name != SMALL_VIT and options.items() >= SMALL_VIT_OPTIONS.items():
        rank_zero_warn(
            f"encoder_options {SMALL_VIT_OPTIONS} are those of the small digits encoder and now change {name}; "
            "give encoder_options: {} for the model as timm defines it."
        )
    arguments = {"in_chans": in_channels, "num_classes": num_classes, **options}
    try:
        network = _create(name, image_size, arguments)
    except TypeError as error:
        given = {key: value for key, value in options.items() if value is not None}
        raise ValueError(
            f"encoder_options or drop_path: {name} does not take {given}: {error}. Give encoder_options: {{}} and "
            "drop_path: 0 for the model as timm defines it; only timm's VisionTransformer family has patches to change"
        ) from error
    check_divisible(network, image_size)
    return network


def _torchvision_model(name: str, in_channels: int, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """A classifier of torchvision that says, like one of timm, which layers are its first and its last."""
    from torchvision.models import get_model, list_models

    known, short = list_models(module=None), name.removeprefix(TORCHVISION)
    if short not in known:
        near = difflib.get_close_matches(short, known, n=3)
        raise ValueError(f"encoder: torchvision has no {short!r}; nearest: {', '.join(near) or 'none'}")
    if in_channels != 3:
        raise ValueError(
            f"encoder: {name} takes images with 3 channels, not {in_channels}; set data.channels: 3 or take timm's"
        )
    given = {key: value for key, value in options.items() if value is not None}
    try:
        network = get_model(short, weights=None, num_classes=num_classes, **given)
    except TypeError as error:
        raise ValueError(
            f"encoder_options, dropout or drop_path: {name} does not take {given}: {error}; give encoder_options: "
            "{}, dropout: 0 and drop_path: 0 for the model as torchvision defines it"
        ) from error
    layers = [key for key, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    network.pretrained_cfg = {"first_conv": layers[0], "classifier": layers[-1]}
    return network


def require_timm_model(name: str, field: str) -> None:
    """Raise a ValueError that names the field and the nearest names unless timm, or this suite in it, has the model."""
    import timm

    import modules.emo  # noqa: F401  registers its models in timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"{field}: {name!r} is not a timm model; nearest: {', '.join(near) or 'none'}")


def _create(name: str, image_size: int, arguments: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=False, img_size=image_size, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, pretrained=False, **arguments)


def check_divisible(network: nn.Module, image_size: int) -> None:
    """Raise a ValueError with the nearest valid sizes if patches do not tile the image exactly."""
    patch_size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch_size is None:
        return
    patch = max(patch_size) if isinstance(patch_size, tuple) else int(patch_size)
    if image_size % patch:
        lower = image_size // patch * patch
        valid = [size for size in (lower, lower + patch) if size]
        raise ValueError(
            f"image_size: {image_size} is not divisible by the patch size {patch}; "
            f"nearest valid sizes: {' and '.join(map(str, valid))}"
        )


def create_token_encoder(
    name: str,
    image_size: int,
    in_channels: int,
    options: dict[str, Any] | None = None,
    pos_embed: PosEmbed = "sincos",
) -> nn.Module:
    """A timm Vision Transformer without classifier whose tokens can be reached before their positions are added.

    Args:
        name: timm model name of the VisionTransformer family (vit_*, deit_*, deit3_*).
        image_size: side of the square input in pixels.
        in_channels: channels of the input.
        options: further arguments of the model.
        pos_embed: ``sincos`` (fixed, two-dimensional, zero for the class token: MoCo v3, MAE) or ``learned`` (timm's).

    Raises:
        ValueError: if the model has no plain sequence of patch tokens.
    """
    from timm.models import VisionTransformer

    network = create_network(name, image_size, in_channels, 0, options)
    if not isinstance(network, VisionTransformer) or network.dynamic_img_size or not network.patch_embed.flatten:
        raise ValueError(
            f"encoder: {name} ({type(network).__name__}) has no sequence of patch tokens to perturb. Supported: timm's "
            "VisionTransformer family with fixed image size, e.g. vit_small_patch16_224, deit_small_patch16_224"
        )
    if pos_embed == "sincos":
        fix_sincos_positions(network)
    return network


def fix_sincos_positions(network: nn.Module) -> None:
    """Fix the position embedding of a timm Vision Transformer to 2-D sine-cosine values, zero for prefix tokens.

    Raises:
        ValueError: if the width is not divisible by 4, or the model has no absolute position embedding.
    """
    from timm.layers import build_sincos2d_pos_embed

    if getattr(network, "pos_embed", None) is None:
        raise ValueError(f"pos_embed: sincos needs a position embedding, which this {type(network).__name__} lacks")
    if network.embed_dim % 4:
        raise ValueError(f"pos_embed: sincos needs an embed_dim divisible by 4, got {network.embed_dim}")
    positions = build_sincos2d_pos_embed(
        list(network.patch_embed.grid_size), dim=network.embed_dim, interleave_sin_cos=False
    )
    prefix = network.pos_embed.shape[1] - positions.shape[0]
    with torch.no_grad():
        network.pos_embed.zero_()
        network.pos_embed[0, prefix:] = positions
    network.pos_embed.requires_grad_(False)


def embed_tokens(encoder: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens (B, N, D) of images (B, C, H, W), without class token and positions."""
    return encoder.patch_embed(images)


def encode_tokens(encoder: nn.Module, tokens: Tensor) -> Tensor:
    """Pooled features (B, D) of patch tokens (B, N, D).

    ``encode_tokens(encoder, embed_tokens(encoder, images))`` equals ``encoder(images)`` bit for bit.
    """
    sequence = encoder.norm_pre(encoder.patch_drop(encoder._pos_embed(tokens)))
    return encoder.forward_head(encoder.norm(encoder.blocks(sequence)))
