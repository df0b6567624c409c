"""The contrast over pixels, against a loop over classes and anchors in float64 that is given the same draws."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from modules.prcl import contrast as contrast_module
from modules.prcl.contrast import PixelContrast
from modules.prcl.sampling import draw_anchors, draw_negatives
from modules.prcl.similarity import Gaussians, gaussian_contrast

CLASSES, DIMENSIONS = 5, 8
SMALL = {"num_classes": CLASSES, "dimensions": DIMENSIONS, "anchors": 6, "negatives": 9, "temperature": 4.0}


def batch(classes=(0, 1, 2, 4), count=80, dimensions=DIMENSIONS, seed=0):
    """Pixels, labels, valid and hard; invalid ones have void labels; class 2 has no hard pixel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=generator)]
    centres = torch.randn(CLASSES, dimensions, generator=generator)
    mean = 2 * centres[labels] + torch.randn(count, dimensions, generator=generator)
    variance = 0.05 + 0.4 * torch.rand(count, dimensions, generator=generator)
    valid = torch.rand(count, generator=generator) > 0.2
    hard = (torch.rand(count, generator=generator) > 0.5) & (labels != 2)
    pixels = Gaussians(mean.requires_grad_(), variance.requires_grad_())
    return pixels, torch.where(valid, labels, 255), valid, hard


@pytest.fixture
def draws(monkeypatch):
    """Rows that were drawn, as the module drew them."""
    seen = {}

    def record(name, function):
        def wrapped(*args):
            seen[name] = function(*args)
            seen[f"{name}_arguments"] = args
            return seen[name]

        monkeypatch.setattr(contrast_module, function.__name__, wrapped)

    record("anchors", draw_anchors)
    record("negatives", draw_negatives)
    record("contrast", gaussian_contrast)
    return seen


def score(first, second, reduction):
    """Mutual likelihood score of two Gaussians (mean (D,), variance (D,))."""
    spread = first[1] + second[1]
    terms = (first[0] - second[0]) ** 2 / spread + torch.log(spread)
    return -0.5 * (terms.sum() if reduction == "sum" else terms.mean())


def prototype(pixels, labels, valid, label):
    """Unit mean and variance of the fused pixels of a class."""
    mean, variance = (part.detach().double()[valid & (labels == label)] for part in pixels)
    fused = 1 / (1 / variance).sum(0)
    return functional.normalize(fused * (mean / variance).sum(0), dim=0), fused


def loop_loss(module, pixels, labels, valid, hard, draws, centres=None, extra=lambda label: ()):
    """Sum over classes with anchors over the number of classes present, pixel by pixel."""
    mean, variance = (part.double() for part in pixels)
    units = functional.normalize(mean, dim=1)
    present = [label for label in range(module.num_classes) if (valid & (labels == label)).any()]
    anchored = [label for label in present if (valid & hard & (labels == label)).any()]
    total = torch.zeros(()).double()
    for position, label in enumerate(anchored):
        positive = centres[label] if centres else prototype(pixels, labels, valid, label)
        losses = []
        for anchor, negatives in zip(draws["anchors"][position], draws["negatives"][position], strict=True):
            keys = [positive, *((units[row].detach(), variance[row].detach()) for row in negatives), *extra(label)]
            scores = torch.stack([score((units[anchor], variance[anchor]), key, module.reduction) for key in keys])
            logits = scores / module.temperature
            losses.append(torch.logsumexp(logits, 0) - logits[0])
        total = total + torch.stack(losses).mean()
    return total / len(present), present, anchored


@pytest.mark.parametrize(("reduction", "temperature"), [("sum", 4.0), ("mean", 0.5)])
def test_loss_and_gradients_are_those_of_a_loop_over_classes(draws, reduction, temperature):
    module = PixelContrast(**SMALL | {"reduction": reduction, "temperature": temperature})
    pixels, labels, valid, hard = batch()
    result = module(pixels, labels, valid, hard)
    found = torch.autograd.grad(result.loss, pixels)
    loss, present, anchored = loop_loss(module, pixels, labels, valid, hard, draws)
    expected = torch.autograd.grad(loss, pixels)
    # Class 2 has pixels but no anchors: it counts among those that the sum is divided by.
    assert (present, anchored) == ([0, 1, 2, 4], [0, 1, 4])
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_only_anchors_get_gradients_and_they_are_valid_hard_pixels_of_their_class(draws):
    module = PixelContrast(**SMALL)
    pixels, labels, valid, hard = batch()
    module(pixels, labels, valid, hard).loss.backward()
    for position, label in enumerate((0, 1, 4)):
        anchors, negatives = draws["anchors"][position], draws["negatives"][position]
        assert (labels[anchors] == label).all()
        assert (valid & hard)[anchors].all()
        assert valid[negatives].all()
        assert (labels[negatives] != label).all()
    reached = torch.zeros(len(labels), dtype=torch.bool)
    reached[draws["anchors"].flatten()] = True
    for part in pixels:
        assert ((part.grad.abs().sum(1) > 0) == reached).all()


def test_what_there_is_to_watch():
    pixels, labels, valid, hard = batch()
    result = PixelContrast(**SMALL)(pixels, labels, valid, hard)
    for label in range(CLASSES):
        assert result.valid[label] == (valid & (labels == label)).sum()
        assert result.anchor_pool[label] == (valid & hard & (labels == label)).sum()
        if result.valid[label]:
            _, variance = prototype(pixels, labels, valid, label)
            torch.testing.assert_close(result.prototypes.variance[label].double(), variance, atol=1e-6, rtol=1e-5)
    assert result.valid[3] == 0
    assert result.prototypes.variance[3].tolist() == [1.0] * DIMENSIONS
    assert not any(part.requires_grad for part in result.prototypes)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_negative_classes_are_drawn_by_the_score_of_prototypes(draws, reduction):
    module = PixelContrast(**SMALL | {"reduction": reduction, "temperature": 3.0})
    pixels, labels, valid, hard = batch()
    module(pixels, labels, valid, hard)
    pools, classes, scores, *_ = draws["negatives_arguments"]
    assert classes.tolist() == [0, 1, 4]
    assert pools.count.tolist() == [(valid & (labels == label)).sum().item() for label in range(CLASSES)]
    for position, own in enumerate(classes.tolist()):
        for other in (0, 1, 2, 4):
            pair = [prototype(pixels, labels, valid, label) for label in (own, other)]
            expected = score(*pair, reduction).item() / 3.0
            assert scores[position, other].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_points_give_the_cross_entropy_of_cosines(draws):
    module = PixelContrast(**SMALL | {"representation": "point", "temperature": 0.5, "reduction": "mean"})
    pixels, labels, valid, hard = batch()
    result = module(pixels, labels, valid, hard)
    found, of_variance = torch.autograd.grad(result.loss, pixels)
    units = functional.normalize(pixels.mean.double(), dim=1)
    total = torch.zeros(()).double()
    for position, label in enumerate((0, 1, 4)):
        centre = pixels.mean.detach().double()[valid & (labels == label)].mean(0)
        positive = functional.normalize(centre, dim=0)
        for anchor, negatives in zip(draws["anchors"][position], draws["negatives"][position], strict=True):
            cosines = torch.stack(
                [units[anchor] @ positive, *(units[anchor] @ units[row].detach() for row in negatives)]
            )
            target = torch.tensor([0])
            total = total + functional.cross_entropy(cosines[None] / 0.5, target) / module.anchors
    loss = total / 4
    assert result.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(loss, pixels.mean)[0], atol=1e-5, rtol=1e-5)
    assert of_variance.abs().max() == 0
    _, _, scores, *_ = draws["negatives_arguments"]
    centres = torch.stack([pixels.mean[valid & (labels == label)].mean(0) for label in (0, 1, 2, 4)]).detach()
    cosine = functional.cosine_similarity(centres[0], centres[1:]).double()
    shares = scores[0, [1, 2, 4]].double().softmax(0)
    torch.testing.assert_close(shares, (cosine / 0.5).softmax(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["one class", "no valid pixel", "no hard pixel", "no pixel at all"])
def test_where_there_is_nothing_to_contrast_the_loss_is_zero_with_a_graph(case):
    pixels, labels, valid, hard = batch(classes=(1,) if case == "one class" else (0, 1, 2, 4))
    valid = torch.zeros_like(valid) if case == "no valid pixel" else valid
    hard = torch.zeros_like(hard) if case == "no hard pixel" else hard
    if case == "no pixel at all":
        pixels = Gaussians(*(torch.zeros(0, DIMENSIONS, requires_grad=True) for _ in range(2)))
        labels, valid, hard = labels[:0], valid[:0], hard[:0]
    result = PixelContrast(**SMALL)(pixels, labels, valid, hard)
    assert result.loss.item() == 0
    result.loss.backward()
    assert all(part.grad is not None and (part.grad == 0).all() for part in pixels)


def test_two_classes_have_a_loss():
    pixels, labels, valid, hard = batch(classes=(0, 1))
    result = PixelContrast(**SMALL | {"num_classes": 2})(pixels, labels, valid, hard)
    assert result.loss.item() > 0.1
    result.loss.backward()
    assert all(part.grad.abs().max() > 0 for part in pixels)


def test_a_diverged_network_has_a_loss_that_is_not_finite():
    pixels, labels, valid, hard = batch()
    with torch.no_grad():
        pixels.mean[valid.nonzero()[0]] = torch.nan
    assert PixelContrast(**SMALL)(pixels, labels, valid, hard).loss.isnan()


def test_half_precision_outputs_under_autocast_are_contrasted_in_full_precision():
    pixels, labels, valid, hard = batch()
    half = Gaussians(*(part.detach().bfloat16().requires_grad_() for part in pixels))
    full = Gaussians(*(part.detach().float().requires_grad_() for part in half))
    module = PixelContrast(**SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(half, labels, valid, hard, torch.Generator().manual_seed(0))
    expected = module(full, labels, valid, hard, torch.Generator().manual_seed(0))
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    found.loss.backward()
    assert half.mean.grad.dtype == torch.bfloat16


def test_the_same_generator_gives_the_same_loss():
    module = PixelContrast(**SMALL)
    losses = [module(*batch(), torch.Generator().manual_seed(seed)).loss.item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def sampled_loss(pixels, labels, valid, hard, queries, negatives, temperature, reduction, rng):
    """The loss with draws of NumPy's generator, class by class, in float64."""
    reduce = np.sum if reduction == "sum" else np.mean
    mean, variance = (part.detach().double().numpy() for part in pixels)
    units = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    labels, valid, hard = labels.numpy(), valid.numpy(), hard.numpy()
    rows = {label: np.flatnonzero(valid & (labels == label)) for label in range(CLASSES)}
    rows = {label: own for label, own in rows.items() if len(own)}

    def scores(first, second):
        spread = first[1] + second[1]
        return -0.5 * reduce((first[0] - second[0]) ** 2 / spread + np.log(spread), axis=-1)

    centres = {}
    for label, own in rows.items():
        fused = 1 / (1 / variance[own]).sum(0)
        centre = fused * (mean[own] / variance[own]).sum(0)
        centres[label] = centre / np.linalg.norm(centre), fused
    total = 0.0
    for label, own in rows.items():
        pool = own[hard[own]]
        if not len(pool):
            continue
        others = [other for other in rows if other != label]
        weights = np.exp([scores(centres[label], centres[other]) / temperature for other in others])
        anchors = rng.choice(pool, queries)
        classes = rng.choice(len(others), (queries, negatives), p=weights / weights.sum())
        drawn = np.zeros_like(classes)
        for position, other in enumerate(others):
            places = classes == position
            drawn[places] = rng.choice(rows[other], places.sum())
        anchor = units[anchors][:, None], variance[anchors][:, None]
        positive = scores(anchor, tuple(part[None, None] for part in centres[label]))
        logits = np.concatenate([positive, scores(anchor, (units[drawn], variance[drawn]))], 1) / temperature
        total += (np.log(np.exp(logits).sum(1)) - logits[:, 0]).mean()
    return total / len(rows)


@pytest.mark.parametrize(("temperature", "reduction"), [(0.5, "mean"), (100.0, "mean"), (8.0, "sum"), (100.0, "sum")])
def test_the_mean_over_seeds_is_that_of_a_loop_with_draws_of_its_own(temperature, reduction):
    """4 classes present of 5, D 16, 32 anchors, 64 negatives; within 4 standard errors of the difference."""
    arguments = batch(count=120, dimensions=16)
    module = PixelContrast(CLASSES, 16, anchors=32, negatives=64, temperature=temperature, reduction=reduction)
    rounds = 300
    with torch.no_grad():
        ours = np.array([module(*arguments, torch.Generator().manual_seed(seed)).loss.item() for seed in range(rounds)])
    rng = np.random.default_rng(0)
    theirs = np.array([sampled_loss(*arguments, 32, 64, temperature, reduction, rng) for _ in range(rounds)])
    error = math.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / rounds)
    assert 0 < error < 0.01
    assert abs(ours.mean() - theirs.mean()) < 4 * error + 1e-6
    # The spread of the draws is that of the loop's as well: the ratio has a standard error of 0.06.
    assert 0.75 < ours.std(ddof=1) / theirs.std(ddof=1) < 1.33


def test_global_prototypes_are_positives_and_go_into_the_draw(draws):
    module = PixelContrast(**SMALL, global_prototypes=True, forget=0.5)
    first, second = batch(seed=0), batch(seed=1)
    module(*first)
    result = module(*second)
    precision, weighted = torch.ones(CLASSES, DIMENSIONS), torch.ones(CLASSES, DIMENSIONS)
    for pixels, labels, valid, _ in (first, second):
        for label in (0, 1, 2, 4):
            mean, variance = (part.detach()[valid & (labels == label)] for part in pixels)
            precision[label] = 0.5 * precision[label] + (1 / variance).sum(0)
            weighted[label] = 0.5 * weighted[label] + (mean / variance).sum(0)
    torch.testing.assert_close(result.prototypes.mean, weighted / precision, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.prototypes.variance, 1 / precision, atol=1e-6, rtol=1e-5)
    _, keys, index, *_ = draws["contrast_arguments"]
    positives = index.view(3, module.anchors, -1)[:, 0, 0]
    torch.testing.assert_close(keys.mean[positives], functional.normalize((weighted / precision)[[0, 1, 4]], dim=1))
    torch.testing.assert_close(keys.variance[positives], (1 / precision)[[0, 1, 4]], atol=1e-6, rtol=1e-5)
    _, _, scores, *_ = draws["negatives_arguments"]
    units = functional.normalize((weighted / precision).double(), dim=1)
    expected = score((units[0], 1 / precision[0]), (units[2], 1 / precision[2]), "sum") / 4.0
    assert scores[0, 2].item() == pytest.approx(expected.item(), rel=1e-4)


def test_virtual_negatives_are_further_keys_without_variance_from_every_other_class(draws):
    """With a radius of 0 they are the global means; class 3 is absent from the batch and gives some all the same."""
    module = PixelContrast(**SMALL, global_prototypes=True, virtual_negatives=2, virtual_radius=0.0)
    pixels, labels, valid, hard = batch()
    result = module(pixels, labels, valid, hard)
    found = torch.autograd.grad(result.loss, pixels)
    units = functional.normalize(result.prototypes.mean.double(), dim=1)
    nothing = torch.zeros(DIMENSIONS).double()

    def extra(label):
        return [(units[other], nothing) for other in range(CLASSES) if other != label for _ in range(2)]

    _, _, index, *_ = draws["contrast_arguments"]
    assert index.shape == (3 * 6, 1 + 9 + 2 * (CLASSES - 1))
    centres = dict(enumerate(zip(units, result.prototypes.variance.double(), strict=True)))
    loss, *_ = loop_loss(module, pixels, labels, valid, hard, draws, centres, extra)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(loss, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_virtual_negatives_spread_like_the_global_prototype(draws):
    """In two dimensions a small spread across the mean is a spread of the angle: radius std / length."""
    module = PixelContrast(
        2, 2, anchors=1, negatives=1, global_prototypes=True, virtual_negatives=4000, virtual_radius=1.5
    )
    module.memory.precision.copy_(torch.tensor([[1e6, 400.0], [1e6, 400.0]]))
    module.memory.weighted.copy_(module.memory.precision * torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
    mean = torch.tensor([[3.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    pixels = Gaussians(mean, torch.full((2, 2), 1e5, requires_grad=True))
    sure = torch.ones(2, dtype=torch.bool)
    torch.manual_seed(0)
    module(pixels, torch.tensor([0, 1]), sure, sure)
    _, keys, index, *_ = draws["contrast_arguments"]
    for row, side in ((0, -1.0), (1, 1.0)):
        points = keys.mean[index[row, 2:]]
        assert keys.variance[index[row, 2:]].abs().max() == 0
        torch.testing.assert_close(points.norm(dim=1), torch.ones(4000))
        assert (points[:, 0].sign() == side).all()
        angles = points[:, 1].asin()
        assert angles.std().item() == pytest.approx(1.5 * 0.05 / 3, rel=0.06)
        assert abs(angles.mean().item()) < 4 * 1.5 * 0.05 / 3 / math.sqrt(4000)


def test_the_memory_of_global_prototypes_is_in_the_checkpoint():
    module = PixelContrast(**SMALL, global_prototypes=True)
    module(*batch())
    resumed = PixelContrast(**SMALL, global_prototypes=True)
    resumed.load_state_dict(module.state_dict())
    found, expected = (each(*batch(seed=1), torch.Generator().manual_seed(0)) for each in (resumed, module))
    assert torch.equal(found.prototypes.mean, expected.prototypes.mean)
    assert found.loss.item() == expected.loss.item()
    assert PixelContrast(**SMALL).state_dict() == {}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_classes", 1, "num_classes: 1 is below 2"),
        ("anchors", 0, "anchors: 0 is below 1"),
        ("negatives", 0, "negatives: 0 is below 1"),
        ("dimensions", 0, "dimensions: 0 is below 1"),
        ("virtual_negatives", -1, "virtual_negatives: -1 is below 0"),
        ("virtual_negatives", 2, "set global_prototypes: true"),
        ("virtual_radius", -0.5, "virtual_radius: -0.5 is negative"),
        ("temperature", 0.0, "temperature: 0.0 is not positive"),
        ("temperature", float("nan"), "temperature: nan is not positive"),
        ("reduction", "max", "expected sum or mean"),
        ("representation", "line", "expected distribution or point"),
    ],
)
def test_values_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        PixelContrast(**SMALL | {field: value})


def test_global_prototypes_of_points_are_refused():
    with pytest.raises(ValueError, match="set representation: distribution"):
        PixelContrast(**SMALL, representation="point", global_prototypes=True)
