"""Heads and networks of segmentation, against published counts and plain computations."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from modules.segmentation import (
    ASPP,
    DeepLabV3Head,
    FCNHead,
    PSPHead,
    PyramidPooling,
    SegmentationNetwork,
    build_network,
    resize_logits,
    sliding_logits,
)
from modules.segmentation.heads import ConvBNReLU
from tests.modules.street_scenes import TINY_BACKBONE

# Published for 150 classes with the auxiliary head, and MACs at 512 without it (EMO, section 6).
PUBLISHED = {
    ("emo_1m", "deeplabv3"): (5_653_188, 2.41),
    ("emo_2m", "deeplabv3"): (6_967_156, 3.40),
    ("emo_5m", "deeplabv3"): (10_355_828, 5.87),
    ("emo_1m", "pspnet"): (4_374_724, 2.05),
    ("emo_2m", "pspnet"): (5_557_620, 3.00),
    ("emo_5m", "pspnet"): (8_585_844, 5.36),
}
PYRAMID_HEADS = ("semantic_fpn", "segformer", "upernet")


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def randomised(module: nn.Module) -> nn.Module:
    """Fixed values everywhere, in evaluation mode, so that statistics matter."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise + 0.5 if "running_var" in name else 0.2 * (noise - 0.5))
    return module.eval()


def by_hand(block: ConvBNReLU, x: torch.Tensor, dilation: int = 1) -> torch.Tensor:
    """Convolution as a sum over the taps of the kernel, then the definition of BatchNorm, then max(0, .)."""
    weight = block.conv.weight
    side = weight.shape[2]
    reach = dilation * (side // 2)
    padded = functional.pad(x, (reach, reach, reach, reach))
    height, width = x.shape[2:]
    out = x.new_zeros(len(x), len(weight), height, width)
    for row in range(side):
        for column in range(side):
            shifted = padded[
                ..., row * dilation : row * dilation + height, column * dilation : column * dilation + width
            ]
            out += torch.einsum("bchw,oc->bohw", shifted, weight[:, :, row, column])
    bn = block.bn
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).view(-1, 1, 1)
    return ((out - bn.running_mean.view(-1, 1, 1)) * scale + bn.bias.view(-1, 1, 1)).clamp(min=0)


def bilinear(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear interpolation of (B, C, h, w) whose corners are not aligned, pixel by pixel."""
    out = x.new_empty(*x.shape[:2], height, width)
    for row in range(height):
        for column in range(width):
            y = max((row + 0.5) * x.shape[2] / height - 0.5, 0.0)
            z = max((column + 0.5) * x.shape[3] / width - 0.5, 0.0)
            top, left = int(y), int(z)
            bottom, right = min(top + 1, x.shape[2] - 1), min(left + 1, x.shape[3] - 1)
            upper = x[..., top, left] * (1 - z + left) + x[..., top, right] * (z - left)
            lower = x[..., bottom, left] * (1 - z + left) + x[..., bottom, right] * (z - left)
            out[..., row, column] = upper * (1 - y + top) + lower * (y - top)
    return out


@pytest.mark.parametrize("setting", PUBLISHED)
def test_parameters_are_the_published_ones(setting):
    backbone, head = setting
    options = {"window_size": 16} if backbone == "emo_5m" else {}
    with torch.device("meta"):
        network = build_network(backbone, head, 150, options=options)
    assert parameters(network) == PUBLISHED[setting][0]


@pytest.mark.parametrize("setting", [("emo_1m", "deeplabv3"), ("emo_1m", "pspnet"), ("emo_5m", "deeplabv3")])
def test_macs_are_the_published_ones(setting):
    """Counted as the authors do: convolutions, matrix products and norms, without the resizing of logits."""
    from fvcore.nn import FlopCountAnalysis

    backbone, head = setting
    options = {"window_size": 16} if backbone == "emo_5m" else {}
    network = build_network(backbone, head, 150, options=options, auxiliary=False).eval()
    count = FlopCountAnalysis(network, torch.zeros(1, 3, 512, 512))
    count = count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_kind = count.by_operator()
    macs = count.total() - by_kind["upsample_bilinear2d"]
    assert macs / 1e9 == pytest.approx(PUBLISHED[setting][1], rel=5e-3)


def test_aspp_equals_shifted_sums():
    aspp = randomised(ASPP(3, 4, (1, 2, 3)))
    x = torch.randn(2, 3, 5, 7)
    mean = by_hand(aspp.pool, x.mean((2, 3))[..., None, None]).expand(-1, -1, 5, 7)
    branches = [by_hand(branch, x, dilation) for branch, dilation in zip(aspp.branches, (1, 2, 3), strict=True)]
    assert [branch.conv.kernel_size[0] for branch in aspp.branches] == [1, 3, 3]
    torch.testing.assert_close(aspp(x), torch.cat([mean, *branches], 1), atol=1e-5, rtol=1e-5)
    assert aspp(x).shape[1] == aspp.out_channels == 16


def test_pyramid_pooling_equals_means_over_cells():
    pooling = randomised(PyramidPooling(2, 3, (1, 2, 3)))
    x = torch.randn(2, 2, 6, 9)
    expected = [x]
    for size, branch in zip((1, 2, 3), pooling.branches, strict=True):
        cells = torch.empty(2, 2, size, size)
        for row in range(size):
            for column in range(size):
                # floor(i n / size) .. ceil((i + 1) n / size)
                rows = slice(row * 6 // size, -((row + 1) * 6 // -size))
                columns = slice(column * 9 // size, -((column + 1) * 9 // -size))
                cells[:, :, row, column] = x[:, :, rows, columns].mean((2, 3))
        expected.append(bilinear(by_hand(branch, cells), 6, 9))
    torch.testing.assert_close(pooling(x), torch.cat(expected, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", [DeepLabV3Head(3, 5, 4, (1, 2)), PSPHead(3, 5, 4, (1, 2)), FCNHead(3, 5, 4)])
def test_a_head_ends_with_a_3x3_bottleneck_and_a_classifier(head):
    randomised(head)
    *context, bottleneck, classifier = head
    x = torch.randn(2, 3, 6, 6)
    y = by_hand(bottleneck, context[0](x) if context else x)
    weight = classifier.conv.weight[:, :, 0, 0]
    expected = torch.einsum("bchw,oc->bohw", y, weight) + classifier.conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-5)


def test_no_convolution_before_a_norm_has_a_bias_and_the_classifier_has():
    for head in (DeepLabV3Head(8, 5), PSPHead(8, 5), FCNHead(8, 5)):
        with_bias = [name for name, module in head.named_modules() if getattr(module, "bias", None) is not None]
        assert [name for name in with_bias if "bn" not in name] == [f"{len(head) - 1}.conv"]


def test_logits_are_resized_without_aligned_corners():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(resize_logits(x, (9, 7)), bilinear(x, 9, 7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet", *PYRAMID_HEADS])
@pytest.mark.parametrize("size", [(64, 64), (70, 90)])
def test_logits_have_the_size_of_the_images(head, size):
    network = build_network(TINY_BACKBONE, head, 7).eval()
    images = torch.randn(2, 3, *size)
    logits, auxiliary = network.forward_both(images)
    assert logits.shape == auxiliary.shape == (2, 7, *size)
    assert torch.equal(network(images), logits)


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet", *PYRAMID_HEADS])
def test_a_network_is_exported_for_any_batch(head):
    network = build_network(TINY_BACKBONE, head, 7, auxiliary=False).eval()
    program = torch.export.export(
        network, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    ).module()
    images = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program(images), network(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "emo_1m"])
def test_other_backbones(backbone):
    network = build_network(backbone, "deeplabv3", 5, in_channels=1).eval()
    assert network(torch.randn(1, 1, 64, 64)).shape == (1, 5, 64, 64)


def test_the_head_reads_the_last_map_and_the_auxiliary_head_the_one_before():
    network = build_network(TINY_BACKBONE, "pspnet", 5).eval()
    images = torch.randn(2, 3, 64, 64)
    third, fourth = network.backbone(images)
    logits, auxiliary = network.forward_both(images)
    torch.testing.assert_close(logits, resize_logits(network.head(fourth), (64, 64)))
    torch.testing.assert_close(auxiliary, resize_logits(network.auxiliary(third), (64, 64)))
    assert (third.shape[2], fourth.shape[2]) == (4, 2)


@pytest.mark.parametrize(("stride", "side"), [(32, 2), (16, 4), (8, 8)])
def test_output_stride_is_passed_to_the_backbone(stride, side):
    network = build_network("emo_1m", "deeplabv3", 5, output_stride=stride).eval()
    assert network.backbone(torch.randn(1, 3, 64, 64))[-1].shape[2] == side


def test_images_are_padded_for_heads_that_read_a_pyramid():
    """What is padded at the right and at the bottom does not shift the logits."""
    network = build_network(TINY_BACKBONE, "semantic_fpn", 5).eval()
    images = torch.randn(1, 3, 50, 70)
    padded = torch.zeros(1, 3, 64, 96)
    padded[..., :50, :70] = images
    torch.testing.assert_close(network(images), network(padded)[..., :50, :70])


@pytest.mark.parametrize("name", PYRAMID_HEADS)
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    for module in [key for key in sys.modules if key.startswith("segmentation_models_pytorch")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ImportError, match=rf"head: {name} needs .*pip install 'lightning-apps\[dense\]'"):
        build_network(TINY_BACKBONE, name, 5)


def test_an_unknown_head_is_told():
    with pytest.raises(ValueError, match="head: 'unet' is unknown; expected deeplabv3, pspnet, semantic_fpn"):
        build_network(TINY_BACKBONE, "unet", 5)


def test_a_dilated_backbone_does_not_fit_a_pyramid_head():
    with pytest.raises(ValueError, match=r"semantic_fpn reads maps of strides \(4, 8, 16, 32\), but .*16, 16"):
        build_network("resnet18", "semantic_fpn", 5, output_stride=16)


class Constant(nn.Module):
    """Logits that tell which window a pixel was seen in, one number per call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def forward(self, images):
        self.calls.append(tuple(images.shape[2:]))
        return images.new_full((len(images), 1, *images.shape[2:]), float(len(self.calls)))


def test_windows_overlap_and_are_averaged():
    network = Constant()
    logits = sliding_logits(network, torch.zeros(1, 3, 4, 7), window=4, stride=2)
    assert network.calls == [(4, 4)] * 3  # from columns 0, 2 and 3
    seen = [[1], [1], [1, 2], [1, 2, 3], [2, 3], [2, 3], [3]]
    expected = torch.tensor([sum(calls) / len(calls) for calls in seen])
    torch.testing.assert_close(logits, expected.expand(1, 1, 4, 7))


def test_an_image_smaller_than_the_window_is_one_window():
    network = Constant()
    sliding_logits(network, torch.zeros(1, 3, 3, 5), window=8, stride=4)
    assert network.calls == [(3, 5)]


class Maps(nn.Module):
    def forward(self, images):
        return [images]


def test_a_network_without_auxiliary_head():
    network = SegmentationNetwork(Maps(), FCNHead(3, 2))
    logits, auxiliary = network.forward_both(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 2, 8, 8)
    assert auxiliary is None
