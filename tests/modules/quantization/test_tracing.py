"""What a forward pass tells of a network, against other counters, plain forward passes and published structures."""

import pytest
import timm
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn

import modules.emo  # noqa: F401  registers its models in timm
from modules.quantization.tracing import layer_names, trace_network


def traced(network, size=64, **options):
    return trace_network(network, torch.randn(2, 3, size, size), **options)


class Steps(nn.Module):
    """Layers as given, called by a function of them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.run = run

    def forward(self, x):
        return self.run(self.layers, x)


@pytest.mark.parametrize(
    ("build", "layers", "parameters"),
    [
        (torchvision.models.resnet18, 21, 11_689_512),
        (torchvision.models.resnet50, 54, 25_557_032),
        (torchvision.models.mobilenet_v2, 53, 3_504_872),
        (lambda: timm.create_model("tf_efficientnet_lite0"), 50, 4_652_008),
    ],
)
def test_layers_hold_all_parameters_and_their_operations_are_those_of_another_counter(build, layers, parameters):
    network = build().eval()
    trace = traced(network)
    assert len(trace.layers) == layers
    assert sum(layer.parameters for layer in trace.layers) == parameters == sum(p.numel() for p in network.parameters())
    analysis = FlopCountAnalysis(network, torch.randn(1, 3, 64, 64)).unsupported_ops_warnings(False)
    analysis.uncalled_modules_warnings(False)
    by_module = analysis.by_module()
    for layer in trace.layers:
        assert layer.macs == by_module[layer.name], layer.name


def test_operations_of_a_linear_layer_count_its_tokens():
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    trace = traced(network)
    assert trace["blocks.0.mlp.fc1"].positions == 17
    assert trace["blocks.0.mlp.fc1"].macs == 17 * 192 * 768
    assert trace["head"].positions == 1
    assert trace["patch_embed.proj"].positions == 16


def test_basic_blocks_give_two_features_each_and_shortcuts_share_the_bits_of_the_convolution_they_join():
    """The 16 variables of the published ResNet-18 configuration, beside stem and classifier."""
    trace = traced(torchvision.models.resnet18())
    assert len(trace.groups) == 18
    blocks = [(stage, block) for stage in range(1, 5) for block in range(2)]
    for stage, block in blocks:
        name = f"layer{stage}.{block}"
        assert trace[f"{name}.conv1"].feature.module == f"{name}.relu"
        assert trace[f"{name}.conv1"].feature.call == 0
        assert trace[f"{name}.conv2"].feature.module == name
    for stage in (2, 3, 4):
        shortcut = trace[f"layer{stage}.0.downsample.0"]
        assert (shortcut.partner, shortcut.norm) == (f"layer{stage}.0.conv2", f"layer{stage}.0.downsample.1")
        assert (f"layer{stage}.0.conv2", f"layer{stage}.0.downsample.0") in trace.groups


def test_bottlenecks_and_inverted_residuals_give_the_published_numbers_of_variables():
    assert len(traced(torchvision.models.resnet50()).groups) == 48 + 2
    assert len(traced(torchvision.models.mobilenet_v2()).groups) == 53
    trace = traced(torchvision.models.mobilenet_v2())
    assert trace["features.1.conv.0.0"].feature.module == "features.1.conv.0.2"  # depth-wise, after ReLU6
    assert trace["features.1.conv.1"].feature.module == "features.1"  # the block's output


def test_timm_networks_whose_norm_holds_the_activation_are_understood():
    trace = traced(timm.create_model("tf_efficientnet_lite0"))
    stem = trace["conv_stem"]
    assert (stem.norm, stem.feature.module) == ("bn1", "bn1")
    assert trace["blocks.1.0.conv_pwl"].feature.module == "blocks.1.0"
    assert [unit.name for unit in trace.units if not unit.follows] == ["conv_stem", "blocks.0.0", "classifier"]


def test_units_are_blocks_in_the_order_they_run():
    trace = traced(torchvision.models.resnet18())
    names = [unit.name for unit in trace.units]
    assert names == ["conv1", *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)), "fc"]
    assert trace.units[3].layers == ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0")
    assert [unit.follows for unit in trace.units] == [False, False, *[True] * 7, False]
    assert all(unit.simple for unit in trace.units)


def test_a_module_with_many_layers_is_taken_apart():
    trace = traced(torchvision.models.resnet18(), max_unit_layers=1)
    assert [len(unit.layers) for unit in trace.units] == [1] * 21


def test_the_mode_of_every_module_is_as_before():
    network = torchvision.models.resnet18()
    network.layer1.eval()
    before = {name: module.training for name, module in network.named_modules()}
    statistics = network.bn1.running_mean.clone()
    traced(network)
    assert {name: module.training for name, module in network.named_modules()} == before
    assert torch.equal(network.bn1.running_mean, statistics)


def test_layers_can_be_left_out_by_pattern():
    network = torchvision.models.resnet18()
    assert "layer1.0.conv1" not in traced(network, exclude=["layer1.*"]).names
    with pytest.raises(ValueError, match=r"exclude: 'layer9\.\*' matches none of the 21 layers \(conv1, "):
        layer_names(network, ["layer9.*"])


def test_a_layer_that_is_never_reached_is_named():
    network = Steps(lambda layers, x: layers["used"](x), used=nn.Conv2d(3, 4, 1), unused=nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match=r"1 layers are not called in a forward pass \(layers\.unused\)"):
        traced(network)
    assert traced(network, exclude=["layers.unused"]).names == ["layers.used"]


def test_a_layer_that_runs_twice_is_named():
    network = Steps(lambda layers, x: layers["conv"](layers["conv"](x)), conv=nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"called more than once in a forward pass \(layers\.conv\)"):
        traced(network)


def test_layers_that_share_a_weight_are_named():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    network = Steps(lambda layers, x: layers["second"](layers["first"](x)), first=first, second=second)
    with pytest.raises(ValueError, match=r"layers\.first and layers\.second share their weight"):
        traced(network)


def test_a_block_with_two_inputs_is_not_simple():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x, y):
            return self.two(self.one(x) + y)

    trace = traced(Steps(lambda layers, x: layers["pair"](x, x), pair=Pair()))
    assert [(unit.name, unit.simple) for unit in trace.units] == [("layers.pair", False)]


def test_shortcuts_that_pool_first_share_bits_too():
    trace = traced(timm.create_model("resnet18d", num_classes=4))
    assert [layer.partner for layer in trace.layers if "downsample" in layer.name] == [
        f"layer{stage}.0.conv2" for stage in (2, 3, 4)
    ]
