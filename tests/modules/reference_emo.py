"""EMO written from its equations, tap by tap and window by window: what the tests compare with."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-6

SIZES: dict[str, dict[str, Any]] = {
    "emo_1m": {"depths": (2, 2, 8, 3), "dims": (32, 48, 80, 168), "heads": (4, 8)},
    "emo_2m": {"depths": (3, 3, 9, 3), "dims": (32, 48, 120, 200), "heads": (6, 10)},
    "emo_5m": {"depths": (3, 3, 9, 3), "dims": (48, 72, 160, 288), "heads": (5, 9)},
    "emo_6m": {"depths": (3, 3, 9, 3), "dims": (48, 72, 160, 320), "heads": (8, 10)},
}
State = Mapping[str, Tensor]


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """A 1x1 convolution, group by group."""
    parts = [
        (w.flatten(1) @ g.flatten(2)).unflatten(2, g.shape[2:])
        for w, g in zip(weight.chunk(groups), x.chunk(groups, dim=1), strict=True)
    ]
    out = torch.cat(parts, dim=1)
    return out if bias is None else out + bias[:, None, None]


def depthwise(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """A depth-wise convolution as a sum over taps."""
    kernel, (height, width) = weight.shape[-1], x.shape[-2:]
    padding = dilation * (kernel - 1) // 2
    padded = nn.functional.pad(x, (padding,) * 4)
    out = 0.0
    for row in range(kernel):
        for column in range(kernel):
            top, left = row * dilation, column * dilation
            patch = padded[:, :, top : top + height : stride, left : left + width : stride]
            out = out + weight[:, 0, row, column][:, None, None] * patch
    return out


def batch_norm(x: Tensor, state: State, name: str, training: bool) -> Tensor:
    """With the statistics of the batch (training) or the running ones."""
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / torch.sqrt(variance + EPS)[:, None, None]
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    """Over the channels of every token."""
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + EPS)
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def windows_of(height: int, width: int, window: int, layout: str) -> tuple[int, int, list[list[tuple[int, int]]]]:
    """Padded height and width, and the tokens (row, column) of every window."""
    if window <= 0:
        return height, width, [[(r, c) for r in range(height) for c in range(width)]]
    n1, n2 = (height + window - 1) // window, (width + window - 1) // window
    members = defaultdict(list)
    for row in range(n1 * window):
        for column in range(n2 * window):
            key = (row % n1, column % n2) if layout == "strided" else (row // window, column // window)
            members[key].append((row, column))
    return n1 * window, n2 * window, list(members.values())


def attend(
    u: Tensor, values: Tensor, state: State, name: str, heads: int, window: int, layout: str, mask: bool
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, for every window and every head; u and the values are padded already."""
    height, width = u.shape[-2:]
    query, key = pointwise(u, state[f"{name}.qk.conv.weight"], state[f"{name}.qk.conv.bias"]).chunk(2, dim=1)
    real = (state["real_height"], state["real_width"])
    out = torch.zeros_like(values)
    for tokens in windows_of(height, width, window, layout)[2]:
        rows, columns = [r for r, _ in tokens], [c for _, c in tokens]
        hidden = torch.tensor([r >= real[0] or c >= real[1] for r, c in tokens])
        q, k, v = (full[:, :, rows, columns].unflatten(1, (heads, -1)) for full in (query, key, values))
        scores = torch.einsum("bhdi,bhdj->bhij", q, k) * q.shape[2] ** -0.5
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        if mask:
            weights = weights * (~hidden).to(weights.dtype)
        weights = weights / weights.sum(-1, keepdim=True)
        out[:, :, rows, columns] = torch.einsum("bhij,bhdj->bhdi", weights, v).flatten(1, 2)
    return out


def block(
    x: Tensor,
    state: State,
    name: str,
    *,
    heads: int = 0,
    stride: int = 1,
    residual: bool = True,
    norm: str = "layer",
    window: int = 7,
    layout: str = "strided",
    mask: bool = False,
    attn_pre: bool = True,
    v_group: bool = False,
    dilation: int = 1,
    training: bool = False,
) -> Tensor:
    """The block; heads 0 is a block without attention."""
    if norm == "layer":
        u, act = layer_norm(x, state, f"{name}.norm.norm"), gelu
    else:
        u, act = batch_norm(x, state, f"{name}.norm", training), silu
    weight, bias = state[f"{name}.v.conv.weight"], state[f"{name}.v.conv.bias"]
    groups = heads if v_group else 1
    if heads:
        height, width = u.shape[-2:]
        full_height, full_width, _ = windows_of(height, width, window, layout)
        u = nn.functional.pad(u, (0, full_width - width, 0, full_height - height))
        facts = {**state, "real_height": height, "real_width": width}
        if attn_pre:
            o = attend(u, u, facts, name, heads, window, layout, mask)[:, :, :height, :width]
            a = act(pointwise(o, weight, bias, groups))
        else:
            values = act(pointwise(u, weight, bias, groups))
            a = attend(u, values, facts, name, heads, window, layout, mask)[:, :, :height, :width]
    else:
        a = act(pointwise(u, weight, bias))
    local = depthwise(a, state[f"{name}.conv_local.conv.weight"], stride, dilation)
    local = silu(batch_norm(local, state, f"{name}.conv_local.norm", training))
    projection = state[f"{name}.proj.conv.weight"]
    return x + pointwise(a + local, projection) if residual else pointwise(local, projection)


def stem(x: Tensor, state: State, training: bool = False) -> Tensor:
    """Convolution, BatchNorm, depth-wise convolution with a gate, projection."""
    x = nn.functional.conv2d(x, state["stage0.0.convs.0.0.weight"], state["stage0.0.convs.0.0.bias"], 2, 1)
    x = batch_norm(x, state, "stage0.0.convs.0.1", training)
    x = depthwise(x, state["stage0.1.conv_local.conv.weight"])
    x = silu(batch_norm(x, state, "stage0.1.conv_local.norm", training))
    mean = x.mean((2, 3), keepdim=True)
    gate = pointwise(mean, state["stage0.1.se.conv_reduce.weight"], state["stage0.1.se.conv_reduce.bias"])
    gate = pointwise(silu(gate), state["stage0.1.se.conv_expand.weight"], state["stage0.1.se.conv_expand.bias"])
    return pointwise(x / (1 + torch.exp(-gate)), state["stage0.1.proj.conv.weight"])


def network(x: Tensor, state: State, size: str, window: int = 7, training: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, classes) and the five maps."""
    maps = [stem(x, state, training)]
    for index, depth in enumerate(SIZES[size]["depths"]):
        x = maps[-1]
        late = index >= 2
        for number in range(depth):
            x = block(
                x,
                state,
                f"stage{index + 1}.{number}",
                heads=SIZES[size]["heads"][index - 2] if late and number else 0,
                stride=1 if number else 2,
                residual=number > 0,
                norm="layer" if late else "batch",
                window=window,
                training=training,
            )
        maps.append(x)
    pooled = layer_norm(maps[-1], state, "norm.norm").mean((2, 3))
    return pooled @ state["head.weight"].T + state["head.bias"], maps


def official_keys(size: str) -> list[str]:
    """The names in a released file, in order."""
    statistics = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    keys = ["stage0.0.convs.0.0.weight", "stage0.0.convs.0.0.bias"]
    keys += [f"stage0.0.convs.0.1.{name}" for name in statistics]
    keys += ["stage0.1.conv_local.conv.weight"] + [f"stage0.1.conv_local.norm.{name}" for name in statistics]
    keys += [f"stage0.1.se.{conv}.{name}" for conv in ("conv_reduce", "conv_expand") for name in ("weight", "bias")]
    keys += ["stage0.1.proj.conv.weight"]
    for index, depth in enumerate(SIZES[size]["depths"], start=1):
        for number in range(depth):
            block_name = f"stage{index}.{number}"
            norm = [f"norm.{name}" for name in statistics] if index < 3 else ["norm.norm.weight", "norm.norm.bias"]
            attention = ["qk.conv.weight", "qk.conv.bias"] if index >= 3 and number else []
            rest = ["v.conv.weight", "v.conv.bias", "conv_local.conv.weight"]
            rest += [f"conv_local.norm.{name}" for name in statistics] + ["proj.conv.weight"]
            keys += [f"{block_name}.{name}" for name in norm + attention + rest]
    return [*keys, "norm.norm.weight", "norm.norm.bias", "head.weight", "head.bias"]
