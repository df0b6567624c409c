"""The variance of each pixel against its formula, and the heads of a representation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from modules.prcl.network import PixelOutputs, RepresentationHeads, flat_pixels, nearest, pixel_outputs
from modules.prcl.probability_head import NormalisedConv, ProbabilityHead, variance_of
from modules.prcl.similarity import Gaussians
from modules.segmentation.deeplabv3plus import DeepLabV3Plus
from tests.modules.street_scenes import TINY_BACKBONE


def formula(x):
    """sigmoid(log(exp(x) + 1e-6)) as it is written, in float64."""
    return 1 / (1 + np.exp(-np.log(np.exp(x) + 1e-6)))


def test_the_variance_is_the_formula():
    x = np.linspace(-40, 80, 2001)
    found = variance_of(torch.tensor(x, dtype=torch.float32)).double().numpy()
    np.testing.assert_allclose(found, formula(x), rtol=2e-6, atol=0)
    assert found.min() > 0.9e-6


def test_the_variance_and_its_gradient_do_not_overflow():
    x = torch.tensor([-1e30, -500.0, 0.0, 500.0, 1e30], requires_grad=True)
    variance = variance_of(x)
    variance.sum().backward()
    torch.testing.assert_close(variance.detach(), torch.tensor([1e-6, 1e-6, 0.5, 1.0, 1.0]), atol=1e-6, rtol=1e-5)
    assert x.grad.isfinite().all()
    # d sigmoid(log(e^x + f)) / dx at 0 is e^x / (e^x + f + 1)^2
    assert x.grad[2].item() == pytest.approx(1 / (2 + 1e-6) ** 2)


def test_rows_of_a_convolution_have_length_one_at_every_use():
    conv = NormalisedConv(3, 4)
    x = torch.randn(2, 3, 2, 2)
    weight = conv.weight.detach()[:, :, 0, 0].double()
    expected = torch.einsum("oc,bchw->bohw", weight / weight.norm(dim=1, keepdim=True), x.double()).float()
    torch.testing.assert_close(conv(x), expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        conv.weight.mul_(torch.tensor([0.1, 1.0, 10.0, 100.0]).view(-1, 1, 1, 1))
    torch.testing.assert_close(conv(x), expected, atol=1e-6, rtol=1e-5)
    assert conv.bias is None


def normalised(x):
    """Batch statistics of each channel, by definition."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def test_the_head_is_its_formula():
    torch.manual_seed(0)
    head = ProbabilityHead(5, 4)
    features = torch.randn(2, 5, 6, 6)
    with torch.no_grad():
        head.first_norm.weight.uniform_(0.5, 2)
        head.first_norm.bias.uniform_(-1, 1)
        head.scale.fill_(1.7)
        head.shift.fill_(-0.6)
    first, second = (conv.weight.detach()[:, :, 0, 0].double() for conv in (head.first, head.second))
    x = torch.einsum("oc,bchw->bohw", first / first.norm(dim=1, keepdim=True), features.double())
    x = normalised(x) * head.first_norm.weight.view(-1, 1, 1) + head.first_norm.bias.view(-1, 1, 1)
    x = torch.einsum("oc,bchw->bohw", second / second.norm(dim=1, keepdim=True), x.clamp(min=0))
    x = 1.7 * normalised(x) - 0.6
    expected = torch.tensor(formula(x.detach().numpy()))
    torch.testing.assert_close(head(features).double(), expected, atol=1e-5, rtol=1e-5)


def test_variances_start_around_a_half():
    torch.manual_seed(0)
    variance = ProbabilityHead(304, 256)(torch.randn(2, 304, 9, 9).relu())
    assert variance.shape == (2, 256, 9, 9)
    assert variance.mean().item() == pytest.approx(0.5, abs=0.02)
    assert variance.min() > 0
    assert variance.max() < 1


def test_the_head_has_the_published_number_of_parameters():
    assert sum(parameter.numel() for parameter in ProbabilityHead(304, 256).parameters()) == 143_874
    assert {name for name, _ in ProbabilityHead(304, 256).named_parameters()} == {
        "first.weight",
        "first_norm.weight",
        "first_norm.bias",
        "second.weight",
        "scale",
        "shift",
    }


def test_weights_are_drawn_by_kaiming():
    torch.manual_seed(0)
    weight = NormalisedConv(304, 256).weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 304), rel=0.02)
    assert abs(weight.mean().item()) < 4 * math.sqrt(2 / 304) / math.sqrt(304 * 256)


def test_under_autocast_variances_are_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        variance = ProbabilityHead(8, 4)(torch.randn(2, 8, 4, 4))
    assert variance.dtype == torch.float32


def test_pixels_in_rows():
    mean, variance = torch.arange(48.0).view(2, 3, 2, 4), -torch.arange(48.0).view(2, 3, 2, 4)
    flat = flat_pixels(Gaussians(mean, variance))
    for image in range(2):
        for row in range(2):
            for column in range(4):
                place = (image * 2 + row) * 4 + column
                assert torch.equal(flat.mean[place], mean[image, :, row, column])
                assert torch.equal(flat.variance[place], variance[image, :, row, column])


@pytest.mark.parametrize("size", [(3, 5), (2, 4), (9, 12)])
def test_nearest_takes_the_value_at_the_floor_of_the_position(size):
    labels = torch.randint(256, (2, 9, 12))
    small = nearest(labels, size)
    assert small.dtype == torch.int64
    for row in range(size[0]):
        for column in range(size[1]):
            assert torch.equal(small[:, row, column], labels[:, row * 9 // size[0], column * 12 // size[1]])
    assert nearest(torch.rand(2, 9, 12), size).dtype == torch.float32


def test_outputs_of_the_student():
    torch.manual_seed(0)
    segmenter = DeepLabV3Plus(TINY_BACKBONE, 5, channels=16)
    heads = RepresentationHeads(segmenter.feature_channels, 8, channels=16)
    images = torch.randn(2, 3, 64, 64)
    outputs = pixel_outputs(segmenter, heads, images)
    assert isinstance(outputs, PixelOutputs)
    assert outputs.logits.shape == (2, 5, 16, 16)
    assert outputs.representation.mean.shape == outputs.representation.variance.shape == (2, 8, 16, 16)
    # The features are not detached: the variance trains the backbone, too.
    outputs.representation.variance.square().sum().backward()
    assert next(segmenter.backbone.parameters()).grad.abs().max() > 0
    assert pixel_outputs(segmenter, None, images).representation is None


def test_without_probabilities_the_variance_is_a_constant():
    heads = RepresentationHeads(6, 8, probabilistic=False)
    representation = heads(torch.randn(2, 6, 4, 4))
    assert heads.probability is None
    assert representation.variance.shape == representation.mean.shape
    assert (representation.variance == 0.5).all()
    assert not representation.variance.requires_grad
    assert isinstance(heads.mean[1], nn.Conv2d)
