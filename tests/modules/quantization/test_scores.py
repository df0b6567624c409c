"""Scores against plain loops, closed forms, whole Hessians and the networks they describe."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.quantization import scores
from modules.quantization.attachment import attach_quantizers
from modules.quantization.features import pooled_features
from modules.quantization.tracing import NetworkTrace, trace_network
from tests.distributed import run_ranks

BITS = (2, 4, 8)


class Residual(nn.Module):
    """A block with a shortcut that has a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.shortcut = (
            nn.Conv2d(4, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(4, 6, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return (self.second(self.first(images).relu()) + self.shortcut(images)).relu()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Residual(), nn.Flatten(), nn.Linear(6 * 36, 5)
    )


def images(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def traced(model: nn.Module) -> NetworkTrace:
    trace = trace_network(model, images(2))
    assert trace.names == ["0", "3.first", "3.second", "3.shortcut", "5"]
    assert scores.main_layers(trace) == ["0", "3.first", "3.second", "5"]
    return trace


# TF-IDF


def tfidf_by_loops(features: list[list[float]], coe: float | None = None) -> float:
    """Section by section as the paper writes it; ``features[image][channel]``."""
    images, channels = len(features), len(features[0])
    balance = math.log(math.e * channels / coe) if coe else 1.0
    importance = []
    for channel in range(channels):
        mean = sum(row[channel] for row in features) / images
        inside = [row for row in features if row[channel] >= mean]
        idf = math.log(images / (len(inside) + 1))
        tf = sum(balance * row[channel] / sum(row) if sum(row) > 0 else 0.0 for row in inside)
        importance.append(tf / (len(inside) + 1e-11) * idf)
    return sum(importance) / channels


@pytest.mark.parametrize("coe", [None, 0, 16, 8])
def test_tfidf_is_what_loops_compute(coe):
    generator = torch.Generator().manual_seed(0)
    for count, channels in ((2, 3), (9, 1), (32, 20), (17, 64)):
        features = torch.randn(count, channels, generator=generator).relu()
        features[:, 0] += 0.1  # no image is without features
        expected = tfidf_by_loops(features.tolist(), coe)
        assert scores.tfidf(features, "layer", coe) == pytest.approx(expected, rel=1e-9)
        assert scores.tfidf(features, "layer", coe, "channels") == pytest.approx(expected * channels, rel=1e-9)


def test_a_dead_channel_adds_nothing():
    features = torch.rand(8, 5) + 0.1
    dead = torch.cat([features, torch.zeros(8, 1)], dim=1)
    assert scores.tfidf(dead, "layer") == pytest.approx(scores.tfidf(features, "layer") * 5 / 6, rel=1e-12)


def test_images_without_features_are_told_and_too_many_are_an_error():
    features = torch.rand(6, 4) + 0.1
    features[:3] = 0
    with pytest.warns(UserWarning, match="conv7: its feature is zero in all channels for 3 of 6 images"):
        score = scores.tfidf(features, "conv7")
    assert score == pytest.approx(tfidf_by_loops(features.tolist()), rel=1e-9)
    features[3] = 0
    with pytest.raises(ValueError, match="conv7: its feature is zero in all channels for 4 of 6 images"):
        scores.tfidf(features, "conv7")
    features[4:, 0] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(ValueError, match="conv7: its feature is not finite for 2 of 6 images"):
        scores.tfidf(features, "conv7")


def test_tfidf_of_a_network_is_linear_in_bits_and_may_be_turned_round():
    model = network()
    trace = traced(model)
    features = pooled_features(model, trace, [images()])
    table = scores.TfIdf(coe=8).values(model, trace, [images()[:4], images()[4:]], BITS)
    turned = scores.TfIdf(weighting="exp_neg", beta=3.3).sensitivities(model, trace, [images()])
    assert list(table) == scores.main_layers(trace)
    for name, row in table.items():
        theta = tfidf_by_loops(features[name].tolist(), 8)
        assert row == pytest.approx({bits: theta * bits for bits in BITS}, rel=1e-5)
        assert turned[name] == pytest.approx(math.exp(-3.3 * tfidf_by_loops(features[name].tolist())), rel=1e-5)
    for wrong in ({"normalise": "images"}, {"weighting": "log"}, {"coe": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            scores.TfIdf(**wrong)


def test_scores_that_follow_width_are_seen():
    model = network()
    trace = traced(model)
    widths = {name: 1 / trace[name].out_channels for name in scores.main_layers(trace)}
    assert scores.channel_correlation(widths, trace) == pytest.approx(1)
    assert scores.channel_correlation({name: -width for name, width in widths.items()}, trace) == pytest.approx(-1)


# Controls


def test_controls():
    model = network()
    trace = traced(model)
    main = scores.main_layers(trace)
    assert scores.Equal().values(model, trace, [], BITS) == {name: {2: 2.0, 4: 4.0, 8: 8.0} for name in main}
    numbers = scores.Random(3).sensitivities(model, trace, [])
    assert (
        numbers == scores.Random(3).sensitivities(model, trace, []) != scores.Random(4).sensitivities(model, trace, [])
    )
    assert len(set(numbers.values())) == len(main)
    shares = scores.Parameters().sensitivities(model, trace, [])
    total = sum(weight.numel() for weight in model.parameters())
    assert shares["3.shortcut"] == 30 / total
    assert sum(shares.values()) == pytest.approx(1)


# Orthogonality


def test_orthogonality_is_what_products_of_features_give():
    features = {name: torch.rand(7, width) for name, width in (("a", 3), ("b", 9), ("c", 4))}
    matrix = scores.orthogonality(features)
    centred = {name: (rows - rows.mean(0)).double() for name, rows in features.items()}
    for i, x in enumerate(centred.values()):
        for j, y in enumerate(centred.values()):
            expected = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
            assert matrix[i, j].item() == pytest.approx(expected.item(), rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    assert scores.orthogonality({"a": features["a"], "b": features["a"] @ rotation})[0, 1].item() == pytest.approx(1)
    with pytest.raises(ValueError, match="b: its feature is the same for all 7 images"):
        scores.orthogonality({"a": features["a"], "b": torch.ones(7, 2)})


def test_orthogonality_of_a_network_is_weighted_as_published():
    model = network()
    trace = traced(model)
    main = scores.main_layers(trace)
    features = pooled_features(model, trace, [images()])
    matrix = scores.orthogonality({name: features[name] for name in main})
    plain = scores.Orthogonality(2.0).sensitivities(model, trace, [images()])
    expected = [math.exp(-2 * sum(matrix[i, j].item() for j in range(4) if j != i)) for i in range(4)]
    assert list(plain.values()) == pytest.approx(expected)
    later = scores.Orthogonality(2.0, suffix_mean=True).sensitivities(model, trace, [images()])
    assert list(later.values()) == pytest.approx([sum(expected[i:]) / (4 - i) for i in range(4)])


# Hessian


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))


def whole_hessian(model: nn.Module, batch: Tensor, labels: Tensor) -> Tensor:
    """Of both weights together, (2 * 27 + 3 * 18) squared."""
    names = ("0.weight", "3.weight")
    shapes = [model.get_parameter(name).shape for name in names]

    def loss(values: Tensor) -> Tensor:
        parts = values.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional.cross_entropy(torch.func.functional_call(model, weights, batch), labels)

    point = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
    return torch.autograd.functional.hessian(loss, point)


def test_traces_are_estimated_with_the_whole_hessian():
    """``v' H v`` with signs v, whose mean is the trace, is split by layer; batches count by their images."""
    model = smooth().train()
    model[0].weight.requires_grad_(False)
    labels = torch.tensor([0, 1, 2, 1])
    batches = [(images(3), labels[:3]), (images(1, 2), labels[3:])]
    with torch.no_grad():
        found = scores.hessian_traces(model, ["0", "3"], scores.label_loss, batches, draws=5, seed=7)
    matrix = whole_hessian(model, torch.cat([images(3), images(1, 2)]), labels)
    generator = torch.Generator().manual_seed(7)
    expected = torch.zeros(2)
    for _ in range(5):
        signs = torch.cat([2.0 * torch.randint(0, 2, (count,), generator=generator) - 1 for count in (54, 54)])
        expected += (signs * (matrix @ signs)).view(2, 54).sum(1) / 5
    assert list(found.values()) == pytest.approx(expected.tolist(), rel=1e-4)
    assert model.training
    assert [weight.requires_grad for weight in model.parameters()] == [False, True, True, True]
    assert all(weight.grad is None for weight in model.parameters())


def test_traces_of_a_quadratic_loss_are_exact():
    """Its Hessian is diagonal, so that every draw gives the trace."""
    model = nn.Linear(3, 2, bias=False)
    factors = torch.arange(1.0, 7.0).view(2, 3)
    found = scores.hessian_traces(
        nn.Sequential(model), ["0"], lambda network, _: (factors * network[0].weight.square()).sum(), [images(1)], 1
    )
    assert found["0"] == pytest.approx(2 * 21)


def test_hessian_values_are_traces_times_errors():
    model = smooth()
    trace = trace_network(model, images(2))
    batches = [{"labeled": (images(3), torch.tensor([0, 1, 2]))}]
    table = scores.Hessian(draws=4, seed=5).values(model, trace, batches, BITS)
    traces = scores.hessian_traces(model, trace.names, scores.label_loss, batches, 4, 5)
    for name, row in table.items():
        weight = model.get_submodule(name).weight
        for bits, value in row.items():
            error = (scores.nearest(weight, bits) - weight).square().sum().item()
            assert value == pytest.approx(-max(traces[name], 0) / weight.numel() * error, rel=1e-4)
    with pytest.raises(ValueError, match="draws: 0 is less than 1"):
        scores.Hessian(draws=0)
    with pytest.raises(ValueError, match="no labels in the batch"):
        scores.Hessian().values(model, trace, [images(2)], BITS)
    with pytest.raises(ValueError, match="at least one batch"):
        scores.Hessian().values(model, trace, [], BITS)


def test_a_loss_of_ones_own_and_attention_have_a_hessian():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(8, 12)

        def forward(self, tokens: Tensor) -> Tensor:
            q, k, v = self.mix(tokens.flatten(2)).chunk(3, dim=-1)
            return functional.scaled_dot_product_attention(q, k, v).mean(1)

    torch.manual_seed(0)
    batch = torch.randn(2, 3, 2, 4)
    found = scores.hessian_traces(Attention(), ["mix"], lambda model, x: model(x).square().mean(), [batch], draws=2)
    assert math.isfinite(found["mix"])
    assert found["mix"] != 0


# Errors


def nearest_by_loops(weight: Tensor, bits: int) -> Tensor:
    rounded = torch.empty_like(weight)
    for row, out in zip(weight.flatten(1), rounded.flatten(1), strict=True):
        scale = max(row.abs().max().item() / (2 ** (bits - 1) - 1), 1e-8)
        for index, value in enumerate(row.tolist()):
            out[index] = min(max(round(value / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * scale
    return rounded


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_nearest_rounds_each_channel(bits):
    weight = torch.randn(3, 2, 3, 3)
    torch.testing.assert_close(scores.nearest(weight, bits), nearest_by_loops(weight, bits))
    scale = torch.tensor([0.1, 0.2, 0.3])
    limit = 2 ** (bits - 1)
    by_hand = (weight / scale.view(3, 1, 1, 1)).round().clamp(-limit, limit - 1) * scale.view(3, 1, 1, 1)
    torch.testing.assert_close(scores.nearest(weight, bits, scale), by_hand)


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "with quantizers"])
def test_output_error_is_the_change_of_the_output(attached):
    model = network().train()
    trace = traced(model)
    batches = [images(4), images(2, 3)]
    model.eval()
    expected = {}
    with torch.no_grad():
        for name in trace.names:
            layer = model.get_submodule(name)
            kept = layer.weight.clone()
            expected[name] = {}
            for bits in BITS:
                targets = torch.cat([model(batch) for batch in batches])
                layer.weight.copy_(nearest_by_loops(kept, bits))
                outputs = torch.cat([model(batch) for batch in batches])
                layer.weight.copy_(kept)
                expected[name][bits] = -(outputs - targets).square().mean().item()
    if attached:
        attach_quantizers(model, trace.names)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    table = scores.OutputError().values(model, trace, batches, BITS, lambda *done: seen.append(done))
    for name, row in expected.items():
        assert table[name] == pytest.approx(row, rel=1e-3)
        assert row[2] < row[4] < row[8] < 0
    assert seen == [(done, 30) for done in range(1, 31)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="at least one batch"):
        scores.OutputError().values(model, trace, [], BITS)


def test_output_error_takes_other_quantizers():
    model = network().eval()
    trace = traced(model)
    table = scores.OutputError(lambda weight, bits: weight).values(model, trace, [images()], BITS)
    assert {value for row in table.values() for value in row.values()} == {0.0}


def test_weight_error_alone_and_with_inputs():
    model = network().eval()
    trace = traced(model)
    alone = scores.WeightError().values(model, trace, [], BITS)
    with_inputs = scores.WeightError(inputs=True).values(model, trace, [images(4), images(2, 3)], BITS)
    everything = torch.cat([images(4), images(2, 3)])
    with torch.no_grad():
        normed = model[2](model[1](model[0](everything)))
        inputs = {"0": everything, "3.first": normed, "3.shortcut": normed, "5": model[3](normed).flatten(1)}
    for name, batch in inputs.items():
        weight = model.get_submodule(name).weight.detach()
        for bits in BITS:
            error = (nearest_by_loops(weight, bits) - weight).square().sum().item()
            assert alone[name][bits] == pytest.approx(-error, rel=1e-4)
            energy = batch.square().mean().item() * {"0": 36, "5": 1}.get(name, 36)
            assert with_inputs[name][bits] == pytest.approx(-error * energy, rel=1e-4)
    with pytest.raises(ValueError, match="at least one batch"):
        scores.WeightError(inputs=True).values(model, trace, [], BITS)


# What all have in common


def test_candidates_of_layers():
    model = network()
    trace = traced(model)
    own = dict.fromkeys(trace.names, (4, 8)) | {"3.second": (2, 3), "3.shortcut": ()}
    for score in (scores.Parameters(), scores.WeightError(), scores.OutputError()):
        table = score.values(model, trace, [images(2)], own)
        assert {name: tuple(row) for name, row in table.items()} == own | {"3.shortcut": (2, 3)}
    with pytest.raises(ValueError, match="5: no candidate bits are given"):
        scores.Equal().values(model, trace, [], {"0": (4,), "3.first": (4,), "3.second": (4,)})
    for wrong in ((), (8, 4), (4, 4)):
        with pytest.raises(ValueError, match="0: candidate bits must ascend"):
            scores.Equal().values(model, trace, [], wrong)
    for wrong in ((1, 4), (4, 9)):
        with pytest.raises(ValueError, match=r"candidate bits of 0: [19] is outside 2\.\.8"):
            scores.Equal().values(model, trace, [], wrong)


ALL = (
    scores.TfIdf(),
    scores.Orthogonality(),
    scores.Equal(),
    scores.Random(),
    scores.Parameters(),
    scores.Hessian(draws=2),
    scores.OutputError(),
    scores.WeightError(inputs=True),
)


def tables(share: slice) -> list[scores.ValueTable]:
    model = network()
    batch, labels = images(5)[share], torch.tensor([0, 1, 2, 3, 4])[share]
    trace = trace_network(model, images(2))
    with warnings.catch_warnings(record=True):
        return [score.values(model, trace, [(batch, labels)], BITS) for score in ALL]


def on_a_rank(rank: int) -> list[scores.ValueTable]:
    return tables(slice(0, 3) if rank == 0 else slice(3, 5))


def test_two_ranks_score_as_one_process():
    alone = tables(slice(0, 5))
    for found in run_ranks(on_a_rank):
        for score, own, expected in zip(ALL, found, alone, strict=True):
            assert own.keys() == expected.keys(), type(score).__name__
            for name, row in expected.items():
                assert own[name] == pytest.approx(row, rel=1e-4), (type(score).__name__, name)
