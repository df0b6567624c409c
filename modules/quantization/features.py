"""What the layers of a network make of images: one number per channel and image, taken in one pass."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.quantization.tracing import NetworkTrace, Tap, TracedLayer, evaluating, some


def images_of(batch: Any) -> Tensor:
    """The images of whatever a data loader yields.

    Args:
        batch: a tensor (B, ...); something with ``.images``; a dictionary with ``labeled``; or a tuple or list that
            begins with one of these.

    Raises:
        ValueError: for anything else, and an empty batch.
    """
    images = batch
    while not isinstance(images, Tensor):
        if hasattr(images, "images"):
            images = images.images
        elif isinstance(images, Mapping) and "labeled" in images:
            images = images["labeled"]
        elif isinstance(images, (tuple, list)) and images:
            images = images[0]
        else:
            found = f"a dictionary with {some([str(key) for key in images])}" if isinstance(images, Mapping) else images
            raise ValueError(
                "no images in the batch: expected a tensor, something with .images, a dictionary with 'labeled', or a "
                f"tuple that begins with one of these, got {found if isinstance(found, str) else type(found).__name__}"
            )
    if images.ndim == 0 or not len(images):
        raise ValueError(f"no images in the batch: a tensor of shape {tuple(images.shape)}")
    return images


def image_batches(network: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Images of each batch, on the network's device."""
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    for batch in batches:
        yield images_of(batch).to(device)


@torch.no_grad()
def pooled_features(
    network: nn.Module, trace: NetworkTrace, batches: Iterable[Any], gather: bool = True
) -> dict[str, Tensor]:
    """Each layer's output, rectified and averaged over all positions, of every image.

    The network runs once, in evaluation mode; outputs are pooled as they appear, so that memory holds one number per
    image and channel.

    Args:
        network: which ``trace`` is of.
        trace: tells where the feature of a layer is taken.
        batches: see :func:`images_of`.
        gather: whether the images of all processes are put together, where there are several; all must then call this.

    Returns:
        By name of the layer: (N, C), in the order of the images, or of the processes and their images.

    Raises:
        ValueError: for fewer than 2 images, or a feature that is not a tensor or does not appear.

    Source: CSMPQ, features.
    """
    pooled: dict[str, list[Tensor]] = {name: [] for name in trace.names}
    with evaluating(network), _pooling(network, trace, pooled) as calls:
        for seen, images in enumerate(image_batches(network, batches), 1):
            calls.clear()
            network(images)
            _check_rows(pooled, trace, seen, len(images))
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    features = {
        name: torch.cat(rows) if rows else torch.zeros(0, trace[name].out_channels, device=device)
        for name, rows in pooled.items()
    }
    if gather:
        features = gather_rows(features)
    count = min(len(rows) for rows in features.values())
    if count < 2:
        raise ValueError(f"features need at least 2 images to be compared, got {count}")
    return features


def gather_rows(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of all processes, however many each has; what was given, where there is one process.

    Args:
        features: (N, C) each, with one N for all and the C of the other processes.

    Returns:
        The same with the rows of all processes, in their order.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return features
    widths = [rows.shape[1] for rows in features.values()]
    table = torch.cat(list(features.values()), dim=1).contiguous()
    counts = [torch.zeros(1, dtype=torch.int64, device=table.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(table)], device=table.device))
    most = int(max(counts))
    padded = table.new_zeros(most, table.shape[1])
    padded[: len(table)] = table
    tables = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(tables, padded)
    everything = torch.cat([part[: int(count)] for part, count in zip(tables, counts, strict=True)])
    return dict(zip(features, everything.split(widths, dim=1), strict=True))


@contextmanager
def _pooling(network: nn.Module, trace: NetworkTrace, pooled: dict[str, list[Tensor]]) -> Iterator[Counter[str]]:
    """Hooks that append to the lists; what is yielded counts the calls and is to be cleared before each pass."""
    wanted: dict[Tap, list[TracedLayer]] = {}
    for layer in trace.layers:
        wanted.setdefault(layer.feature, []).append(layer)
    calls: Counter[str] = Counter()

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for layer in wanted.get(Tap(name, calls[name]), []):
                pooled[layer.name].append(_pool(layer, output))
            calls[name] += 1

        return hook

    modules = dict.fromkeys(tap.module for tap in wanted)
    handles = [network.get_submodule(name).register_forward_hook(hook_of(name)) for name in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _pool(layer: TracedLayer, output: Any) -> Tensor:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise ValueError(
            f"{layer.name}: its feature, the output of {layer.feature.module}, is no tensor with channels but "
            f"{type(output).__name__}"
        )
    first, last = (output.shape[axis] == layer.out_channels for axis in (1, -1))
    in_front = first if layer.kind == "conv" else not last
    channels = (output if in_front or not last else output.movedim(-1, 1)).relu().float()
    return channels.flatten(2).mean(2) if channels.ndim > 2 else channels


def _check_rows(pooled: dict[str, list[Tensor]], trace: NetworkTrace, batches: int, images: int) -> None:
    for name, rows in pooled.items():
        tap = trace[name].feature
        if len(rows) != batches:
            raise ValueError(
                f"{name}: call {tap.call + 1} of {tap.module}, where its feature is taken, did not happen in this "
                "pass; the network runs other modules than when it was traced"
            )
        if len(rows[-1]) != images:
            raise ValueError(
                f"{name}: {images} images gave {len(rows[-1])} features; the first dimension must be that of images"
            )
