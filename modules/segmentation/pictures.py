"""Class indices as colours."""

import colorsys
from collections.abc import Sequence

import torch
from torch import Tensor

from modules.segmentation.heads import resize_logits
from modules.segmentation.metrics import VOID


def hue_palette(num_classes: int) -> list[list[int]]:
    """As many colours (red, green, blue in 0..255), spread over the hues."""
    colours = (colorsys.hsv_to_rgb(index / num_classes, 1.0, 1.0 - 0.4 * (index % 2)) for index in range(num_classes))
    return [[round(255 * part) for part in colour] for colour in colours]


def colour_masks(masks: Tensor, palette: Sequence[Sequence[int]]) -> Tensor:
    """Paint class indices (..., H, W) with colours of 0..255, void black: (..., 3, H, W) in [0, 1]."""
    table = torch.zeros(VOID + 1, 3, device=masks.device)
    table[: len(palette)] = torch.as_tensor(palette, dtype=torch.float32, device=masks.device) / 255
    return table[masks.long()].movedim(-1, -3)


def panel(
    image: Tensor,
    label: Tensor,
    prediction: Tensor,
    palette: Sequence[Sequence[int]],
    uncertainty: Tensor | None = None,
) -> Tensor:
    """Image (3, h, w) in [0, 1], label, prediction and uncertainty (H, W) side by side: (3, H, 3 W or 4 W).

    The uncertainty is stretched from its smallest (black) to its largest value (yellow).
    """
    image = resize_logits(image[None], label.shape)[0].clamp(0, 1)
    parts = [image, colour_masks(label, palette), colour_masks(prediction, palette)]
    if uncertainty is not None:
        parts.append(heat_map(uncertainty))
    return torch.cat([part.to(image) for part in parts], 2)


def heat_map(values: Tensor) -> Tensor:
    """Paint numbers (H, W), stretched from smallest to largest, from black over red to yellow: (3, H, W) in [0, 1]."""
    low, high = values.amin(), values.amax()
    share = (values - low) / (high - low).clamp(min=1e-12)
    return torch.stack([(2 * share).clamp(0, 1), (2 * share - 1).clamp(0, 1), torch.zeros_like(share)])
