"""Model input made visible."""

from typing import Any

from torch import Tensor


def displayable(images: Tensor, datamodule: Any = None) -> Tensor:
    """Normalised images (B, C, H, W) as pictures (B, 3, H, W) in [0, 1].

    Args:
        images: with 1 or 3 channels.
        datamodule: undoes its normalisation if it has a method ``denormalize``; otherwise each image is stretched from
            its darkest to its brightest value.
    """
    denormalize = getattr(datamodule, "denormalize", None)
    if denormalize is not None:
        images = denormalize(images)
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-6)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
