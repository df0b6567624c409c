"""DeepLabv3+ against the published counts, the layout of torchvision's ResNet, and its parts put together by hand."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from modules.feature_backbones import indices_of_reductions
from modules.prcl.network import RepresentationHeads
from modules.segmentation.deeplabv3plus import DeepLabV3Plus, PixelHead, resize_aligned
from tests.modules.street_scenes import TINY_BACKBONE

# Section 2 of the specification: students with representation head, without probability head.
PUBLISHED = {
    ("resnet101", 21): 59_520_693,
    ("resnet101", 19): 59_520_179,
    ("resnet101", 11): 59_518_123,
    ("resnet50", 21): 40_528_565,
}
PARTS = {
    "conv1": 9_408,
    "bn1": 128,
    "layer1": 215_808,
    "layer2": 1_219_584,
    "layer3": 26_090_496,
    "layer4": 14_964_736,
}


def parameters(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def student(backbone, num_classes):
    with torch.device("meta"):
        segmenter = DeepLabV3Plus(backbone, num_classes)
        return segmenter, RepresentationHeads(segmenter.feature_channels)


@pytest.fixture(scope="module")
def resnet101():
    return student("resnet101", 21)


@pytest.mark.parametrize("setting", PUBLISHED)
def test_students_have_the_published_number_of_parameters(setting):
    segmenter, heads = student(*setting)
    assert parameters(segmenter, heads.mean) == PUBLISHED[setting]
    assert parameters(heads.probability) == 143_874


def test_small_and_deep_stem_students_have_the_measured_number_of_parameters():
    """With both heads; the deep stem is three convolutions of 3x3 in place of one of 7x7."""
    assert parameters(*student("resnet18", 11)) == 16_925_869
    segmenter, heads = student("resnet101s", 21)
    assert parameters(segmenter, heads.mean) == 59_644_469
    dilations = [block.conv2.dilation for block in segmenter.backbone.body.layer4]
    assert dilations == [(1, 1), (2, 2), (2, 2)]


def test_parts_have_the_published_number_of_parameters(resnet101):
    segmenter, heads = resnet101
    assert {name: parameters(getattr(segmenter.backbone.body, name)) for name in PARTS} == PARTS
    assert parameters(segmenter.aspp, segmenter.project) == 15_535_104
    assert parameters(segmenter.low_level) == 12_384
    assert parameters(segmenter.classifier) == 706_325
    assert parameters(heads.mean) == 766_720
    assert parameters(segmenter, heads) == 59_664_567


def test_shapes_are_those_of_torchvisions_resnet_and_the_heads_of_the_paper(resnet101):
    """The same multiset of shapes of parameters."""
    from torchvision.models import resnet101 as reference

    segmenter, heads = resnet101
    with torch.device("meta"):
        backbone = reference()
    expected = Counter(tuple(p.shape) for name, p in backbone.named_parameters() if not name.startswith("fc"))
    convolutions = [(256, 2048, 1), *[(256, 2048, 3)] * 3, (256, 2048, 1), (256, 1280, 1), (48, 256, 1)]
    convolutions += [(256, 304, 3)] * 2
    for outputs, inputs, side in convolutions:
        expected.update([(outputs, inputs, side, side), (outputs,), (outputs,)])
    for outputs in (21, 256):
        expected.update([(outputs, 256, 1, 1), (outputs,)])
    found = Counter(tuple(p.shape) for module in (segmenter, heads.mean) for p in module.parameters())
    assert found == expected


def test_the_last_stage_is_dilated_from_its_second_block_on(resnet101):
    body = resnet101[0].backbone.body
    for number, block in enumerate(body.layer4):
        convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        assert all(module.stride == (1, 1) for module in convolutions)
        (three,) = (module for module in convolutions if module.kernel_size == (3, 3))
        assert three.dilation == three.padding == ((1, 1) if number == 0 else (2, 2))
    dilated = [name for name, module in body.named_modules() if getattr(module, "dilation", 1) == (2, 2)]
    assert dilated == ["layer4.1.conv2", "layer4.2.conv2"]
    assert body.conv1.kernel_size == (7, 7)


def test_dilations_of_the_pyramid(resnet101):
    aspp = resnet101[0].aspp
    assert [branch.conv.dilation[0] for branch in aspp.branches] == [1, 6, 12, 18]
    assert [branch.conv.kernel_size[0] for branch in aspp.branches] == [1, 3, 3, 3]
    assert not any(isinstance(module, nn.Dropout) for module in resnet101[0].modules())


@pytest.mark.parametrize(("side", "quarter"), [(128, 32), (321, 81), (512, 128), (513, 129)])
def test_sizes_of_the_outputs(resnet101, side, quarter):
    segmenter, heads = resnet101
    maps = []
    hook = segmenter.backbone.register_forward_hook(lambda module, inputs, output: maps.extend(output))
    features = segmenter.features(torch.zeros(2, 3, side, side, device="meta"))
    hook.remove()
    assert [tuple(each.shape) for each in maps] == [
        (2, 256, quarter, quarter),
        (2, 2048, -(-side // 16), -(-side // 16)),
    ]
    assert features.shape == (2, 304, quarter, quarter)
    assert segmenter.classifier(features).shape == (2, 21, quarter, quarter)
    representation = heads(features)
    assert representation.mean.shape == representation.variance.shape == (2, 256, quarter, quarter)


@pytest.mark.parametrize(("side", "published"), [(321, 38.4), (513, 95.8)])
def test_multiply_accumulates_are_the_published_ones(resnet101, side, published):
    """Sums over the convolutions as they run, positions x taps x channels; the paper's probability head apart."""
    segmenter, heads = resnet101
    total = {}

    def count(module, inputs, output):
        total[module] = output[0].numel() * module.weight[0].numel() / 1e9

    convolutions = [each for part in resnet101 for each in part.modules() if isinstance(each, nn.Conv2d)]
    hooks = [module.register_forward_hook(count) for module in convolutions]
    features = segmenter.features(torch.zeros(2, 3, side, side, device="meta"))
    segmenter.classifier(features)
    heads(features)
    for hook in hooks:
        hook.remove()
    assert len(total) == len(convolutions)
    own = total[heads.probability.first] + total[heads.probability.second]
    assert sum(total.values()) - own == pytest.approx(published, rel=0.003)
    assert own == pytest.approx(0.94 if side == 321 else 0.94 * (129 / 81) ** 2, abs=0.01)


@pytest.mark.parametrize(
    ("backbone", "channels"), [("emo_1m", 32), ("tf_efficientnet_lite0", 24), ("resnet18", 64), ("convnext_atto", 40)]
)
def test_other_backbones_have_a_map_at_a_quarter_and_one_at_a_sixteenth(backbone, channels):
    with torch.device("meta"):
        segmenter = DeepLabV3Plus(backbone, 5, channels=16)
        early, last = segmenter.backbone(torch.zeros(2, 3, 97, 128))
        assert early.shape == (2, channels, *((25, 32) if backbone != "convnext_atto" else (24, 32)))
        assert last.shape[2:] == ((7, 8) if backbone != "convnext_atto" else (6, 8))
        assert segmenter(torch.zeros(2, 3, 97, 128)).shape == (2, 5, 97, 128)
    assert segmenter.feature_channels == 48 + 16


@pytest.mark.parametrize(("stride", "side"), [(8, 8), (16, 4), (32, 2)])
def test_the_output_stride_may_be_another(stride, side):
    with torch.device("meta"):
        segmenter = DeepLabV3Plus("resnet18", 5, channels=16, output_stride=stride)
        assert segmenter.backbone(torch.zeros(2, 3, 64, 64))[1].shape[2] == side


def test_backbones_without_a_map_at_a_quarter_are_refused():
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 has no map of stride 4, only 16"):
        DeepLabV3Plus("vit_tiny_patch16_224", 5)
    with pytest.raises(ValueError, match="backbone: 'resnet1001'"):
        DeepLabV3Plus("resnet1001", 5)


@pytest.mark.parametrize(
    ("name", "strides"), [("resnet18", (4, 32)), ("resnet18", (2,)), ("emo_1m", (32, 4)), ("convnext_atto", (4, 16))]
)
def test_stages_are_found_by_the_stride_of_their_maps(name, strides):
    import timm

    import modules.emo  # noqa: F401 - registers EMO in timm

    with torch.device("meta"):
        for stride, index in zip(strides, indices_of_reductions(name, strides), strict=True):
            network = timm.create_model(name, features_only=True, out_indices=(index,))
            assert network(torch.zeros(1, 3, 224, 224))[0].shape[2] == 224 // stride


def aligned(x, height, width):
    """Bilinear interpolation whose corners are aligned, pixel by pixel."""
    out = x.new_empty(*x.shape[:2], height, width)
    for row in range(height):
        for column in range(width):
            y, z = row * (x.shape[2] - 1) / (height - 1), column * (x.shape[3] - 1) / (width - 1)
            top, left = min(int(y), x.shape[2] - 2), min(int(z), x.shape[3] - 2)
            upper = x[..., top, left] * (1 - z + left) + x[..., top, left + 1] * (z - left)
            lower = x[..., top + 1, left] * (1 - z + left) + x[..., top + 1, left + 1] * (z - left)
            out[..., row, column] = upper * (1 - y + top) + lower * (y - top)
    return out


def test_logits_are_resized_with_aligned_corners():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(resize_aligned(x, (9, 7)), aligned(x, 9, 7), atol=1e-5, rtol=1e-5)
    assert resize_aligned(x, (4, 5)) is x


def test_the_parts_are_put_together_as_in_the_paper():
    torch.manual_seed(0)
    segmenter = DeepLabV3Plus(TINY_BACKBONE, 5, channels=16).eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        early, last = segmenter.backbone(images)
        assert early.shape[2:] == (16, 12)
        assert last.shape[2:] == (4, 3)
        branches = torch.cat(
            [
                segmenter.aspp.pool(functional.adaptive_avg_pool2d(last, 1)).expand(-1, -1, 4, 3),
                *(branch(last) for branch in segmenter.aspp.branches),
            ],
            1,
        )
        pyramid = aligned(segmenter.project(branches), 16, 12)
        features = segmenter.features(images)
        torch.testing.assert_close(features[:, :48], segmenter.low_level(early))
        torch.testing.assert_close(features[:, 48:], pyramid, atol=1e-5, rtol=1e-5)
        logits = segmenter.classifier(features)
        torch.testing.assert_close(segmenter(images), aligned(logits, 64, 48), atol=1e-5, rtol=1e-5)


def test_a_pixel_head_is_a_3x3_convolution_with_norm_and_a_1x1_convolution_with_bias():
    head = PixelHead(6, 5, 4).eval()
    x = torch.randn(2, 6, 7, 7)
    hidden = functional.conv2d(x, head[0].conv.weight, padding=1)
    hidden = functional.batch_norm(hidden, torch.zeros(4), torch.ones(4)).relu()
    torch.testing.assert_close(head(x), functional.conv2d(hidden, head[1].weight, head[1].bias), atol=1e-5, rtol=1e-5)
    assert head[0].conv.bias is None
