"""Pooled features against the forward pass written out by hand."""

from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from modules.quantization.features import gather_rows, images_of, pooled_features
from modules.quantization.tracing import trace_network
from tests.distributed import run_ranks


class Pair(NamedTuple):
    views: tuple[Tensor, ...]
    labels: Tensor

    @property
    def images(self) -> Tensor:
        return self.views[0]


def resnet() -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.2)
    return network


def by_hand(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Features of torchvision's ResNet-18, module by module."""
    found = {}
    x = network.relu(network.bn1(network.conv1(images)))
    found["conv1"] = x.mean((2, 3))
    x = network.maxpool(x)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(getattr(network, stage)):
            inner = block.bn1(block.conv1(x)).relu()
            found[f"{stage}.{index}.conv1"] = inner.mean((2, 3))
            shortcut = x if block.downsample is None else block.downsample(x)
            if block.downsample is not None:
                found[f"{stage}.{index}.downsample.0"] = shortcut.relu().mean((2, 3))
            x = (block.bn2(block.conv2(inner)) + shortcut).relu()
            found[f"{stage}.{index}.conv2"] = x.mean((2, 3))
    found["fc"] = network.fc(x.mean((2, 3))).relu()
    return found


@torch.no_grad()
def test_features_of_a_resnet_are_those_of_its_forward_pass():
    network = resnet().train()
    images = torch.randn(5, 3, 40, 56)
    trace = trace_network(network, images[:2])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    features = pooled_features(network, trace, [images[:3], (images[3:], torch.zeros(2))])
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    expected = by_hand(network.eval(), images)
    assert list(features) == trace.names
    assert set(features) == set(expected)
    for name, rows in features.items():
        assert rows.shape == (5, trace[name].out_channels)
        torch.testing.assert_close(rows, expected[name], rtol=1e-5, atol=1e-6)


def test_tokens_are_averaged_with_channels_last():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, images):
            tokens = self.mix(self.patches(images).permute(0, 2, 3, 1))
            return self.head(tokens.mean((1, 2)))

    network = Tokens()
    images = torch.randn(3, 3, 16, 32)
    features = pooled_features(network, trace_network(network, images), [images])
    with torch.no_grad():
        tokens = network.mix(network.patches(images).permute(0, 2, 3, 1))
        torch.testing.assert_close(features["patches"], network.patches(images).relu().mean((2, 3)))
        torch.testing.assert_close(features["mix"], tokens.relu().mean((1, 2)))
        torch.testing.assert_close(features["head"], network(images).relu())


def test_a_map_whose_width_equals_its_channels_is_pooled_over_positions():
    network = nn.Sequential(nn.Conv2d(3, 8, 1))
    images = torch.randn(2, 3, 8, 8)
    rows = pooled_features(network, trace_network(network, images), [images])["0"]
    torch.testing.assert_close(rows, network(images).relu().mean((2, 3)).detach())


def test_images_are_found_in_batches_of_all_kinds():
    images = torch.randn(2, 3, 4, 4)
    pair = Pair((images, -images), torch.zeros(2))
    for batch in (images, pair, {"labeled": pair, "unlabeled": None}, (images, 1), [pair], ({"labeled": images},)):
        assert images_of(batch) is images
    for batch in ({"image": images}, "images", (), None):
        with pytest.raises(ValueError, match=r"no images in the batch: expected a tensor"):
            images_of(batch)
    with pytest.raises(ValueError, match=r"a dictionary with image$"):
        images_of({"image": images})
    with pytest.raises(ValueError, match=r"shape \(0, 3, 4, 4\)"):
        images_of(images[:0])


def test_too_few_images_and_a_network_that_changes_are_errors():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    images = torch.randn(2, 3, 4, 4)
    trace = trace_network(network, images)
    with pytest.raises(ValueError, match="at least 2 images to be compared, got 0"):
        pooled_features(network, trace, [])
    with pytest.raises(ValueError, match="at least 2 images to be compared, got 1"):
        pooled_features(network, trace, [images[:1]])
    network.forward = lambda x: network[0](x)
    with pytest.raises(ValueError, match=r"0: call 1 of 1, where its feature is taken, did not happen"):
        pooled_features(network, trace, [images])


def on_a_rank(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    images = torch.randn(5, 3, 8, 8)
    trace = trace_network(network, images[:1])
    uneven = pooled_features(network, trace, [images[:4]] if rank == 0 else [images[4:]])
    one_sided = pooled_features(network, trace, [images] if rank == 1 else [])
    return uneven, one_sided, pooled_features(network, trace, [images], gather=False)


def test_two_ranks_with_uneven_shares_have_the_features_of_one():
    for uneven, one_sided, alone in run_ranks(on_a_rank):
        for name, rows in alone.items():
            torch.testing.assert_close(uneven[name], rows)
            torch.testing.assert_close(one_sided[name], rows)


def test_rows_stay_as_they_are_in_one_process():
    features = {"a": torch.randn(3, 2)}
    assert gather_rows(features) is features
