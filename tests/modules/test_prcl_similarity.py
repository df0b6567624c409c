"""Mutual likelihood score and the contrast on it, against float64 formulas with all pairs at once."""

import math
import weakref

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.prcl import similarity
from modules.prcl.similarity import Gaussians, gaussian_contrast, mutual_likelihood_score


def gaussians(*shape, least=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
    return Gaussians(mean, least * (1 + torch.rand(*shape, generator=generator)))


def problem(anchors=10, keys=40, negatives=12, dimensions=8, least=0.05):
    index = torch.randint(keys, (anchors, negatives + 1), generator=torch.Generator().manual_seed(2))
    return gaussians(anchors, dimensions, least=least), gaussians(keys, dimensions, least=least, seed=1), index


def broadcast_losses(anchors, keys, index, temperature, reduction):
    """All anchors x keys x dimensions at once, in float64."""
    mean, variance = (part.double() for part in anchors)
    key_mean, key_variance = (part.double()[index] for part in keys)
    spread = variance[:, None] + key_variance
    terms = (mean[:, None] - key_mean) ** 2 / spread + torch.log(spread)
    scores = -0.5 * (terms.sum(2) if reduction == "sum" else terms.mean(2))
    return functional.cross_entropy(scores / temperature, torch.zeros(len(index), dtype=torch.int64), reduction="none")


def losses_and_gradients(function, anchors, weights):
    """Losses, and the gradients of their weighted sum with respect to means and variances."""
    leaves = Gaussians(*(part.detach().clone().requires_grad_() for part in anchors))
    losses = function(leaves)
    return losses.detach(), torch.autograd.grad((losses * weights.to(losses)).sum(), leaves)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_score_is_the_sum_or_mean_over_dimensions(reduction):
    first, second = gaussians(5, 7), gaussians(4, 7, seed=1)
    scores = mutual_likelihood_score(Gaussians(*(part[:, None] for part in first)), second, reduction)
    assert scores.shape == (5, 4)
    for row in range(5):
        for column in range(4):
            expected = 0.0
            for d in range(7):
                spread = first.variance[row, d].item() + second.variance[column, d].item()
                distance = first.mean[row, d].item() - second.mean[column, d].item()
                expected -= 0.5 * (distance**2 / spread + math.log(spread))
            expected /= 7 if reduction == "mean" else 1
            assert scores[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_the_score_is_the_logarithm_of_how_likely_two_draws_are_equal():
    """The integral of the product of two normal densities is a normal density of the distance of their means."""
    first, second = gaussians(6, 16), gaussians(6, 16, seed=1)
    difference = torch.distributions.Normal(torch.zeros(6, 16), (first.variance + second.variance).sqrt())
    expected = difference.log_prob(first.mean - second.mean).sum(1) + 16 / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(mutual_likelihood_score(first, second), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dimensions", [1, 7, 8, 256])
@pytest.mark.parametrize("limit", [1, 3 * 13 * 8, 1 << 30])
def test_values_and_gradients_are_those_of_the_full_broadcast(monkeypatch, reduction, dimensions, limit):
    """With one anchor at a time, with a last chunk that is not full, and with all anchors at once."""
    monkeypatch.setattr(similarity, "CPU_ELEMENTS", limit)
    anchors, keys, index = problem(dimensions=dimensions)
    temperature = 0.5 if reduction == "mean" else 4.0
    weights = torch.linspace(-1, 2, len(index))
    found, gradients = losses_and_gradients(
        lambda leaves: gaussian_contrast(leaves, keys, index, temperature, reduction), anchors, weights
    )
    expected, wanted = losses_and_gradients(
        lambda leaves: broadcast_losses(leaves, keys, index, temperature, reduction), anchors, weights
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_are_finite_differences():
    anchors, keys, index = problem(dimensions=12, least=0.3)
    weights = torch.ones(len(index))
    _, gradients = losses_and_gradients(lambda leaves: gaussian_contrast(leaves, keys, index, 2.0), anchors, weights)
    step = 1e-2
    for part, gradient in enumerate(gradients):
        for row, column in ((0, 0), (3, 5), (9, 11)):
            moved = []
            for sign in (1, -1):
                parts = [tensor.clone() for tensor in anchors]
                parts[part][row, column] += sign * step
                moved.append(gaussian_contrast(Gaussians(*parts), keys, index, 2.0).double().sum().item())
            assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(gradient[row, column].item(), abs=2e-3)


def test_no_gradient_reaches_the_keys_and_nothing_of_all_pairs_is_kept():
    anchors, keys, index = problem(anchors=20, negatives=30, dimensions=16)
    leaves = [Gaussians(*(part.requires_grad_() for part in group)) for group in (anchors, keys)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses = gaussian_contrast(*leaves, index)
    losses.sum().backward()
    assert sum(tensor.numel() for tensor in kept) == 2 * 20 * 16
    assert all(part.grad is None for part in keys)
    assert all(part.grad.abs().max() > 0 for part in anchors)


class PeakOfTensors(TorchDispatchMode):
    """Largest sum of bytes that new tensors held at a time, counted operation by operation."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {part.untyped_storage().data_ptr() for part in tree_leaves((args, kwargs)) if torch.is_tensor(part)}
        for part in tree_leaves(result):
            if torch.is_tensor(part):
                self._count(part.untyped_storage(), given)
        return result

    def _count(self, storage, given):
        place, size = storage.data_ptr(), storage.nbytes()
        if place in given or place in self.alive or not size:
            return
        self.alive[place] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, place)

    def _free(self, place):
        self.bytes -= self.alive.pop(place)


def peak_of(function, anchors, keys, index):
    leaves = Gaussians(*(part.clone().requires_grad_() for part in anchors))
    with PeakOfTensors() as meter:
        function(leaves, keys, index).sum().backward()
    return meter.peak


def test_a_class_of_full_size_takes_less_than_a_third_of_a_gigabyte():
    """Section 17, check 5; the meter is tried on the formula with all pairs, which holds some of 134 MB each."""
    arguments = problem(anchors=256, keys=2000, negatives=512, dimensions=256)

    def all_pairs(anchors, keys, index):
        spread = anchors.variance[:, None] + keys.variance[index]
        terms = (anchors.mean[:, None] - keys.mean[index]) ** 2 / spread + torch.log(spread)
        return -0.5 * terms.sum(2).logsumexp(1)

    small = problem(anchors=32, keys=2000, negatives=512, dimensions=256)
    assert 8 * peak_of(all_pairs, *small) > 0.6e9
    found = peak_of(gaussian_contrast, *arguments)
    assert 2 * 256 * 256 * 4 <= found <= 0.3e9
    assert found < 3 * peak_of(gaussian_contrast, *small), "nothing of all pairs is held at once"


def test_without_gradients_the_losses_are_the_same():
    anchors, keys, index = problem()
    plain = gaussian_contrast(anchors, keys, index)
    assert not plain.requires_grad
    leaves = Gaussians(*(part.clone().requires_grad_() for part in anchors))
    torch.testing.assert_close(plain, gaussian_contrast(leaves, keys, index).detach(), atol=1e-6, rtol=1e-6)


def test_a_gradient_for_the_means_alone():
    anchors, keys, index = problem()
    mean = anchors.mean.clone().requires_grad_()
    gaussian_contrast(Gaussians(mean, anchors.variance), keys, index, 4.0).sum().backward()
    _, (expected, _) = losses_and_gradients(
        lambda leaves: broadcast_losses(leaves, keys, index, 4.0, "sum"), anchors, torch.ones(len(index))
    )
    torch.testing.assert_close(mean.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dimensions", [7, 8])
def test_under_autocast_everything_stays_in_full_precision(dimensions):
    anchors, keys, index = problem(dimensions=dimensions)
    weights = torch.ones(len(index))
    expected, wanted = losses_and_gradients(
        lambda leaves: gaussian_contrast(leaves, keys, index, 4.0), anchors, weights
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, gradients = losses_and_gradients(
            lambda leaves: gaussian_contrast(leaves, keys, index, 4.0), anchors, weights
        )
    assert torch.equal(found, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, wanted, strict=True))
    half = Gaussians(*(part.bfloat16().requires_grad_() for part in anchors))
    losses = gaussian_contrast(half, keys, index, 4.0)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert half.mean.grad.dtype == half.variance.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dimensions", [63, 64])
@pytest.mark.parametrize("key_variance", [0.0, 1e-10, 1e-6])
def test_variances_at_the_floor(dimensions, key_variance):
    """Sums of 1e-6, and of 1e-6 and the far smaller variance of a prototype or the 0 of a virtual negative."""
    anchors, keys, index = problem(dimensions=dimensions)
    anchors = Gaussians(anchors.mean, torch.full_like(anchors.variance, 1e-6))
    keys = Gaussians(keys.mean, torch.full_like(keys.variance, key_variance))
    weights = torch.ones(len(index))
    found, gradients = losses_and_gradients(
        lambda leaves: gaussian_contrast(leaves, keys, index, 1e6), anchors, weights
    )
    expected, wanted = losses_and_gradients(
        lambda leaves: broadcast_losses(leaves, keys, index, 1e6, "sum"), anchors, weights
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        largest = theirs.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5 * largest, rtol=1e-4)


def test_arguments_that_do_not_fit():
    anchors, keys, index = problem()
    with pytest.raises(ValueError, match="temperature is 0"):
        gaussian_contrast(anchors, keys, index, 0.0)
    with pytest.raises(ValueError, match="reduction is 'max', expected sum or mean"):
        gaussian_contrast(anchors, keys, index, 1.0, "max")
    with pytest.raises(ValueError, match="reduction is 'max'"):
        mutual_likelihood_score(anchors, anchors, "max")
    with pytest.raises(ValueError, match=r"anchors \(10, 8\), keys \(40, 8\) and index \(9, 13\) do not fit"):
        gaussian_contrast(anchors, keys, index[:9])
    with pytest.raises(ValueError, match=r"keys \(40, 7\)"):
        gaussian_contrast(anchors, Gaussians(*(part[:, :7] for part in keys)), index)
