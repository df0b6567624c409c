"""Costs against the published totals, and against a count by hooks and by loops."""

import pytest
import torch
import torchvision
from torch import nn

from modules.quantization.costs import as_published_resnet50, bops, count_costs, size_mib
from modules.quantization.tracing import NetworkTrace, trace_network

RESNET18 = (8, 8, 8, 8, 8, 8, 8, 8, 7, 5, 8, 5, 4, 4, 4, 4)
RESNET50 = (8,) * 22 + (4, 4) + (8, 8, 4) * 5 + (4,) * 9


def traced(name: str, size: int = 224) -> NetworkTrace:
    return trace_network(getattr(torchvision.models, name)(), torch.zeros(1, 3, size, size))


def published_bits(trace: NetworkTrace, bits: tuple[int, ...]) -> dict[str, int]:
    """Bits of a published list, with the first and last layer at 8 and shortcuts as the layer they are added to."""
    inner = trace.groups[1:-1]
    assert len(inner) == len(bits)
    widths = {name: width for group, width in zip(inner, bits, strict=True) for name in group}
    return {"conv1": 8, "fc": 8} | widths


def input_bits(trace: NetworkTrace, bits: int) -> dict[str, int]:
    return {name: 8 if name in ("conv1", "fc") else bits for name in trace.names}


def totals(costs, names) -> tuple[int, int]:
    return sum(costs[name].parameters for name in names), sum(costs[name].operations for name in names)


def test_resnet18_costs_what_was_published():
    trace = traced("resnet18")
    costs = count_costs(trace, "hawq")
    inner = [name for name in trace.names if name not in ("conv1", "fc")]
    assert totals(costs, inner) == (11_166_976, 1_703_951_872)
    assert totals(costs, ("conv1", "fc")) == (522_536, 123_053_032)
    assert totals(costs, costs) == (11_689_512, 1_827_004_904)
    bits = published_bits(trace, RESNET18)
    assert size_mib(costs, bits) == pytest.approx(6.6762, abs=1e-4)
    assert bops(costs, bits, input_bits(trace, 6)) == pytest.approx(75.146, abs=1e-3)
    assert bops(costs, bits, input_bits(trace, 5)) == pytest.approx(63.934, abs=1e-3)
    assert bops(costs, bits, 8) == pytest.approx(97.57, abs=5e-3)
    assert size_mib(costs) == pytest.approx(44.592, abs=1e-3)
    assert size_mib(costs, 8) == pytest.approx(11.148, abs=1e-3)
    assert bops(costs, 8, 8) == pytest.approx(116.928, abs=1e-3)
    four = published_bits(trace, (4,) * 16)
    assert size_mib(costs, four) == pytest.approx(5.823, abs=1e-3)
    assert bops(costs, four, input_bits(trace, 4)) == pytest.approx(35.14, abs=5e-3)


def test_resnet50_costs_what_was_published_with_and_without_the_errors():
    trace = traced("resnet50")
    costs = count_costs(trace, "hawq")
    wrong = as_published_resnet50(costs)
    inner = [name for name in trace.names if name not in ("conv1", "fc")]
    assert totals(costs, inner) == (23_498_496, 4_020_678_144)
    assert totals(costs, ("conv1", "fc")) == (2_058_536, 126_125_032)
    assert totals(wrong, inner) == (23_498_496, 4_062_223_872)
    assert totals(wrong, ("conv1", "fc")) == (2_058_536, 123_053_032)
    bits = published_bits(trace, RESNET50)
    assert size_mib(costs, bits) == pytest.approx(15.9490, abs=1e-4)
    assert bops(costs, bits, input_bits(trace, 5)) == pytest.approx(141.973, abs=1e-3)
    assert bops(wrong, bits, input_bits(trace, 5)) == pytest.approx(143.438, abs=1e-3)
    assert size_mib(costs) == pytest.approx(97.492, abs=1e-3)
    assert size_mib(costs, 8) == pytest.approx(24.373, abs=1e-3)
    assert bops(wrong, 8, 8) == pytest.approx(267.86, abs=5e-3)
    four = published_bits(trace, (4,) * 48)
    assert size_mib(costs, four) == pytest.approx(13.168, abs=1e-3)
    assert bops(wrong, four, input_bits(trace, 4)) == pytest.approx(72.87, abs=5e-3)


def test_mobilenetv2_costs_what_was_published():
    trace = traced("mobilenet_v2")
    costs = count_costs(trace, "mobilenet")
    assert totals(costs, costs) == (3_504_872, 302_053_272)
    bits = dict.fromkeys(trace.names, 4) | {trace.names[-1]: 3}
    assert len(bits) == 53
    assert size_mib(costs, bits) == pytest.approx(1.5185, abs=1e-4)
    assert bops(costs, bits, 8) == pytest.approx(9.65, abs=5e-3)
    assert size_mib(costs) == pytest.approx(13.370, abs=1e-3)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_all_parameters_and_macs_of_other_networks_are_counted(name):
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore, from the extra 'test', counts independently")
    network = getattr(torchvision.models, name)().eval()
    images = torch.zeros(1, 3, 64, 64)
    costs = count_costs(trace_network(network, images))
    assert sum(cost.parameters for cost in costs.values()) == sum(weight.numel() for weight in network.parameters())
    analysis = (
        fvcore.FlopCountAnalysis(network, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    )
    by_operator = analysis.by_operator()
    assert sum(cost.operations for cost in costs.values()) == by_operator["conv"] + by_operator["linear"]


def test_rules_differ_as_they_are_defined():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    trace = trace_network(network, torch.zeros(1, 3, 8, 8))
    plain, hawq, mobilenet = (count_costs(trace, rule) for rule in ("macs", "hawq", "mobilenet"))
    assert (plain["0"].operations, plain["4"].operations) == (27 * 4 * 9, 36 * 5)
    assert (hawq["0"].operations, hawq["4"].operations) == ((27 * 4 + 5 * 4) * 9, (2 * 36 + 1) * 5)
    assert (mobilenet["0"].operations, mobilenet["4"].operations) == (27 * 4 * 9, (2 * 36 - 1) * 5)
    assert (plain["0"].parameters, plain["4"].parameters) == (27 * 4 + 8, 37 * 5)
    assert plain["0"].shape == (4, 3, 3, 3)


def test_depthwise_convolutions_and_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise, self.linear = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Linear(6, 10)

        def forward(self, images):
            return self.linear(self.depthwise(images).flatten(2).transpose(1, 2))

    costs = count_costs(trace_network(Tokens(), torch.zeros(2, 6, 4, 5)), "hawq")
    assert costs["depthwise"].operations == (9 * 6 + 5 * 6) * 20
    assert costs["linear"].operations == (2 * 6 + 1) * 10 * 20
    assert costs["depthwise"].parameters == 9 * 6 + 6


def test_what_is_wrong_is_said():
    trace = traced("resnet18", 32)
    with pytest.raises(ValueError, match="'flops' is unknown; expected macs, hawq, mobilenet"):
        count_costs(trace, "flops")
    costs = count_costs(trace)
    with pytest.raises(ValueError, match=r"20 of 21 layers have no bits \(layer1.0.conv1"):
        size_mib(costs, {"conv1": 8})
    with pytest.raises(ValueError, match="only a ResNet-50"):
        as_published_resnet50(costs)
    with pytest.raises(ValueError, match="follow rule hawq"):
        as_published_resnet50(count_costs(traced("resnet50", 32)))
