"""The student's view of unlabelled images: scaled, mixed with another image, changed in colour, mirrored."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from modules.segmentation.metrics import VOID

MixName = Literal["classmix", "cutmix", "cutout", "none"]

JITTER, JITTER_SHARE = 0.25, 0.8
BLUR_RADIUS, BLUR_SHARE, BLUR_KERNEL = (0.15, 1.15), 0.5, 9
FLIP_SHARE = 0.5


class PseudoLabelled(NamedTuple):
    """Images with what a teacher says of them.

    Args:
        images: (B, channels, H, W).
        labels: (B, H, W) int64, 255 for void.
        confidence: (B, H, W) in [0, 1], 0 for void.
    """

    images: Tensor
    labels: Tensor
    confidence: Tensor


class StrongViews:
    """Turns weak views with pseudo-labels into strong ones. All three parts go through the same geometry.

    Args:
        scale_range: smallest and largest random factor of the size; the result is cropped or padded to the old size.
        mix: ``classmix`` pastes half of an image's classes on the next image, ``cutmix`` pastes the next image into a
            rectangle of half of the area, ``cutout`` empties that rectangle, ``none`` leaves it.
        mean: per channel, of values in [0, 1], that the images were normalised with.
        std: per channel.
        photometric: change brightness, contrast, saturation and hue, and blur.
        flip: mirror half of the images left and right.

    Raises:
        ValueError: for a value out of its range.

    Source: PRCL's augmentation of unlabelled images; ClassMix (Olsson et al. 2021), CutMix (Yun et al. 2019).
    """

    def __init__(
        self,
        scale_range: Sequence[float] = (0.5, 1.5),
        mix: MixName = "classmix",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        photometric: bool = True,
        flip: bool = True,
    ) -> None:
        from torchvision.transforms import v2

        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range: {list(scale_range)} is not two factors above 0, the smaller one first")
        if mix not in get_args(MixName):
            raise ValueError(f"mix: {mix!r} is unknown; expected {', '.join(get_args(MixName))}")
        self.scale_range, self.mix, self.flip = tuple(scale_range), mix, flip
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.photometric = photometric
        self._colours = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(JITTER, JITTER, JITTER, JITTER)], JITTER_SHARE),
                v2.RandomApply([v2.GaussianBlur(BLUR_KERNEL, BLUR_RADIUS)], BLUR_SHARE),
            ]
        )

    @torch.no_grad()
    def __call__(self, views: PseudoLabelled) -> PseudoLabelled:
        """Strong views of the same shapes; random numbers come from torch's global generator.

        Raises:
            ValueError: for mixing a batch of one image, or channels other than those of ``mean`` and ``std``.
        """
        batch, channels = views.images.shape[:2]
        if self.photometric and not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"mean and std: {len(self.mean)} and {len(self.std)} values, but the images have {channels} channels"
            )
        if self.mix in ("classmix", "cutmix") and batch < 2:
            raise ValueError(
                f"mix: {self.mix} needs a second image, but the batch of unlabelled images holds 1; raise "
                "data.batch_size (or data.unlabeled_batch_size) above 1 or set mix to cutout or none"
            )
        scaled = [rescale_pad_crop(*parts, self.scale_range) for parts in zip(*views, strict=True)]
        views = self._mixed(PseudoLabelled(*(torch.stack(parts) for parts in zip(*scaled, strict=True))))
        images = self._coloured(views.images) if self.photometric else views.images
        views = PseudoLabelled(images, views.labels, views.confidence)
        if not self.flip:
            return views
        mirrored = torch.rand(batch, device=images.device) < FLIP_SHARE
        return PseudoLabelled(*(torch.where(_broadcast(mirrored, part), part.flip(-1), part) for part in views))

    def _mixed(self, views: PseudoLabelled) -> PseudoLabelled:
        if self.mix == "none":
            return views
        if self.mix == "classmix":
            return _pasted(views, class_masks(views.labels))
        inside = rectangles(len(views.images), views.labels.shape[1:], views.labels.device)
        if self.mix == "cutmix":
            return _pasted(views, ~inside)
        # The value 0 is that of a normalised image: its mean colour.
        return PseudoLabelled(
            views.images.masked_fill(inside[:, None], 0.0),
            views.labels.masked_fill(inside, VOID),
            views.confidence.masked_fill(inside, 0.0),
        )

    def _coloured(self, images: Tensor) -> Tensor:
        mean, std = self.mean.to(images), self.std.to(images)
        plain = (images * std + mean).clamp(0, 1)
        return (torch.stack([self._colours(image) for image in plain]) - mean) / std


def rescale_pad_crop(
    image: Tensor, label: Tensor, confidence: Tensor, scale_range: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale by one random factor, pad at the right and at the bottom, crop at random; the size stays.

    Args:
        image: (channels, H, W), interpolated linearly and padded by reflection.
        label: (H, W), not interpolated, padded with void.
        confidence: (H, W), not interpolated, padded with 0.
        scale_range: of the factor.
    """
    height, width = label.shape
    draw = torch.rand(3).tolist()
    factor = scale_range[0] + (scale_range[1] - scale_range[0]) * draw[0]
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    image = functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    # Plain "nearest" would take them up to half a pixel above and left of where the image is sampled.
    maps = torch.stack([label.to(confidence), confidence])[None]
    maps = functional.interpolate(maps, size=size, mode="nearest-exact")[0]
    pad = (0, max(0, width - size[1]), 0, max(0, height - size[0]))
    image = reflect_pad(image, (size[0] + pad[3], size[1] + pad[1]))
    label = functional.pad(maps[0].long(), pad, value=VOID)
    confidence = functional.pad(maps[1], pad)
    top, left = (
        int(share * (length - side + 1))
        for share, length, side in zip(draw[1:], label.shape, (height, width), strict=True)
    )
    place = (..., slice(top, top + height), slice(left, left + width))
    return image[place], label[place], confidence[place]


def reflect_pad(image: Tensor, size: Sequence[int]) -> Tensor:
    """Pad (..., h, w) at the bottom and at the right to (..., *size) by reflections, repeated as often as needed."""
    for axis, length in ((-2, size[0]), (-1, size[1])):
        have = image.shape[axis]
        if have == length:
            continue
        position = torch.arange(length, device=image.device)
        period = max(2 * have - 2, 1)
        position = position % period
        image = image.index_select(axis, torch.where(position < have, position, period - position))
    return image


def class_masks(labels: Tensor) -> Tensor:
    """True at the pixels of a random half of each image's classes, rounded down; void counts as a class.

    Args:
        labels: (B, H, W) int64 in 0..255.

    Returns:
        (B, H, W) bool.
    """
    flat = labels.flatten(1)
    present = torch.zeros(len(labels), VOID + 1, dtype=torch.bool, device=labels.device).scatter(1, flat, True)
    keys = torch.rand(present.shape, device=labels.device).masked_fill(~present, 2.0)
    rank = keys.argsort(1).argsort(1)
    kept = rank < present.sum(1, keepdim=True) // 2
    return kept.gather(1, flat).view_as(labels)


def rectangles(batch: int, size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """True inside a random rectangle of half of the area for each image: (batch, H, W) bool.

    Its width is uniform between half of the image's width and all of it.
    """
    height, width = size
    draw = torch.rand(3, batch, device=device)
    wide = (width / 2 + draw[0] * width / 2).ceil()
    high = (height * width / 2 / wide).round().clamp(1, height)
    left, top = (draw[1] * (width - wide + 1)).floor(), (draw[2] * (height - high + 1)).floor()
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = (row >= top[:, None]) & (row < (top + high)[:, None])
    columns = (column >= left[:, None]) & (column < (left + wide)[:, None])
    return rows[:, :, None] & columns[:, None, :]


def _pasted(views: PseudoLabelled, own: Tensor) -> PseudoLabelled:
    """Each image where ``own`` (B, H, W) is true, the next one of the batch elsewhere."""
    return PseudoLabelled(
        *(torch.where(own if part.ndim == 3 else own[:, None], part, part.roll(-1, 0)) for part in views)
    )


def _broadcast(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.ndim - 1))
