"""What bits are worth to each layer of a network: the paper's score, controls, and better-founded ones.

Every score gives a table: layer -> number of bits -> worth. A shortcut has no row; its layer's row counts for both.
Only differences between the worths of one layer's bits matter, and only up to one factor for all layers.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.quantization.attachment import float_weight
from modules.quantization.costs import LayerCost
from modules.quantization.features import gather_rows, pooled_features
from modules.quantization.scale_search import quantize, search_channel_grid
from modules.quantization.tracing import NetworkTrace, evaluating

Score = Literal[
    "tfidf",
    "equal",
    "random",
    "parameters",
    "orthogonality",
    "hessian",
    "weight_error",
    "layer_error",
    "output_error",
]
Values = dict[str, dict[int, float]]
Weighting = Literal["identity", "exp_neg"]
Normalise = Literal["none", "channels"]

WORD_FLOOR = 1e-11
EMPTY_SHARE = 0.5


def score_layers(
    score: Score,
    network: nn.Module,
    trace: NetworkTrace,
    costs: Mapping[str, LayerCost],
    pictures: Sequence[Tensor],
    candidates: Mapping[str, Sequence[int]],
    **options: Any,
) -> Values:
    """Worth of each number of bits to each layer, by any score.

    Args:
        score: ``tfidf`` (CSMPQ), ``orthogonality`` (OMPQ), ``hessian`` (HAWQ-v2), ``output_error`` (change of the
            network's output), ``layer_error`` (of the layer's own), ``weight_error`` (of the weight); or the controls
            ``equal``, ``random`` and ``parameters``.
        network: in float, or with quantizers that let everything pass.
        trace: of it.
        costs: by layer.
        pictures: calibration images (B, channels, H, W), those of this process.
        candidates: numbers of bits that each layer may get.
        options: of the score: see the function of its name.

    Raises:
        TypeError: for an option that the score does not have.
        ValueError: see the function.
    """
    if score == "equal":
        return linear_values(dict.fromkeys(leaders(trace), 1.0), candidates, **options)
    if score == "random":
        return linear_values(random_scores(trace, **options), candidates)
    if score == "parameters":
        total = sum(cost.parameters for cost in costs.values())
        return linear_values({name: costs[name].parameters / total for name in leaders(trace)}, candidates, **options)
    if score in ("tfidf", "orthogonality"):
        features = pooled_features(network, trace, pictures)
        own = {name: features[name] for name in leaders(trace)}
        scores = tfidf_scores(own, **options) if score == "tfidf" else orthogonality_scores(own, **options)
        return linear_values(scores, candidates)
    function = {
        "hessian": hessian_values,
        "weight_error": weight_error_values,
        "layer_error": layer_error_values,
        "output_error": output_error_values,
    }[score]
    return function(network, trace, pictures, candidates, **options)


def leaders(trace: NetworkTrace) -> list[str]:
    """The layers whose bits are variables: all but shortcuts."""
    return [group[0] for group in trace.groups]


def linear_values(scores: Mapping[str, float], candidates: Mapping[str, Sequence[int]]) -> Values:
    """Worth ``score * bits``, as in the paper's programme."""
    return {name: {bits: score * bits for bits in candidates[name]} for name, score in scores.items()}


def random_scores(trace: NetworkTrace, seed: int = 0) -> dict[str, float]:
    """Uniform random scores in (0, 1), a control."""
    generator = torch.Generator().manual_seed(seed)
    names = leaders(trace)
    return dict(zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True))


def tfidf_scores(
    features: Mapping[str, Tensor],
    coe: float | None = None,
    normalise: Normalise = "none",
    weighting: Weighting = "identity",
    beta: float = 1.0,
) -> dict[str, float]:
    """Class separability of each layer: how strongly its channels tell images apart.

    Args:
        features: by layer (N, C), not negative: images are documents, channels are words.
        coe: of the balance coefficient ``ln(e C / coe)``; None or 0 for 1, as in all published runs.
        normalise: ``channels`` multiplies by C, which the score otherwise falls with.
        weighting: ``exp_neg`` turns a score s into ``exp(-beta s)``, as the released post-training code does.
        beta: of that.

    Raises:
        ValueError: for features that are not finite, or with more than half of the images without any feature.

    Warns:
        UserWarning: for images without any feature in a layer, which are left out.

    Source: CSMPQ, equations 7, 8 and 10.
    """
    scores = {name: separability(rows, coe, name) for name, rows in features.items()}
    if normalise == "channels":
        scores = {name: score * features[name].shape[1] for name, score in scores.items()}
    return _weighted(scores, weighting, beta)


def separability(features: Tensor, coe: float | None = None, name: str = "features") -> float:
    """TF-IDF of one layer's features (N, C), meaned over channels; see :func:`tfidf_scores`."""
    rows = features.double()
    if not torch.isfinite(rows).all():
        raise ValueError(
            f"{name}: {int((~torch.isfinite(rows)).any(1).sum())} of {len(rows)} images give no finite features"
        )
    images, channels = rows.shape
    totals = rows.sum(1, keepdim=True)
    empty = int((totals == 0).sum())
    if empty > EMPTY_SHARE * images:
        raise ValueError(f"{name}: all features of {empty} of {images} images are 0, so images cannot be told apart")
    if empty:
        warnings.warn(f"{name}: all features of {empty} of {images} images are 0; they count as absent", stacklevel=2)
    balance = 1.0 if not coe else torch.log(torch.tensor(torch.e * channels / coe, dtype=torch.float64)).item()
    frequency = balance * rows / totals.masked_fill(totals == 0, 1.0)
    contains = rows >= rows.mean(0)
    documents = contains.sum(0)
    inverse = torch.log(images / (documents + 1.0))
    weight = (frequency * contains).sum(0) / (documents + WORD_FLOOR)
    return (weight * inverse).mean().item()


def orthogonality_scores(features: Mapping[str, Tensor], beta: float = 1.0) -> dict[str, float]:
    """``exp(-beta s)``, with s the sum of a layer's similarities to the other layers.

    The similarity of two layers is ``||A^T B||^2 / (||A^T A|| ||B^T B||)`` of their features A and B.

    Args:
        features: by layer (N, C).
        beta: of the exponential.

    Raises:
        ValueError: for a layer without any feature.

    Source: Ma et al., OMPQ (AAAI 2023).
    """
    grams = {name: rows.double() @ rows.double().T for name, rows in features.items()}
    if dead := [name for name, gram in grams.items() if not gram.any()]:
        raise ValueError(f"all features are 0 in {', '.join(dead[:5])}: there is nothing to compare")
    flat = functional.normalize(torch.stack([gram.flatten() for gram in grams.values()]), dim=1)
    similarity = (flat @ flat.T).fill_diagonal_(0.0)
    return _weighted(dict(zip(grams, similarity.sum(1).tolist(), strict=True)), "exp_neg", beta)


def weight_error_values(
    network: nn.Module, trace: NetworkTrace, pictures: Sequence[Tensor], candidates: Mapping[str, Sequence[int]]
) -> Values:
    """Minus the squared error of the weights relative to their squares; without pictures."""
    values = {}
    for group in trace.groups:
        weights = {name: _weight(network, name) for name in group}
        energy = sum(weight.square().sum().item() for weight in weights.values())
        values[group[0]] = {
            bits: -sum((nearest(weight, bits) - weight).square().sum().item() for weight in weights.values()) / energy
            for bits in candidates[group[0]]
        }
    return values


@torch.no_grad()
def layer_error_values(
    network: nn.Module,
    trace: NetworkTrace,
    pictures: Sequence[Tensor],
    candidates: Mapping[str, Sequence[int]],
    images: int = 32,
) -> Values:
    """Minus the squared error of each layer's output relative to its variance, with quantized weight and float input.

    Args:
        network: see :func:`score_layers`.
        trace: of it.
        pictures: calibration images.
        candidates: numbers of bits.
        images: how many of the pictures to use on each process.

    Source: the noise of each layer, as in Lin et al., "Fixed point quantization of deep convolutional networks" (2016).
    """
    leader = {name: group[0] for group in trace.groups for name in group}
    sums = {name: torch.zeros(1 + len(candidates[name]), dtype=torch.float64) for name in leaders(trace)}

    def watch(name: str) -> Callable[..., None]:
        own, layer = candidates[leader[name]], network.get_submodule(name)
        weight = _weight(network, name)
        errors = [nearest(weight, bits) - weight for bits in own]

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            spread = output.double() - output.double().mean()
            found = [
                spread.square().sum(),
                *(_apply(layer, inputs[0], error).double().square().sum() for error in errors),
            ]
            sums[leader[name]] += torch.stack(found).cpu()

        return hook

    with evaluating(network), _hooks(network, {name: watch(name) for name in leader}):
        for batch in _first(pictures, images):
            network(batch)
    values = {}
    for name, own in sums.items():
        total = _over_processes(own)
        values[name] = {
            bits: -(error / total[0]).item() for bits, error in zip(candidates[name], total[1:], strict=True)
        }
    return values


@torch.no_grad()
def output_error_values(
    network: nn.Module,
    trace: NetworkTrace,
    pictures: Sequence[Tensor],
    candidates: Mapping[str, Sequence[int]],
    images: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Values:
    """Minus the mean squared change of the network's output when one layer (with its shortcuts) is quantized.

    One pass of the images for each layer and number of bits.

    Args:
        network: see :func:`score_layers`.
        trace: of it.
        pictures: calibration images.
        candidates: numbers of bits.
        images: how many of the pictures to use on each process.
        progress: called with the passes done and their number.
    """
    batches = list(_first(pictures, images))
    groups = [(group, bits) for group in trace.groups for bits in candidates[group[0]] if len(candidates[group[0]]) > 1]
    values: Values = {group[0]: dict.fromkeys(candidates[group[0]], 0.0) for group in trace.groups}
    with evaluating(network):
        targets = [network(batch).double() for batch in batches]
        for done, (group, bits) in enumerate(groups):
            with _quantized(network, group, bits):
                changes = [
                    (network(batch).double() - target).square().flatten(1).mean(1)
                    for batch, target in zip(batches, targets, strict=True)
                ]
            rows = gather_rows(torch.cat(changes)[:, None])
            values[group[0]][bits] = -rows.mean().item()
            if progress is not None:
                progress(done + 1, len(groups))
    return values


def hessian_values(
    network: nn.Module,
    trace: NetworkTrace,
    pictures: Sequence[Tensor],
    candidates: Mapping[str, Sequence[int]],
    images: int = 32,
    probes: int = 8,
    seed: int = 0,
) -> Values:
    """Minus half the mean eigenvalue of the loss' Hessian times the squared error of the weight.

    The loss is the cross-entropy with the network's own answers, so that no labels are needed; the trace is estimated
    with random signs (Hutchinson).

    Args:
        network: see :func:`score_layers`.
        trace: of it.
        pictures: calibration images.
        candidates: numbers of bits.
        images: how many of the pictures to use on each process.
        probes: number of random vectors.
        seed: of these.

    Source: Dong et al., HAWQ-v2 (2020), equation 5 and algorithm 1.
    """
    names = [name for group in trace.groups for name in group]
    weights = [float_weight(network.get_submodule(name)) for name in names]
    frozen = [parameter for parameter in weights if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    traces = torch.zeros(len(names), dtype=torch.float64)
    count = 0
    with evaluating(network), torch.enable_grad():
        for batch in _first(pictures, images):
            logits = network(batch)
            loss = functional.cross_entropy(logits, logits.detach().argmax(1)) * len(batch)
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            for probe in range(probes):
                signs = [_signs(weight, generator) for weight in weights]
                products = torch.autograd.grad(
                    gradients, weights, signs, retain_graph=probe + 1 < probes, materialize_grads=True
                )
                traces += torch.stack(
                    [(sign * product).double().sum() for sign, product in zip(signs, products, strict=True)]
                ).cpu()
            count += len(batch)
    for parameter in frozen:
        parameter.requires_grad_(False)
    sums = _over_processes(torch.cat([traces / probes, torch.tensor([count], dtype=torch.float64)]))
    mean_trace = dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))
    values = {}
    for group in trace.groups:
        own = {name: _weight(network, name) for name in group}
        values[group[0]] = {
            bits: -sum(
                0.5
                * max(mean_trace[name], 0.0)
                / weight.numel()
                * (nearest(weight, bits) - weight).square().sum().item()
                for name, weight in own.items()
            )
            for bits in candidates[group[0]]
        }
    return values


@torch.no_grad()
def nearest(weight: Tensor, bits: int) -> Tensor:
    """A weight rounded to nearest on a symmetric grid of each channel with the best of 80 ranges."""
    grid = search_channel_grid(weight, bits, symmetric=True)
    shape = (-1, *[1] * (weight.ndim - 1))
    return (quantize(weight, grid) - grid.zero_point.view(shape)) * grid.scale.view(shape)


def _weighted(scores: dict[str, float], weighting: Weighting, beta: float) -> dict[str, float]:
    if weighting == "identity":
        return scores
    if weighting != "exp_neg":
        raise ValueError(f"weighting: {weighting!r} is unknown; expected identity or exp_neg")
    return {name: torch.exp(torch.tensor(-beta * score, dtype=torch.float64)).item() for name, score in scores.items()}


def _weight(network: nn.Module, name: str) -> Tensor:
    return float_weight(network.get_submodule(name)).detach()


def _apply(layer: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """A layer without bias with another weight."""
    if isinstance(layer, nn.Linear):
        return functional.linear(inputs, weight)
    return layer._conv_forward(inputs, weight, None)


def _first(pictures: Sequence[Tensor], images: int) -> Iterator[Tensor]:
    for batch in pictures:
        if images <= 0:
            return
        yield batch[:images]
        images -= len(batch)


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(2, weight.shape, generator=generator) * 2 - 1).to(weight)


def _over_processes(sums: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
    return sums


@contextmanager
def _quantized(network: nn.Module, names: Sequence[str], bits: int) -> Iterator[None]:
    """Weights of some layers rounded to nearest, for a while."""
    weights = {name: float_weight(network.get_submodule(name)) for name in names}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.copy_(nearest(weight, bits))
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(kept[name])


@contextmanager
def _hooks(network: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    handles = [network.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
