"""What bits are worth to layers: scores by class separability and by what others measure, and their controls."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modules.quantization.attachment import float_weight
from modules.quantization.features import image_batches, images_of, pooled_features
from modules.quantization.quantizers import WeightQuantizer, check_bits
from modules.quantization.tracing import NetworkTrace, evaluating, inputs_seen

Candidates = Sequence[int] | Mapping[str, Sequence[int]]
ValueTable = dict[str, dict[int, float]]
Progress = Callable[[int, int | None], None]
Loss = Callable[[nn.Module, Any], Tensor]
Normalise = Literal["none", "channels"]
Weighting = Literal["identity", "exp_neg"]
TINY = 1e-11


def candidates_of(candidates: Candidates, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Bits that each layer may get.

    Args:
        candidates: numbers of bits in ascending order, one sequence for all layers or one per layer.
        names: the layers.

    Raises:
        ValueError: for numbers outside 2..8, out of order or twice, for none at all, and for a layer without any.
    """
    table = {}
    for name in names:
        if isinstance(candidates, Mapping) and name not in candidates:
            raise ValueError(f"{name}: no candidate bits are given for it")
        bits = tuple(candidates[name] if isinstance(candidates, Mapping) else candidates)
        if not bits or list(bits) != sorted(set(bits)):
            raise ValueError(
                f"{name}: candidate bits must ascend, each once, within 2..8, for example 2, 4, 8; got {bits}"
            )
        table[name] = tuple(check_bits(number, f"candidate bits of {name}") for number in bits)
    return table


def shared_candidates(candidates: Candidates, trace: NetworkTrace) -> dict[str, tuple[int, ...]]:
    """Bits that each layer may get, where a shortcut may get those of the layer it is added to.

    Args:
        candidates: see :func:`candidates_of`; what is given for shortcuts is not looked at.
        trace: tells which these are.
    """
    table = candidates_of(candidates, main_layers(trace))
    return {layer.name: table[layer.partner or layer.name] for layer in trace.layers}


def linear_values(sensitivities: Mapping[str, float], candidates: Candidates) -> ValueTable:
    """Sensitivity times bits, for each layer and candidate.

    Args:
        sensitivities: of each layer.
        candidates: see :func:`candidates_of`.
    """
    table = candidates_of(candidates, sensitivities)
    return {name: {bits: theta * bits for bits in table[name]} for name, theta in sensitivities.items()}


class Score(ABC):
    """What it is worth to give a layer so many bits."""

    @abstractmethod
    def values(
        self,
        network: nn.Module,
        trace: NetworkTrace,
        batches: Iterable[Any],
        candidates: Candidates,
        progress: Progress | None = None,
    ) -> ValueTable:
        """Value of each layer at each of its candidate bits; more is better.

        Args:
            network: which ``trace`` is of; it is left as it was.
            trace: its layers.
            batches: calibration images, see :func:`modules.quantization.features.images_of`; where there are several
                processes, each gives its own share and all get the same values.
            candidates: see :func:`candidates_of`.
            progress: called with how much is done and of how much, if that is known.

        Returns:
            By name of the layer, and then by bits. A shortcut has a row of its own, which is added to that of its
            layer, or none.
        """


class LinearScore(Score):
    """A score whose value grows with each bit by the layer's sensitivity."""

    @abstractmethod
    def sensitivities(self, network: nn.Module, trace: NetworkTrace, batches: Iterable[Any]) -> dict[str, float]:
        """Value of one bit, by name of the layer; arguments as for :meth:`values`."""

    def values(
        self,
        network: nn.Module,
        trace: NetworkTrace,
        batches: Iterable[Any],
        candidates: Candidates,
        progress: Progress | None = None,
    ) -> ValueTable:
        """Sensitivity times bits."""
        return linear_values(self.sensitivities(network, trace, batches), shared_candidates(candidates, trace))


class TfIdf(LinearScore):
    """Class separability: channels are words and images are documents.

    Args:
        coe: balance coefficient; None or 0 as in all published runs.
        normalise: ``channels`` multiplies by the number of channels, by which the score otherwise falls.
        weighting: what bits are worth given the score: ``identity``, or ``exp_neg``: ``exp(-beta * score)``, the
            official post-training variant, which turns the order round.
        beta: of ``exp_neg``.

    Source: CSMPQ, equations 7, 8 and 10.
    """

    def __init__(
        self,
        coe: float | None = None,
        normalise: Normalise = "none",
        weighting: Weighting = "identity",
        beta: float = 1.0,
    ) -> None:
        _check_choice("normalise", normalise, Normalise)
        _check_choice("weighting", weighting, Weighting)
        if coe is not None and coe < 0:
            raise ValueError(f"coe: {coe} is negative")
        self.coe, self.normalise, self.weighting, self.beta = coe, normalise, weighting, beta

    def sensitivities(self, network: nn.Module, trace: NetworkTrace, batches: Iterable[Any]) -> dict[str, float]:
        """TF-IDF of each layer that has bits of its own."""
        features = pooled_features(network, trace, batches)
        scores = {name: tfidf(features[name], name, self.coe, self.normalise) for name in main_layers(trace)}
        if self.weighting == "identity":
            return scores
        weights = torch.exp(-self.beta * torch.tensor(list(scores.values()), dtype=torch.float64))
        return dict(zip(scores, weights.tolist(), strict=True))


def tfidf(features: Tensor, name: str, coe: float | None = None, normalise: Normalise = "none") -> float:
    """How well the channels of a layer tell images apart.

    Args:
        features: (N, C), not negative.
        name: of the layer, for messages.
        coe: see :class:`TfIdf`.
        normalise: see :class:`TfIdf`.

    Returns:
        The mean importance of a channel; times C for ``channels``. An image without any positive feature counts as a
        document without words, with a warning.

    Raises:
        ValueError: for values that are not finite, and if more than half of the images are without features.

    Source: CSMPQ, equations 7 (idf), 8 (tf) and 10 (importance).
    """
    f = features.double().T
    C, N = f.shape
    _check_finite(features, name)
    total = f.sum(0)
    empty = int((total <= 0).sum())
    if 2 * empty > N:
        raise ValueError(
            f"{name}: its feature is zero in all channels for {empty} of {N} images; nothing can be scored"
        )
    if empty:
        warnings.warn(
            f"{name}: its feature is zero in all channels for {empty} of {N} images; they count as documents without "
            "words",
            stacklevel=2,
        )
    balance = 1 + torch.log(torch.tensor(C / coe, dtype=torch.float64)).item() if coe else 1.0
    tf = balance * f / torch.where(total > 0, total, 1)
    inside = (f >= f.mean(1, keepdim=True)).double()
    documents = inside.sum(1)
    idf = torch.log(N / (documents + 1))
    importance = (tf * inside).sum(1) / (documents + TINY) * idf
    return (importance.sum() if normalise == "channels" else importance.mean()).item()


class Equal(LinearScore):
    """The same for all layers, so that only costs decide: the control that a score has to beat."""

    def sensitivities(self, network: nn.Module, trace: NetworkTrace, batches: Iterable[Any]) -> dict[str, float]:
        """One each."""
        return dict.fromkeys(main_layers(trace), 1.0)


class Random(LinearScore):
    """Uniform in [0, 1): a control.

    Args:
        seed: of the numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def sensitivities(self, network: nn.Module, trace: NetworkTrace, batches: Iterable[Any]) -> dict[str, float]:
        """One number for each layer that has bits of its own."""
        names = main_layers(trace)
        numbers = torch.rand(len(names), generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return dict(zip(names, numbers.tolist(), strict=True))


class Parameters(LinearScore):
    """A layer's share of all parameters, so that every MiB is worth the same: a control."""

    def sensitivities(self, network: nn.Module, trace: NetworkTrace, batches: Iterable[Any]) -> dict[str, float]:
        """Shares of all layers."""
        total = sum(layer.parameters for layer in trace.layers)
        return {layer.name: layer.parameters / total for layer in trace.layers}


class Orthogonality(LinearScore):
    """More bits for layers whose features are unlike those of the other layers.

    Args:
        beta: how strongly.
        suffix_mean: give each layer the mean of its own and all later sensitivities, as OMPQ's programme does.

    Source: Ma et al., OMPQ (2023), ORM; on pooled features, centred as in the official code.
    """

    def __init__(self, beta: float = 1.0, suffix_mean: bool = False) -> None:
        self.beta, self.suffix_mean = beta, suffix_mean

    def sensitivities(self, network: nn.Module, trace: NetworkTrace, batches: Iterable[Any]) -> dict[str, float]:
        """``exp(-beta * sum of ORM with the other layers)``."""
        features = pooled_features(network, trace, batches)
        names = main_layers(trace)
        matrix = orthogonality({name: features[name] for name in names})
        theta = torch.exp(-self.beta * (matrix.sum(1) - matrix.diagonal()))
        if self.suffix_mean:
            later = torch.arange(len(names), 0, -1, dtype=theta.dtype, device=theta.device)
            theta = theta.flip(0).cumsum(0).flip(0) / later
        return dict(zip(names, theta.tolist(), strict=True))


def orthogonality(features: Mapping[str, Tensor]) -> Tensor:
    """How much alike the features of layers are, pair by pair: 0 if orthogonal, 1 if the same up to a rotation.

    Args:
        features: L of them, (N, C) each with one N.

    Returns:
        (L, L) float64, symmetric: ``|Y'X|^2 / (|X'X| |Y'Y|)`` with Frobenius norms of centred features.

    Raises:
        ValueError: for a layer whose features are not finite, or the same for all images.
    """
    grams = []
    for name, rows in features.items():
        _check_finite(rows, name)
        centred = rows.double() - rows.double().mean(0)
        gram = centred @ centred.T
        if not gram.any():
            raise ValueError(f"{name}: its feature is the same for all {len(rows)} images; nothing can be compared")
        grams.append((gram / gram.norm()).flatten())
    normalised = torch.stack(grams)
    return normalised @ normalised.T


class Hessian(Score):
    """How much a quantized weight raises the loss, to second order, if errors have no direction.

    Minus the mean eigenvalue of the layer's Hessian (0 where its estimate is negative) times the squared error.

    Args:
        draws: random vectors of Hutchinson's estimate.
        seed: of these.
        loss: maps the network and a batch to a number, averaged over the batch; None for the cross-entropy of labels.

    Source: Dong et al., HAWQ-V2 (2020).
    """

    def __init__(self, draws: int = 8, seed: int = 0, loss: Loss | None = None) -> None:
        if draws < 1:
            raise ValueError(f"draws: {draws} is less than 1")
        self.draws, self.seed, self.loss = draws, seed, loss or label_loss

    def values(
        self,
        network: nn.Module,
        trace: NetworkTrace,
        batches: Iterable[Any],
        candidates: Candidates,
        progress: Progress | None = None,
    ) -> ValueTable:
        """Minus half of what second order predicts, twice."""
        table = shared_candidates(candidates, trace)
        traces = hessian_traces(network, trace.names, self.loss, batches, self.draws, self.seed, progress)
        errors = weight_errors(network, table)
        return {
            layer.name: {
                bits: -max(traces[layer.name], 0.0) / layer.weights * error
                for bits, error in errors[layer.name].items()
            }
            for layer in trace.layers
        }


def hessian_traces(
    network: nn.Module,
    names: Sequence[str],
    loss: Loss,
    batches: Iterable[Any],
    draws: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Trace of the Hessian of each layer's weight, by Hutchinson's estimate with signs.

    Args:
        network: run in evaluation mode.
        names: of the layers.
        loss: see :class:`Hessian`.
        batches: what ``loss`` takes; larger ones count for more.
        draws: vectors of signs, the same for all batches and processes.
        seed: of these.
        progress: called after each batch.

    Returns:
        By name of the layer.

    Raises:
        ValueError: if there is no batch.
    """
    weights = [float_weight(network.get_submodule(name)) for name in names]
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=weights[0].device)
    with evaluating(network), torch.inference_mode(False), torch.enable_grad(), _trainable(weights):
        for done, batch in enumerate(batches, 1):
            count = len(images_of(batch))
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
                gradients = torch.autograd.grad(loss(network, batch), weights, create_graph=True)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(draws):
                signs = [_signs(weight, generator) for weight in weights]
                products = torch.autograd.grad(gradients, weights, signs, retain_graph=True)
                parts = [(sign * product).sum().double() for sign, product in zip(signs, products, strict=True)]
                sums[:-1] += torch.stack(parts) * (count / draws)
            sums[-1] += count
            del gradients
            _report(progress, done, batches)
    _add_processes(sums)
    if not sums[-1]:
        raise ValueError("the Hessian needs at least one batch, got none")
    return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))


def label_loss(network: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of a classifier; labels below 0 do not count.

    Args:
        network: maps images (B, ...) to logits (B, classes).
        batch: something with ``.labels``, a dictionary with ``labeled``, or a tuple of images and labels.

    Raises:
        ValueError: if there are no labels.
    """
    labelled = batch["labeled"] if isinstance(batch, Mapping) and "labeled" in batch else batch
    labels = getattr(labelled, "labels", None)
    if labels is None and isinstance(labelled, (tuple, list)) and len(labelled) > 1:
        labels = labelled[1]
    if not isinstance(labels, Tensor):
        raise ValueError(
            "no labels in the batch: expected .labels or a tuple of images and labels; otherwise give Hessian a loss"
        )
    images = next(image_batches(network, [batch]))
    return nn.functional.cross_entropy(network(images), labels.to(images.device), ignore_index=-1)


class OutputError(Score):
    """How much the network's output changes when one layer's weight is quantized: measured, not modelled.

    It takes as many passes over the calibration images as there are layers and candidates together.

    Args:
        quantize: maps a weight and bits to the quantized weight; :func:`nearest` by default.
    """

    def __init__(self, quantize: Callable[[Tensor, int], Tensor] | None = None) -> None:
        self.quantize = quantize or nearest

    @torch.no_grad()
    def values(
        self,
        network: nn.Module,
        trace: NetworkTrace,
        batches: Iterable[Any],
        candidates: Candidates,
        progress: Progress | None = None,
    ) -> ValueTable:
        """Minus the mean squared change of the output."""
        choices = [(name, bits) for name, row in shared_candidates(candidates, trace).items() for bits in row]
        sums = torch.zeros(len(choices) + 1, dtype=torch.float64)
        with evaluating(network):
            for seen, images in enumerate(image_batches(network, batches)):
                expected = _output(network(images))
                for index, (name, bits) in enumerate(choices):
                    weight = float_weight(network.get_submodule(name))
                    with _replaced(weight, self.quantize(weight, bits)):
                        sums[index] += (_output(network(images)) - expected).double().square().sum().item()
                    _report(progress, seen * len(choices) + index + 1, batches, len(choices))
                sums[-1] += expected.numel()
        sums = sums.to(next(network.parameters()).device)
        _add_processes(sums)
        if not sums[-1]:
            raise ValueError("output_error needs at least one batch, got none")
        table: ValueTable = {}
        for (name, bits), error in zip(choices, (-sums[:-1] / sums[-1]).tolist(), strict=True):
            table.setdefault(name, {})[bits] = error
        return table


class WeightError(Score):
    """Squared error of the weight, which needs no pass over images for each candidate.

    Args:
        inputs: multiply by the mean square of the inputs and by the positions, which gives the squared error of the
            output if inputs are independent; takes one pass over the images.
    """

    def __init__(self, inputs: bool = False) -> None:
        self.inputs = inputs

    def values(
        self,
        network: nn.Module,
        trace: NetworkTrace,
        batches: Iterable[Any],
        candidates: Candidates,
        progress: Progress | None = None,
    ) -> ValueTable:
        """Minus the squared error."""
        errors = weight_errors(network, shared_candidates(candidates, trace))
        energy = dict.fromkeys(errors, 1.0)
        if self.inputs:
            squares = input_squares(network, trace.names, batches)
            energy = {layer.name: squares[layer.name] * layer.positions for layer in trace.layers}
        return {name: {bits: -energy[name] * error for bits, error in row.items()} for name, row in errors.items()}


@torch.no_grad()
def nearest(weight: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
    """A weight rounded to the nearest of its quantized values, symmetric, with a scale for each output channel.

    Args:
        weight: (C, ...).
        bits: 2 to 8.
        scale: (C,); None for the one at which each channel's largest magnitude is the largest integer.
    """
    quantizer = WeightQuantizer(weight, "max" if scale is None else "fixed")
    if scale is not None:
        quantizer.set_scale(scale)
    quantizer.set_bits(bits)
    return quantizer(weight)


@torch.no_grad()
def weight_errors(network: nn.Module, candidates: Mapping[str, Sequence[int]]) -> ValueTable:
    """Squared error of each layer's weight at each of its candidate bits, rounded to nearest.

    Args:
        network: left as it is.
        candidates: bits by name of the layer.
    """
    table = {}
    for name, row in candidates.items():
        weight = float_weight(network.get_submodule(name))
        table[name] = {bits: (nearest(weight, bits) - weight).double().square().sum().item() for bits in row}
    return table


@torch.no_grad()
def input_squares(network: nn.Module, names: Sequence[str], batches: Iterable[Any]) -> dict[str, float]:
    """Mean square of each layer's inputs.

    Args:
        network: run in evaluation mode.
        names: of the layers.
        batches: see :func:`modules.quantization.features.images_of`.

    Raises:
        ValueError: if there is no batch.
    """
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=next(network.parameters()).device)

    def look(name: str, inputs: Tensor) -> None:
        sums[:, places[name]] += torch.stack([inputs.double().square().sum(), inputs.new_tensor(inputs.numel())])

    places = {name: index for index, name in enumerate(names)}
    with inputs_seen(network, look, names):
        for images in image_batches(network, batches):
            network(images)
    _add_processes(sums)
    if not sums[1].all():
        raise ValueError("the inputs of layers need at least one batch, got none")
    return dict(zip(names, (sums[0] / sums[1]).tolist(), strict=True))


def main_layers(trace: NetworkTrace) -> list[str]:
    """Layers that have bits of their own: all but shortcuts, which have those of the layer they are added to."""
    return [layer.name for layer in trace.layers if layer.partner is None]


def channel_correlation(scores: Mapping[str, float], trace: NetworkTrace) -> float:
    """Rank correlation of scores with 1 / channels: how much of an order is explained by width alone.

    Args:
        scores: of layers.
        trace: tells their channels.

    Returns:
        Spearman's coefficient; not a number if all scores or all widths are equal.
    """
    from scipy.stats import rankdata

    ranks = torch.tensor(
        [
            rankdata(list(scores.values())).tolist(),
            rankdata([1 / trace[name].out_channels for name in scores]).tolist(),
        ]
    )
    return torch.corrcoef(ranks)[0, 1].item()


def _check_choice(field: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{field}: {value!r} is unknown; expected {', '.join(get_args(choices))}")


def _check_finite(features: Tensor, name: str) -> None:
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise ValueError(f"{name}: its feature is not finite for {bad} of {len(features)} images")


def _add_processes(sums: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)


def _report(progress: Progress | None, done: int, batches: Iterable[Any], each: int = 1) -> None:
    if progress is not None:
        progress(done, len(batches) * each if isinstance(batches, Sized) else None)


def _output(output: Any) -> Tensor:
    """The first tensor of whatever a network returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    return (2.0 * torch.randint(0, 2, weight.shape, generator=generator) - 1).to(weight)


@contextmanager
def _trainable(weights: Sequence[Tensor]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)


@contextmanager
def _replaced(weight: Tensor, other: Tensor) -> Iterator[None]:
    kept = weight.clone()
    weight.copy_(other)
    try:
        yield
    finally:
        weight.copy_(kept)
