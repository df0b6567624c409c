"""Allocations against enumeration, published lists and their own files."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
import yaml

from modules.quantization import multiple_choice
from modules.quantization.allocation import Allocation, allocate, relaxed, round_like_official
from modules.quantization.costs import LayerCost, bops, count_costs, size_mib
from modules.quantization.multiple_choice import Choices, choose_bits
from modules.quantization.tracing import NetworkTrace, TracedLayer, trace_network

# What CSMPQ's authors print for the 16 layers of a ResNet-18 that have bits of their own.
PRINTED = (
    *(0.01322103, 0.01361509, 0.01278478, 0.01267193, 0.00762108, 0.00755147, 0.00914501, 0.00717208),
    *(0.00505306, 0.00479445, 0.00673114, 0.00456354, 0.00451991, 0.00461229, 0.00489852, 0.00488713),
)
PUBLISHED = (8, 8, 8, 8, 8, 8, 8, 8, 7, 5, 8, 5, 4, 4, 4, 4)
BEST = (8,) * 9 + (5, 8) + (4,) * 5
WIDE = range(4, 9)


@pytest.fixture(scope="module")
def resnet() -> NetworkTrace:
    return trace_network(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))


def inner_layers(trace: NetworkTrace) -> list[str]:
    return [group[0] for group in trace.groups[1:-1]]


def printed_values(trace: NetworkTrace) -> dict[str, dict[int, float]]:
    return {
        name: {bits: theta * bits for bits in WIDE} for name, theta in zip(inner_layers(trace), PRINTED, strict=True)
    }


def published_candidates(trace: NetworkTrace) -> dict[str, list[int]]:
    return {name: [8] if name in ("conv1", "fc") else list(WIDE) for name in trace.names}


def allocate_resnet(trace: NetworkTrace, budget: float, **options) -> Allocation:
    costs = count_costs(trace, "hawq")
    return allocate(printed_values(trace), trace, costs, published_candidates(trace), size_budget=budget, **options)


def inner_bits(allocation: Allocation, trace: NetworkTrace) -> tuple[int, ...]:
    return tuple(allocation.weight_bits[name] for name in inner_layers(trace))


def worth(bits) -> float:
    return sum(theta * own for theta, own in zip(PRINTED, bits, strict=True))


# Published numbers


def test_resnet18_gets_the_best_bits_there_are(resnet):
    found = allocate_resnet(resnet, 6.7)
    assert inner_bits(found, resnet) == BEST
    assert found.objective == pytest.approx(0.882431, abs=1e-6)
    assert found.size == pytest.approx(6.6410, abs=1e-4)
    assert worth(PUBLISHED) == pytest.approx(0.881942, abs=1e-6)
    assert list(found.weight_bits) == list(found.activation_bits) == resnet.names
    assert found.weight_bits["conv1"] == found.weight_bits["fc"] == 8
    for group in resnet.groups:
        assert len({found.weight_bits[name] for name in group}) == 1


def test_the_published_relaxation_is_never_better(resnet):
    for budget in (5.9, 6.1, 6.7, 7.4, 8.5, 10.0):
        best = allocate_resnet(resnet, budget)
        assert best.size <= budget
        official = allocate_resnet(resnet, budget, rounding="official_dfs")
        assert official.size <= budget
        assert official.objective <= best.objective + 1e-12


def test_plain_rounding_may_exceed_the_budget_and_says_so():
    trace, costs = toy([1000, 1000])
    values = {"0": {bits: 2.0 * bits for bits in WIDE}, "1": {bits: 1.0 * bits for bits in WIDE}}
    budget = size_mib(costs, {"0": 8, "1": 4}) + size_mib(costs, {"0": 0, "1": 0.6})
    with pytest.warns(UserWarning, match="over the budget"):
        found = allocate(values, trace, costs, WIDE, size_budget=budget, rounding="round")
    assert found.weight_bits == {"0": 8, "1": 5}


def test_a_budget_out_of_reach_or_without_effect_is_told(resnet):
    with pytest.raises(ValueError, match=r"size_budget: 5.8 MiB is out of reach.*5\.8232 to 11\.1480"):
        allocate_resnet(resnet, 5.8)
    with pytest.warns(UserWarning, match="no constraint is active"):
        found = allocate_resnet(resnet, 11.2)
    assert set(found.weight_bits.values()) == {8}
    costs = count_costs(resnet, "hawq")
    with pytest.raises(ValueError, match="bops_budget: 1 G bit operations is out of reach"):
        allocate(printed_values(resnet), resnet, costs, published_candidates(resnet), bops_budget=1)
    exact = size_mib(costs, {name: 8 if name in ("conv1", "fc") else 4 for name in resnet.names})
    assert set(inner_bits(allocate_resnet(resnet, exact), resnet)) == {4}


def test_operations_can_be_the_budget_alone_or_with_the_size(resnet):
    costs = count_costs(resnet, "hawq")
    arguments = (printed_values(resnet), resnet, costs, published_candidates(resnet))
    inputs = {name: 8 if name in ("conv1", "fc") else 6 for name in resnet.names}
    by_size = allocate(*arguments, size_budget=6.7, activation_bits=inputs)
    by_bops = allocate(*arguments, bops_budget=72.0, activation_bits=inputs)
    by_both = allocate(*arguments, size_budget=6.7, bops_budget=72.0, activation_bits=inputs)
    assert by_bops.bops <= 72 < by_size.bops
    assert by_both.bops <= 72
    assert by_both.size <= 6.7
    assert by_both.objective < min(by_size.objective, by_bops.objective)
    assert by_both.bops == pytest.approx(bops(costs, by_both.weight_bits, inputs))


# Enumeration


def toy(parameters, operations=None, partners=()) -> tuple[NetworkTrace, dict[str, LayerCost]]:
    """Layers named by number; ``partners`` maps shortcuts to the layer they are added to."""
    partners = dict(partners)
    layers, costs = [], {}
    for index, count in enumerate(parameters):
        name = str(index)
        layers.append(TracedLayer(name, "linear", (count, 1), False, 1, 1, None, None, name, partners.get(name)))
        costs[name] = LayerCost((count, 1), count, (operations or parameters)[index])
    return NetworkTrace(tuple(layers), ()), costs


def enumerated(layers, budgets) -> float:
    best = -np.inf
    for picks in itertools.product(*[range(len(layer.bits)) for layer in layers]):
        used = sum(layer.bits[pick] * layer.cost for layer, pick in zip(layers, picks, strict=True))
        if (used <= budgets).all():
            best = max(best, sum(layer.values[pick] for layer, pick in zip(layers, picks, strict=True)))
    return best


def random_programme(seed: int) -> tuple[list[Choices], np.ndarray]:
    """Two to five layers, one or two budgets, some with equal costs, values linear or not, bits with gaps or not."""
    rng = np.random.default_rng(seed)
    dimensions, layers = int(rng.integers(1, 3)), []
    for _ in range(int(rng.integers(2, 6))):
        bits = np.sort(rng.choice(np.arange(2, 9), int(rng.integers(1, 6)), replace=False))
        if seed % 3 == 0:
            bits = np.arange(bits[0], bits[-1] + 1)
        values = rng.normal(size=len(bits)) if seed % 2 else float(rng.choice([0.1, 0.2, 0.3])) * bits
        layers.append(Choices(bits, values, rng.choice([1, 2, 3, 64, 96, 1000], dimensions)))
    least, most = (sum(layer.bits[end] * layer.cost for layer in layers) for end in (0, -1))
    return layers, least + ((most - least) * rng.random(dimensions)).astype(np.int64)


@pytest.mark.parametrize("widths", [multiple_choice.WIDTHS, (2,)], ids=["dynamic programme", "HiGHS"])
def test_choices_are_the_best_of_all(widths, monkeypatch):
    monkeypatch.setattr(multiple_choice, "WIDTHS", widths)
    proofs = set()
    for seed in range(60):
        layers, budgets = random_programme(seed)
        found = choose_bits(layers, budgets)
        proofs.add(found.proof)
        assert (sum(layer.cost * own for layer, own in zip(layers, found.bits, strict=True)) <= budgets).all()
        value = sum(layer.values[layer.bits == own][0] for layer, own in zip(layers, found.bits, strict=True))
        assert value == pytest.approx(enumerated(layers, budgets), abs=1e-9)
    assert proofs == ({"dynamic programme"} if len(widths) > 1 else {"dynamic programme", "HiGHS"})


def test_many_equal_layers_are_solved_by_their_sum():
    """Forty layers of two kinds with equal values: the best is known by counting."""
    layers = [Choices(np.arange(4, 9), np.arange(4, 9) * 1.0, np.array([cost])) for cost in [3] * 20 + [7] * 20]
    budget = 4 * 20 * 3 + 4 * 20 * 7 + 3 * 50 + 2
    found = choose_bits(layers, np.array([budget]))
    assert found.bits[:20].sum() == 80 + 50
    assert found.bits[20:].sum() == 80


def test_layers_may_have_candidates_of_their_own_and_shortcuts_follow():
    trace, costs = toy([100, 30, 50, 7], partners={"3": "1"})
    values = {"0": {2: 0.0, 4: 3.0, 8: 4.0}, "1": {3: 0.0, 5: 1.0}, "2": {}}
    candidates = {"0": [2, 4, 8], "1": [3, 5], "2": [8], "3": [2, 3, 4]}
    for budget in range(100 * 2 + 37 * 3 + 50 * 8, 1400, 40):
        found = allocate(values, trace, costs, candidates, size_budget=budget / (8 * 2**20)) if budget < 1385 else None
        if found is None:
            continue
        assert found.weight_bits["2"] == 8
        assert found.weight_bits["3"] == found.weight_bits["1"]
        best = max(
            values["0"][first] + values["1"][second]
            for first, second in itertools.product((2, 4, 8), (3, 5))
            if 100 * first + 37 * second + 400 <= budget
        )
        assert found.objective == best


def test_what_a_shortcut_gains_counts_for_its_layer():
    trace, costs = toy([100, 100, 0], partners={"2": "1"})
    values = {"0": {4: 0.0, 8: 2.0}, "1": {4: 0.0, 8: 1.0}}
    budget = size_mib(costs, {"0": 8, "1": 4, "2": 4})
    assert allocate(values, trace, costs, [4, 8], size_budget=budget).weight_bits["0"] == 8
    found = allocate(values | {"2": {4: 0.0, 8: 1.5}}, trace, costs, [4, 8], size_budget=budget)
    assert found.weight_bits == {"0": 4, "1": 8, "2": 8}
    assert found.objective == 2.5


def test_the_official_rounding_is_the_closest_size_below():
    rng = np.random.default_rng(0)
    for _ in range(20):
        real, parameters = rng.uniform(4, 8, 8), rng.integers(1, 1000, 8)
        real[rng.random(8) < 0.3] = 6.0
        found = round_like_official(real, parameters)
        options = [(np.floor(own), np.ceil(own)) for own in real]
        sizes = [parameters @ np.array(pick) for pick in itertools.product(*options)]
        assert parameters @ found == max(size for size in sizes if size <= parameters @ real + 1e-9)
        assert ((found == np.floor(real)) | (found == np.ceil(real))).all()
    with pytest.raises(ValueError, match="tries all ways to round 21 numbers, at most 20"):
        round_like_official(np.full(21, 4.5), np.ones(21, dtype=np.int64))


def test_the_relaxation_fills_the_budget_in_order_of_value_per_size():
    layers = [Choices(np.arange(4, 9), theta * np.arange(4, 9), np.array([2**20])) for theta in (3.0, 1.0, 2.0)]
    fixed = Choices(np.array([8]), np.zeros(1), np.array([2**20]))
    real = relaxed([fixed, *layers], (8 + 8 + 4 + 6.5) / 8)
    np.testing.assert_allclose(real, [8, 8, 4, 6.5], atol=1e-6)
    bent = replace(layers[0], values=np.array([0.0, 3.0, 4.0, 4.5, 4.6]))
    with pytest.raises(ValueError, match="linear in contiguous bits, which those of 1 layers are not"):
        relaxed([bent], 0.7)


# Wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_budget": None}, "give a size_budget or a bops_budget"),
        ({"size_budget": -1.0}, "size_budget: -1.0 is not a positive number"),
        ({"candidates": []}, r"0: candidate bits must ascend, each once, within 2..8, .*; got \(\)"),
        ({"candidates": [8, 4]}, r"got \(8, 4\)"),
        ({"candidates": [4, 4]}, r"got \(4, 4\)"),
        ({"candidates": [1, 4]}, "candidate bits of 0: 1 is outside 2..8"),
        ({"candidates": [4, 16]}, "candidate bits of 0: 16 is outside 2..8"),
        ({"candidates": {"0": [4, 8]}}, "1: no candidate bits are given"),
        ({"values": {"0": {4: 1.0, 8: 2.0}}}, r"1: no value is given for \[4, 8\] bits"),
        ({"values": {"0": {4: 1.0, 8: float("nan")}}}, "0: its values are not finite"),
        ({"activation_bits": 9}, "activation_bits of 0: 9 is outside 2..8"),
        ({"activation_bits": {"0": 8}}, r"1 of 2 layers have no bits \(1\)"),
        ({"rounding": "nearest"}, "expected milp, official_dfs, round"),
        ({"rounding": "round", "bops_budget": 1.0}, "with a size budget only"),
    ],
)
def test_wrong_input_is_named(changes, message):
    trace, costs = toy([100, 200])
    arguments = {
        "values": {name: {4: 1.0, 8: 2.0} for name in costs},
        "candidates": [4, 8],
        "size_budget": 1800 / (8 * 2**20),
    } | changes
    values, candidates = arguments.pop("values"), arguments.pop("candidates")
    with pytest.raises(ValueError, match=message):
        allocate(values, trace, costs, candidates, **arguments)


# The file


def test_a_file_comes_back_as_it_was(resnet, tmp_path):
    found = allocate_resnet(resnet, 6.7, provenance={"score": "tfidf", "beta": 1e-9})
    path = tmp_path / "run" / "bits.yaml"
    found.save(path)
    assert Allocation.load(path, resnet) == found
    assert found.provenance["solver"] == "dynamic programme"
    assert [entry.name for entry in path.parent.iterdir()] == ["bits.yaml"]
    line = next(line for line in path.read_text().splitlines() if "layer1.0.conv1" in line)
    assert line.startswith("  layer1.0.conv1: {weight_bits: 8, activation_bits: 8, shape: [64, 64, 3, 3]")
    assert found.summary().startswith("6.641 MiB, ")


def test_an_edited_file_has_the_size_of_what_it_says(resnet, tmp_path):
    path = tmp_path / "bits.yaml"
    found = allocate_resnet(resnet, 6.7)
    found.save(path)
    path.write_text(path.read_text().replace("layer4.1.conv2: {weight_bits: 4", "layer4.1.conv2: {weight_bits: 3"))
    edited = Allocation.load(path, resnet)
    assert edited.weight_bits == found.weight_bits | {"layer4.1.conv2": 3}
    assert edited.size == size_mib(count_costs(resnet), edited.weight_bits)
    assert edited.objective is None
    assert edited.provenance == found.provenance | {"edited": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows.pop("layer1.0.conv1"),
            r"it has 20 layers, the network 21; without bits are layer1.0.conv1$",
        ),
        (lambda rows: rows.update(head={}), r"it has 22 layers, the network 21; unknown are head$"),
        (lambda rows: rows["fc"].update(shape=[10, 512]), r"1 shapes differ: fc \(10, 512\), not \(1000, 512\)"),
        (lambda rows: rows["fc"].update(weight_bits=9), "fc: weight_bits: 9 is outside 2..8"),
        (lambda rows: rows["fc"].update(weight_bits=True), "fc: weight_bits must be a whole number, got True"),
        (lambda rows: rows["fc"].update(activation_bits=1), "fc: activation_bits: 1 is outside 2..8"),
        (lambda rows: rows["fc"].pop("parameters"), "fc: parameters must be a whole number, got None"),
        (lambda rows: rows.update(fc=8), "'layers' must have a row for each layer"),
    ],
)
def test_a_wrong_file_is_told(resnet, tmp_path, change, message):
    path = tmp_path / "bits.yaml"
    allocate_resnet(resnet, 6.7).save(path)
    content = yaml.safe_load(path.read_text())
    change(content["layers"])
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message) as caught:
        Allocation.load(path, resnet)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_written_leaves_the_old_one(resnet, tmp_path):
    path = tmp_path / "bits.yaml"
    found = allocate_resnet(resnet, 6.7)
    found.save(path)
    before = path.read_bytes()
    with pytest.raises(yaml.YAMLError):
        replace(found, provenance={"what": object()}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["bits.yaml"]


SCRIPT = """
import numpy as np
from modules.quantization.multiple_choice import Choices, choose_bits
rng = np.random.default_rng(0)
layers = [Choices(np.arange(2, 9), np.sort(rng.normal(size=7)), rng.integers(1, 10**6, 2)) for _ in range(30)]
budgets = sum(5 * layer.cost for layer in layers)
print(choose_bits(layers, budgets).bits.tolist())
"""


def test_the_answer_does_not_depend_on_threads():
    answers = set()
    for threads in ("1", "2", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        answers.add(done.stdout.splitlines()[-1])
    assert len(answers) == 1
    assert len(yaml.safe_load(answers.pop())) == 30
