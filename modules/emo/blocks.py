"""The inverted residual mobile block (iRMB) of EMO and the window attention inside it.

Everything maps (B, C, H, W) to (B, D, H', W'). Tensors stay in torch's ``channels_last`` memory format, so that a 1x1
convolution and a LayerNorm over channels run on the (B, H, W, C) view without copies; any input format is accepted.
"""

import functools
import math
import warnings
from typing import Literal, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional

from modules.norm_folding import fold_after, fold_before

Norm = Literal["batch", "layer", "none"]
WindowLayout = Literal["strided", "contiguous"]

NORM_EPS = 1e-6
GLOBAL_WINDOW = 0


class FreshSiLU(nn.SiLU):
    """SiLU of a tensor that nobody else needs: in inference it overwrites it, which spares the largest allocations."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return functional.silu(x, inplace=not torch.is_grad_enabled())


ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": FreshSiLU, "gelu": nn.GELU, "none": nn.Identity}


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, computed as a matrix product on the (B, H, W, C) view.

    Args:
        in_channels: C.
        out_channels: D.
        bias: whether to add one.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H, W), the result in ``channels_last``."""
        if torch.compiler.is_exporting():  # other runtimes know convolutions better than products between transposes
            return super().forward(x)
        return functional.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape, in ``channels_last``."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNormAct(nn.Module):
    """A convolution, an optional BatchNorm and an optional activation.

    Args:
        conv: the convolution.
        batch_norm: whether a BatchNorm follows.
        activation: name in ``ACTIVATIONS``.
    """

    def __init__(self, conv: nn.Conv2d, batch_norm: bool = False, activation: str = "none") -> None:
        super().__init__()
        self.conv = conv
        self.norm = batch_norm_2d(conv.out_channels) if batch_norm else nn.Identity()
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to what the convolution makes of it."""
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> "ConvNormAct":
        """Fold the BatchNorm into the convolution, in place."""
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_after(self.conv, self.norm)
            self.norm = nn.Identity()
        return self


class SqueezeExcite(nn.Module):
    """Channel gate from the global mean: x * sigmoid(W_2 SiLU(W_1 mean(x))), reduction ratio 1.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = PointwiseConv(channels, channels)
        self.act = nn.SiLU()
        self.conv_expand = PointwiseConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        mean = x.mean((2, 3), keepdim=True)
        return x * self.conv_expand(self.act(self.conv_reduce(mean))).sigmoid()


class WindowGrid(NamedTuple):
    """How a map is cut into windows.

    Args:
        height: of the map, before padding.
        width: of the map, before padding.
        window: (rows, columns) of tokens in a window.
        counts: (n1, n2) windows down and across.
    """

    height: int
    width: int
    window: tuple[int, int]
    counts: tuple[int, int]

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of zero tokens at the bottom and the right."""
        return self.counts[0] * self.window[0] - self.height, self.counts[1] * self.window[1] - self.width


def window_grid(height: int, width: int, window_size: int) -> WindowGrid:
    """The grid for a map and a window size; a size of 0 or -1 is one window over the whole map."""
    if window_size <= GLOBAL_WINDOW:
        return WindowGrid(height, width, (height, width), (1, 1))
    counts = (-(-height // window_size), -(-width // window_size))
    return WindowGrid(height, width, (window_size, window_size), counts)


def partition_windows(x: Tensor, grid: WindowGrid, layout: WindowLayout) -> Tensor:
    """Cut a padded map into windows.

    Args:
        x: (B, C, H', W') with H' = n1 * rows and W' = n2 * columns.
        grid: how to cut.
        layout: ``strided``: token (r, c) goes to window (r mod n1, c mod n2), place (r div n1, c div n2);
            ``contiguous``: to window (r div rows, c div columns), place (r mod rows, c mod columns).

    Returns:
        (B * n1 * n2, C, rows, columns) in ``channels_last``.
    """
    (n1, n2), (rows, columns) = grid.counts, grid.window
    if n1 == n2 == 1:
        return x
    batch, channels = x.shape[:2]
    x = x.permute(0, 2, 3, 1)
    if layout == "strided":
        x = x.reshape(batch, rows, n1, columns, n2, channels).permute(0, 2, 4, 1, 3, 5)
    else:
        x = x.reshape(batch, n1, rows, n2, columns, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * n1 * n2, rows, columns, channels).permute(0, 3, 1, 2)


def merge_windows(windows: Tensor, grid: WindowGrid, layout: WindowLayout) -> Tensor:
    """Undo :func:`partition_windows`.

    Args:
        windows: (B * n1 * n2, C, rows, columns).
        grid: how the map was cut.
        layout: as it was cut.

    Returns:
        (B, C, H', W') in ``channels_last``.
    """
    (n1, n2), (rows, columns) = grid.counts, grid.window
    if n1 == n2 == 1:
        return windows
    channels = windows.shape[1]
    x = windows.permute(0, 2, 3, 1).reshape(-1, n1, n2, rows, columns, channels)
    x = x.permute(0, 3, 1, 4, 2, 5) if layout == "strided" else x.permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, n1 * rows, n2 * columns, channels).permute(0, 3, 1, 2)


class StridedWindowAttention(nn.Module):
    """Multi-head attention inside windows whose tokens are spread over the map (paper: EW-MHSA).

    It has no weights: the block that owns the projections hands them over.

    Args:
        num_heads: heads.
        window_size: tokens per side of a window; 0 or -1 for one window over the whole map.
        layout: ``strided`` windows (the released networks) or ``contiguous`` ones.
        mask_padding: whether zero tokens that pad the map to whole windows are hidden from the others. The released
            networks attend to them.

    Raises:
        ValueError: for an unknown layout or a window size below -1.
    """

    def __init__(
        self,
        num_heads: int,
        window_size: int = 7,
        layout: WindowLayout = "strided",
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        if window_size < -1:
            raise ValueError(f"window_size: {window_size} is negative; give tokens per side, or 0 for a global window")
        if layout not in ("strided", "contiguous"):
            raise ValueError(f"window_layout: {layout!r} is not known; give 'strided' or 'contiguous'")
        self.num_heads, self.window_size = num_heads, window_size
        self.layout, self.mask_padding = layout, mask_padding

    def forward(self, x: Tensor, query_key: nn.Module, value: nn.Module | None = None) -> Tensor:
        """Attend inside windows.

        Args:
            x: (B, C, H, W).
            query_key: (B, C, ...) -> (B, 2C, ...), queries first, each split into heads.
            value: (B, C, ...) -> (B, M, ...), computed inside the windows; None for x itself.

        Returns:
            (B, C, H, W), or (B, M, H, W) with ``value``.
        """
        height, width = x.shape[-2:]
        grid = window_grid(height, width, self.window_size)
        bottom, right = grid.padding
        if bottom or right:
            _tell_padding(grid)
            x = functional.pad(x, (0, right, 0, bottom))
        windows = partition_windows(x, grid, self.layout)
        query, key = self._split(query_key(windows), 2)
        (values,) = self._split(windows if value is None else value(windows), 1)
        out = functional.scaled_dot_product_attention(query, key, values, attn_mask=self._mask(x, grid))
        out = out.transpose(1, 2).reshape(-1, *grid.window, self.num_heads * values.shape[-1]).permute(0, 3, 1, 2)
        out = merge_windows(out, grid, self.layout)
        return out[:, :, :height, :width] if bottom or right else out

    def _split(self, windows: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(N, parts * C, rows, columns) to parts of (N, heads, tokens, C / heads)."""
        count, channels, rows, columns = windows.shape
        head_dim = channels // (parts * self.num_heads)
        tokens = windows.permute(0, 2, 3, 1).reshape(count, rows * columns, parts, self.num_heads, head_dim)
        return tokens.permute(2, 0, 3, 1, 4).unbind(0)

    def _mask(self, x: Tensor, grid: WindowGrid) -> Tensor | None:
        """True where a key may be attended to: (B * n1 * n2, 1, 1, tokens); None if all may."""
        if not self.mask_padding or not any(grid.padding):
            return None
        real = torch.zeros(1, 1, *x.shape[-2:], dtype=torch.bool, device=x.device)
        real[:, :, : grid.height, : grid.width] = True
        return partition_windows(real.expand(x.shape[0], -1, -1, -1), grid, self.layout).flatten(1)[:, None, None]


class IRMB(nn.Module):
    """Inverted residual mobile block: expand by attention, mix by a depth-wise convolution, shrink; one residual.

    A stand-alone layer for any network: ``IRMB(64)`` keeps the shape, ``IRMB(64, 128, stride=2, attention=False)``
    halves the map. In the paper's symbols::

        u = Norm(x)
        a = act(W_v A(u))                 A: attention in windows, or nothing
        l = SE(SiLU(BN(DWConv(a))))
        y = W_p Dropout(a + l)            without residual: W_p Dropout(l)
        out = x + DropPath(y)             without residual: y

    Args:
        dim: channels C of the input.
        out_dim: channels D of the output; None for C.
        expansion: lambda; the inner width is M = int(C * lambda).
        kernel_size: of the depth-wise convolution, odd.
        stride: 1 or 2.
        dilation: of the depth-wise convolution.
        attention: whether the block attends.
        head_dim: width of a head; divides C.
        window_size: tokens per side of a window; 0 or -1 for the whole map.
        window_layout: ``strided`` or ``contiguous``.
        attn_pre: attend to the normalised input and expand afterwards (the released networks); False: expand first and
            attend to the expanded values.
        v_group: W_v of an attending block has one group per head.
        mask_padding: hide the zeros that pad a map to whole windows.
        norm: norm of the input: ``batch``, ``layer`` or ``none``.
        activation: after W_v, ``gelu`` or ``silu``.
        residual: None: wherever shapes allow it.
        value: False leaves W_v out (lambda 1, no attention).
        squeeze_excite: gate the depth-wise branch.
        drop: dropout before the shrinking.
        drop_path: probability to drop the block for a sample, where it has a residual.

    Raises:
        ValueError: for an even kernel, or widths that do not divide into heads.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        expansion: float = 4.0,
        kernel_size: int = 5,
        stride: int = 1,
        *,
        dilation: int = 1,
        attention: bool = True,
        head_dim: int = 32,
        window_size: int = 7,
        window_layout: WindowLayout = "strided",
        attn_pre: bool = True,
        v_group: bool = False,
        mask_padding: bool = False,
        norm: Norm = "layer",
        activation: Literal["gelu", "silu"] = "gelu",
        residual: bool | None = None,
        value: bool = True,
        squeeze_excite: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        inner = int(dim * expansion)
        self.residual = dim == out_dim and stride == 1 if residual is None else residual
        _check_block(dim, out_dim, inner, kernel_size, stride, self.residual, value or attention)
        heads = _check_heads(dim, inner, head_dim, expansion, attn_pre, v_group) if attention else 1
        self.attn_pre = attn_pre
        self.norm = _input_norm(norm, dim)
        if attention:
            self.qk = ConvNormAct(PointwiseConv(dim, 2 * dim))
            self.attention = StridedWindowAttention(heads, window_size, window_layout, mask_padding)
        else:
            self.attention = None
        grouped = attention and v_group and heads > 1
        expand = nn.Conv2d(dim, inner, 1, groups=heads) if grouped else PointwiseConv(dim, inner)
        self.v = ConvNormAct(expand, activation=activation) if value or attention else nn.Identity()
        self.conv_local = ConvNormAct(
            depthwise_conv(inner, kernel_size, stride, dilation), batch_norm=True, activation="silu"
        )
        self.se = SqueezeExcite(inner) if squeeze_excite else nn.Identity()
        self.drop = nn.Dropout(drop) if drop else nn.Identity()
        self.proj = ConvNormAct(PointwiseConv(inner, out_dim, bias=False))
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, ceil(H / stride), ceil(W / stride))."""
        expanded = self._expand(self.norm(x))
        local = self.se(self.conv_local(expanded))
        if not self.residual:
            return self.proj(self.drop(local))
        return x + self.drop_path(self.proj(self.drop(expanded + local)))

    def _expand(self, x: Tensor) -> Tensor:
        """The normalised input (B, C, H, W) to (B, M, H, W)."""
        if self.attention is None:
            return self.v(x)
        if self.attn_pre:
            return self.v(self.attention(x, self.qk))
        return self.attention(x, self.qk, self.v)

    def fuse(self) -> "IRMB":
        """Fold the batch norms into their neighbours, in place: for inference, equal up to rounding."""
        self.conv_local.fuse()
        if isinstance(self.norm, nn.BatchNorm2d) and self.attention is None and isinstance(self.v, ConvNormAct):
            fold_before(self.norm, self.v.conv)
            self.norm = nn.Identity()
        return self


def depthwise_conv(channels: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A depth-wise convolution without bias that maps (H, W) to (ceil(H / stride), ceil(W / stride))."""
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False)


def batch_norm_2d(channels: int) -> nn.BatchNorm2d:
    """BatchNorm as EMO has it everywhere."""
    return nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=0.1)


def _input_norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return batch_norm_2d(channels)
    if norm == "layer":
        return ChannelLayerNorm(channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm: {norm!r} is not known; give 'batch', 'layer' or 'none'")


def _check_block(
    dim: int, out_dim: int, inner: int, kernel_size: int, stride: int, residual: bool, value: bool
) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: {kernel_size} is not odd; give 3 or 5, so that the map keeps its centre")
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride}, but a block keeps the map (1) or halves it (2)")
    if residual and (dim != out_dim or stride != 1):
        raise ValueError(f"residual: impossible from {dim} to {out_dim} channels with stride {stride}; leave it out")
    if not value and inner != dim:
        raise ValueError(f"value: False needs an inner width equal to the {dim} channels of the input, not {inner}")


def _check_heads(dim: int, inner: int, head_dim: int, expansion: float, attn_pre: bool, v_group: bool) -> int:
    """The number of heads, if the widths divide into so many."""
    if head_dim < 1 or dim % head_dim:
        divisors = [width for width in range(8, dim + 1) if dim % width == 0]
        nearest = min(divisors or [dim], key=lambda width: abs(width - head_dim))
        raise ValueError(f"head_dim: {dim} channels do not divide into heads of {head_dim}; give {nearest}, say")
    heads = dim // head_dim
    for name, needed in (("attn_pre: False", not attn_pre), ("v_group: True", v_group)):
        if needed and inner % heads:
            raise ValueError(
                f"{name} splits the expanded channels into heads, but int({dim} * {expansion:g}) = {inner} do not "
                f"divide into {heads}; EMO-1M is such a case (588 channels, 8 heads in stage 4). Leave attn_pre and "
                "v_group as they are, or give another expansion or head_dim"
            )
    return heads


def _tell_padding(grid: WindowGrid) -> None:
    if not torch.compiler.is_compiling() and math.prod(grid.counts) * math.prod(grid.window) > 2 * (
        grid.height * grid.width
    ):
        _warn_of_padding(grid)


@functools.cache
def _warn_of_padding(grid: WindowGrid) -> None:
    """Once for every size of map."""
    tokens = math.prod(grid.counts) * math.prod(grid.window)
    warnings.warn(
        f"window_size: a {grid.height}x{grid.width} map is padded to {tokens} tokens for windows of {grid.window[0]}, "
        "more than half of them zeros; for small images give window_size: 0 (one window over the map)",
        stacklevel=2,
    )
