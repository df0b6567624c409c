import warnings

import pytest
import torch
from torch import nn

from modules.emo import IRMB, StridedWindowAttention
from modules.emo.blocks import PointwiseConv, merge_windows, partition_windows, window_grid
from tests.modules import reference_emo as reference


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(0.5 + noise)
        elif tensor.ndim == 1:
            tensor.copy_(noise - 0.5)
    return module


def named(module: nn.Module, prefix: str = "b") -> dict[str, torch.Tensor]:
    """Live tensors of a module under the names the reference uses."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def compare(block: IRMB, x: torch.Tensor, **equations: object) -> None:
    """Output and all gradients against the equations, in double precision."""
    training = bool(equations.get("training", False))
    shake(block.double()).train(training)
    results = []
    for run in (block, lambda images: reference.block(images, named(block), "b", **equations)):
        images = x.clone().requires_grad_()
        block.zero_grad()
        out = run(images)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().reshape(out.shape)
        (out * weights).sum().backward()
        gradients = {key: value.grad.clone() for key, value in block.named_parameters()}
        results.append((out, images.grad, gradients))
    ours, expected = results
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-9, atol=1e-9)
    for key, gradient in expected[2].items():
        assert gradient.abs().max() > 0 or key.startswith("norm"), key
        torch.testing.assert_close(ours[2][key], gradient, rtol=1e-9, atol=1e-9, msg=key)


def random_map(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(
        batch, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height)
    )


ATTENTION = {
    "one window, exact": ({}, (3, 3), {"window_size": 3}),
    "several windows": ({}, (6, 9), {"window_size": 3}),
    "padded": ({}, (4, 5), {"window_size": 3}),
    "padded to one window": ({}, (2, 3), {"window_size": 4}),
    "global": ({"window": 0}, (4, 5), {"window_size": 0}),
    "global, -1": ({"window": -1}, (3, 2), {"window_size": -1}),
    "contiguous": ({"layout": "contiguous"}, (7, 5), {"window_size": 3, "window_layout": "contiguous"}),
    "masked": ({"mask": True}, (4, 5), {"window_size": 3, "mask_padding": True}),
    "masked, one window": ({"mask": True}, (2, 3), {"window_size": 3, "mask_padding": True}),
    "masked, contiguous": (
        {"mask": True, "layout": "contiguous"},
        (4, 5),
        {"window_size": 3, "window_layout": "contiguous", "mask_padding": True},
    ),
    "expanded first": ({"attn_pre": False}, (4, 6), {"window_size": 3, "attn_pre": False}),
    "grouped": ({"v_group": True}, (4, 6), {"window_size": 3, "v_group": True}),
    "grouped, expanded first": (
        {"v_group": True, "attn_pre": False},
        (5, 3),
        {"window_size": 3, "v_group": True, "attn_pre": False},
    ),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attending_block_follows_its_equations_with_gradients(case: str) -> None:
    equations, (height, width), options = ATTENTION[case]
    torch.manual_seed(1)
    block = IRMB(8, expansion=2.5, kernel_size=5, head_dim=4, **options)
    equations = {"heads": 2, "window": options["window_size"], **equations}
    compare(block, random_map(2, 8, height, width), **equations)
    compare(block, random_map(2, 8, height, width), **equations, training=True)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("out_dim", "stride", "kernel"), [(8, 1, 3), (10, 2, 3), (10, 2, 5), (6, 1, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_convolutional_block_follows_its_equations_with_gradients(
    norm: str, out_dim: int, stride: int, kernel: int, training: bool
) -> None:
    torch.manual_seed(1)
    activation = "gelu" if norm == "layer" else "silu"
    block = IRMB(8, out_dim, 1.9, kernel, stride, attention=False, norm=norm, activation=activation)
    assert block.conv_local.conv.in_channels == 15  # int(8 * 1.9)
    equations = {"stride": stride, "residual": out_dim == 8, "norm": norm, "training": training}
    compare(block, random_map(3, 8, 7, 10), **equations)


def test_dilated_block_follows_its_equations() -> None:
    torch.manual_seed(1)
    block = IRMB(8, 8, 2, 5, dilation=3, attention=False)
    compare(block, random_map(2, 8, 9, 8), dilation=3)


def test_equal_widths_without_residual_skip_neither_input_nor_expansion() -> None:
    torch.manual_seed(1)
    block = IRMB(8, 8, 2, 3, attention=False, residual=False)
    compare(block, random_map(2, 8, 5, 5), residual=False)


def test_strided_windows_are_spread_and_contiguous_ones_are_not() -> None:
    places = torch.arange(14 * 21, dtype=torch.float32).reshape(1, 1, 14, 21).repeat(2, 3, 1, 1)
    grid = window_grid(14, 21, 7)
    strided = partition_windows(places, grid, "strided")
    contiguous = partition_windows(places, grid, "contiguous")
    for row in range(14):
        for column in range(21):
            value = row * 21 + column
            window = (row % 2) * 3 + column % 3
            assert strided[window, 0, row // 2, column // 3] == value
            window = (row // 7) * 3 + column // 7
            assert contiguous[6 + window, 1, row % 7, column % 7] == value
    for layout, windows in (("strided", strided), ("contiguous", contiguous)):
        assert torch.equal(merge_windows(windows, grid, layout), places)


def test_one_window_is_not_copied() -> None:
    x = torch.randn(2, 4, 7, 7)
    grid = window_grid(7, 7, 7)
    assert partition_windows(x, grid, "strided") is x
    assert merge_windows(x, grid, "strided") is x


def test_masked_padding_leaves_the_tokens_of_a_map_what_they_are_without_padding() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 4)
    project = PointwiseConv(8, 16)
    exact = StridedWindowAttention(2, 0)(x, project)
    masked = StridedWindowAttention(2, 7, mask_padding=True)(x, project)
    unmasked = StridedWindowAttention(2, 7)(x, project)
    torch.testing.assert_close(masked, exact, rtol=1e-5, atol=1e-5)
    assert (unmasked - exact).abs().max() > 0.05


def test_block_keeps_channels_last_and_takes_any_format() -> None:
    block = shake(IRMB(16, head_dim=8)).eval()
    x = torch.randn(2, 16, 9, 8)
    plain, last = block(x), block(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last)


def test_inference_overwrites_nothing_that_others_see() -> None:
    torch.manual_seed(0)
    block = shake(IRMB(8, head_dim=4, norm="batch", activation="silu", window_size=0)).eval()
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    given, expected = x.clone(), block(x).detach()
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, given)


def test_drop_path_drops_whole_samples_and_scales_the_others() -> None:
    torch.manual_seed(0)
    block = shake(IRMB(8, expansion=2, kernel_size=3, attention=False, norm="layer", drop_path=0.5)).train()
    x = torch.randn(64, 8, 4, 4)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    added = block(x) - x
    full = reference.block(x, named(block), "b") - x
    dropped = added.abs().amax((1, 2, 3)) == 0
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(added[~dropped], 2 * full[~dropped], rtol=1e-4, atol=1e-4)


def test_dropout_acts_before_the_projection() -> None:
    torch.manual_seed(0)
    block = shake(IRMB(8, 6, expansion=2, kernel_size=3, attention=False, drop=0.5)).train()
    seen = {}
    block.drop.register_forward_hook(lambda module, inputs, out: seen.update(before=inputs[0], after=out))
    out = block(torch.randn(4, 8, 5, 5))
    kept = seen["after"] != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(seen["after"][kept], 2 * seen["before"][kept])
    torch.testing.assert_close(out, nn.functional.conv2d(seen["after"], block.proj.conv.weight), rtol=1e-5, atol=1e-5)


def test_drop_path_is_absent_where_there_is_no_residual() -> None:
    assert isinstance(IRMB(8, 10, drop_path=0.5, attention=False).drop_path, nn.Identity)


@pytest.mark.parametrize("options", [{"norm": "batch", "activation": "silu", "attention": False}, {"norm": "batch"}])
def test_folded_block_equals_the_block_also_where_zeros_pad(options: dict) -> None:
    torch.manual_seed(0)
    block = shake(IRMB(8, expansion=3, head_dim=4, window_size=3, **options).double()).eval()
    x = random_map(2, 8, 4, 5)
    expected = block(x)
    found = block.fuse()(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    folded = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(folded) == (0 if "attention" in options else 1)  # the zeros of an attending block come after its norm


def test_pointwise_convolution_is_a_convolution() -> None:
    torch.manual_seed(0)
    conv = PointwiseConv(5, 7).double()
    x = random_map(2, 5, 3, 4)
    assert isinstance(conv, nn.Conv2d)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias))


def test_every_norm_has_the_eps_of_the_paper() -> None:
    for module in IRMB(8, head_dim=4).modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert module.eps == 1e-6
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 3}, "head_dim: 8 channels do not divide into heads of 3"),
        ({"head_dim": 0}, "head_dim: 8 channels do not divide into heads of 0"),
        ({"kernel_size": 4}, "kernel_size: 4 is not odd"),
        ({"stride": 3}, "stride: 3, but"),
        ({"window_size": -2}, "window_size: -2 is negative"),
        ({"window_layout": "shifted"}, "window_layout: 'shifted' is not known"),
        ({"norm": "group"}, "norm: 'group' is not known"),
        ({"attn_pre": False, "expansion": 1.9}, r"attn_pre: False .* int\(8 \* 1.9\) = 15 do not divide into 2"),
        ({"v_group": True, "expansion": 1.9}, r"v_group: True .* int\(8 \* 1.9\) = 15 do not divide into 2"),
        ({"out_dim": 9, "residual": True}, "residual: impossible from 8 to 9"),
        ({"value": False, "attention": False}, "value: False needs an inner width equal to the 8 channels"),
    ],
)
def test_impossible_blocks_say_why(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IRMB(8, **{"head_dim": 4, **arguments})


def test_small_maps_in_large_windows_are_told_once() -> None:
    attention, project = StridedWindowAttention(2, 13), PointwiseConv(8, 16)
    with pytest.warns(UserWarning, match="a 4x6 map is padded to 169 tokens for windows of 13"):
        attention(torch.randn(1, 8, 4, 6), project)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(torch.randn(1, 8, 4, 6), project)
        attention(torch.randn(1, 8, 12, 12), project)  # 144 of 169 tokens are real
