"""EMO, a light-weight network of inverted residual mobile blocks, registered in timm as emo_1m, emo_2m, emo_5m, emo_6m.

Modules carry the names of the released networks, so their state dictionaries load as they are.
"""

import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from modules.emo.blocks import IRMB, ChannelLayerNorm, WindowLayout, batch_norm_2d
from modules.emo.released_weights import fit_released_weights
from modules.norm_folding import fold_after

__all__ = ["ARCHITECTURES", "EMO"]

STAGES = 4
FULL_STRIDE = 32
STEM_STRIDE = 2

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "emo_1m": {
        "depths": (2, 2, 8, 3),
        "dims": (32, 48, 80, 168),
        "expansions": (2, 2.5, 3, 3.5),
        "head_dims": (0, 0, 20, 21),
        "drop_path_rate": 0.04036,
    },
    "emo_2m": {
        "depths": (3, 3, 9, 3),
        "dims": (32, 48, 120, 200),
        "expansions": (2, 2.5, 3, 3.5),
        "head_dims": (0, 0, 20, 20),
        "drop_path_rate": 0.05,
    },
    "emo_5m": {
        "depths": (3, 3, 9, 3),
        "dims": (48, 72, 160, 288),
        "expansions": (2, 3, 4, 4),
        "head_dims": (0, 0, 32, 32),
        "drop_path_rate": 0.05,
    },
    "emo_6m": {
        "depths": (3, 3, 9, 3),
        "dims": (48, 72, 160, 320),
        "expansions": (2, 3, 4, 5),
        "head_dims": (0, 0, 20, 32),
        "drop_path_rate": 0.05,
    },
}
"""What distinguishes the published sizes; arguments of :class:`EMO`."""


class StemConv(nn.Module):
    """Convolution 3x3 of stride 2 and a BatchNorm, without activation; what enters leaves in ``channels_last``.

    Args:
        in_channels: channels of the image.
        channels: channels of the map.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, channels, kernel_size=3, stride=STEM_STRIDE, padding=1)
        self.convs = nn.ModuleList([nn.Sequential(conv, batch_norm_2d(channels))])

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, channels, ceil(H / 2), ceil(W / 2))."""
        conv, norm = self.convs[0]
        if not torch.compiler.is_compiling():
            _check_images(x, conv.in_channels)
        x = conv(x.contiguous(memory_format=torch.channels_last))
        # The format of an image with one channel is ambiguous, and the convolution then takes the other one.
        return norm(x.contiguous(memory_format=torch.channels_last))

    def fuse(self) -> "StemConv":
        """Fold the BatchNorm into the convolution, in place."""
        conv, norm = self.convs[0]
        if isinstance(norm, nn.BatchNorm2d):
            fold_after(conv, norm)
            self.convs[0][1] = nn.Identity()
        return self


class EMO(nn.Module):
    """EMO for images of any size; a timm model.

    Args:
        depths: blocks of each of the four stages.
        dims: channels of each stage.
        expansions: lambda of each stage; its first block expands by twice as much.
        head_dims: width of an attention head in each stage; 0 for a stage that does not attend.
        kernel_sizes: of the depth-wise convolutions of each stage.
        stem_dim: channels of the stem.
        in_chans: channels of the images.
        num_classes: outputs; 0 for pooled features.
        global_pool: ``avg``, ``max``, ``avgmax`` or, without classifier, empty.
        output_stride: 32, or 16 or 8: the last stages keep the larger map and dilate their convolutions.
        drop_rate: dropout before the classifier.
        drop_path_rate: of the last block; grows linearly from 0 over all blocks.
        window_size: tokens per side of an attention window; 0 or -1 for one window over the whole map.
        window_layout: ``strided`` (released) or ``contiguous``.
        attn_pre: attend before the expansion (released) or after it.
        v_group: expand each head by itself.
        mask_padding: hide the zeros that pad a map to whole windows; the released networks attend to them.

    Raises:
        ValueError: for values that make no network, naming the stage and the numbers.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        expansions: Sequence[float],
        head_dims: Sequence[int],
        kernel_sizes: Sequence[int] = (3, 3, 5, 5),
        stem_dim: int = 24,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = FULL_STRIDE,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        window_size: int = 7,
        window_layout: WindowLayout = "strided",
        attn_pre: bool = True,
        v_group: bool = False,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        _check_stages(depths=depths, dims=dims, expansions=expansions, head_dims=head_dims, kernel_sizes=kernel_sizes)
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride: {output_stride}, but EMO supports 8, 16 and 32")
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, dims[-1], dims[-1]
        self.grad_checkpointing = False
        attention = {
            "window_size": window_size,
            "window_layout": window_layout,
            "attn_pre": attn_pre,
            "v_group": v_group,
            "mask_padding": mask_padding,
        }
        self.stage0 = _build_stem(in_chans, stem_dim)
        self.feature_info = [{"num_chs": stem_dim, "reduction": STEM_STRIDE, "module": "stage0"}]
        drop_paths = _linear(drop_path_rate, depths)
        width, reduction, dilation = stem_dim, STEM_STRIDE, 1
        for index in range(STAGES):
            stride = 2 if reduction < output_stride else 1
            options = {"kernel_size": kernel_sizes[index], "head_dim": head_dims[index], **attention}
            try:
                stage = _build_stage(
                    width, dims[index], expansions[index], stride, dilation, drop_paths[index], options
                )
            except ValueError as error:
                raise ValueError(f"stage {index + 1}: {error}") from error
            self.add_module(f"stage{index + 1}", stage)
            width, reduction, dilation = dims[index], reduction * stride, dilation * (2 // stride)
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stage{index + 1}"})
        self.norm = ChannelLayerNorm(width)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the normalised last map (B, dims[3], ceil(H / 32), ceil(W / 32))."""
        for index in range(STAGES + 1):
            x = self._run_stage(index, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or with ``pre_logits`` to pooled features (B, dims[3])."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of some stages.

        Args:
            x: images (B, C, H, W).
            indices: stages 0..4; an int: the last so many; None: all.
            norm: whether the final norm is applied to the map of stage 4.
            stop_early: do not run stages after the last one that is asked for.
            output_fmt: only ``NCHW``.
            intermediates_only: return the list of maps alone.

        Returns:
            The maps, or the output of :meth:`forward_features` (with ``stop_early``: the last map that was computed)
            and the maps.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: {output_fmt!r}, but EMO's maps are NCHW")
        take, last = feature_take_indices(STAGES + 1, indices)
        maps = []
        for index in range(last + 1 if stop_early else STAGES + 1):
            x = self._run_stage(index, x)
            if index in take:
                maps.append(self.norm(x) if norm and index == STAGES else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if index == STAGES else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one that is asked for, the final norm and the classifier.

        Returns:
            The stages asked for, as numbers from 0.
        """
        take, last = feature_take_indices(STAGES + 1, indices)
        for index in range(last + 1, STAGES + 1):
            setattr(self, f"stage{index}", nn.Identity())
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none, with an empty ``global_pool`` for the map itself."""
        if global_pool is not None:
            if global_pool not in ("avg", "max", "avgmax", ""):
                raise ValueError(f"global_pool: {global_pool!r} is not known; give avg, max, avgmax or ''")
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if num_classes and self.global_pool.is_identity():
            raise ValueError(
                f"global_pool: '' leaves a map, but {num_classes} classes need pooled features; give 'avg'"
            )
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self.head.to(next(self.stage0.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks of stages 1..4 again in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters form a layer, from the input to the output (for layer-wise learning rates)."""
        blocks = r"^stage([1-4])" if coarse else [(r"^stage([1-4])\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stage0", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Parameters with more than one dimension that are not to decay: none."""
        return set()

    def fuse(self) -> "EMO":
        """A copy for inference in which every BatchNorm is folded into a convolution; this network stays as it is.

        For a network wrapped by ``features_only``, ``timm.utils.model.reparameterize_model`` does the same.
        """
        fused = copy.deepcopy(self).eval()
        for module in list(fused.modules()):
            if isinstance(module, StemConv | IRMB):
                module.fuse()
        return fused

    def _run_stage(self, index: int, x: Tensor) -> Tensor:
        stage = getattr(self, f"stage{index}")
        if self.grad_checkpointing and index > 0 and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)


def _build_stem(in_channels: int, channels: int) -> nn.Sequential:
    """A convolution of stride 2 and a block without expansion and residual, with a channel gate."""
    block = IRMB(
        channels,
        expansion=1,
        kernel_size=3,
        attention=False,
        norm="none",
        residual=False,
        value=False,
        squeeze_excite=True,
    )
    return nn.Sequential(StemConv(in_channels, channels), block)


def _build_stage(
    in_dim: int,
    dim: int,
    expansion: float,
    stride: int,
    dilation: int,
    drop_paths: Sequence[float],
    options: dict[str, Any],
) -> nn.Sequential:
    """The blocks of a stage: the first changes width and map and does not attend, the others keep both.

    Where the stage keeps the map that it would halve, the first block still sees it at the dilation of the stage before
    and the others at twice that: at every second place they compute what the halved map would hold.

    Args:
        in_dim: channels that come in.
        dim: channels of the stage.
        expansion: lambda; the first block expands by twice as much.
        stride: of the first block: 2, or 1 if the stage keeps the map that it would halve.
        dilation: of the stage before.
        drop_paths: of each block.
        options: further arguments of :class:`~modules.emo.blocks.IRMB`; ``head_dim`` 0 is a stage without attention.
    """
    attends = options["head_dim"] > 0
    options = {**options, "norm": "layer" if attends else "batch", "activation": "gelu" if attends else "silu"}
    first = IRMB(
        in_dim, dim, 2 * expansion, stride=stride, dilation=dilation, attention=False, residual=False, **options
    )
    dilation *= 2 // stride
    others = [
        IRMB(dim, dim, expansion, dilation=dilation, attention=attends, drop_path=rate, **options)
        for rate in drop_paths[1:]
    ]
    return nn.Sequential(first, *others)


def _check_images(images: Tensor, channels: int) -> None:
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images of shape {tuple(images.shape)}, but the network takes (batch, {channels}, height, width); "
            "convert the pictures, or build the network with in_chans of another number"
        )
    if min(images.shape[-2:]) < FULL_STRIDE:
        _warn_of_small_images(*images.shape[-2:])


@functools.cache
def _warn_of_small_images(height: int, width: int) -> None:
    """Once for every size."""
    warnings.warn(
        f"an image of {height}x{width} is smaller than {FULL_STRIDE} px, so that the five halvings reach one pixel "
        "too early; enlarge the images",
        stacklevel=2,
    )


def _linear(maximum: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop-path probabilities of the blocks of each stage, from 0 to the maximum."""
    rates = iter([maximum * number / max(1, sum(depths) - 1) for number in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def _check_stages(**fields: Sequence[float]) -> None:
    for name, values in fields.items():
        if len(values) != STAGES:
            raise ValueError(f"{name}: {tuple(values)} has {len(values)} values, expected {STAGES}, one per stage")
    if min(fields["depths"]) < 1:
        raise ValueError(f"depths: {tuple(fields['depths'])} has a stage without blocks; give each at least 1")


def _default_cfg(**overrides: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stage0.0.convs.0.0",
        "classifier": "head",
        "license": "apache-2.0",
        **overrides,
    }


default_cfgs = generate_default_cfgs({f"{name}.in1k": _default_cfg() for name in ARCHITECTURES})


def _create(name: str, pretrained: bool, **kwargs: Any) -> EMO:
    return build_model_with_cfg(
        EMO,
        name,
        pretrained,
        pretrained_filter_fn=fit_released_weights,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": False},
        **{**ARCHITECTURES[name], **kwargs},
    )


@register_model
def emo_1m(pretrained: bool = False, **kwargs: Any) -> EMO:
    """EMO with 1.4 M parameters; published: 71.5 % top-1 on ImageNet-1k."""
    return _create("emo_1m", pretrained, **kwargs)


@register_model
def emo_2m(pretrained: bool = False, **kwargs: Any) -> EMO:
    """EMO with 2.4 M parameters; published: 75.1 % top-1 on ImageNet-1k."""
    return _create("emo_2m", pretrained, **kwargs)


@register_model
def emo_5m(pretrained: bool = False, **kwargs: Any) -> EMO:
    """EMO with 5.1 M parameters; published: 78.4 % top-1 on ImageNet-1k."""
    return _create("emo_5m", pretrained, **kwargs)


@register_model
def emo_6m(pretrained: bool = False, **kwargs: Any) -> EMO:
    """EMO with 6.2 M parameters; published: 79.0 % top-1 on ImageNet-1k."""
    return _create("emo_6m", pretrained, **kwargs)
