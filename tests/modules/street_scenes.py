"""Batches of pictures with masks for the tests of segmentation modules."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

VOID = 255
CLASSES = 4
TINY_BACKBONE = "mobilenetv3_small_050"


class Scene(NamedTuple):
    images: Tensor | list[Tensor]
    masks: Tensor | list[Tensor]
    index: Tensor


def scene(size: int = 2, side: int = 64, mask_side: int | None = None, seed: int = 0) -> Scene:
    """Noise whose mean colour is that of the class of its half, with a void column."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(CLASSES, (size, 2), generator=generator)
    mask_side = mask_side or side
    masks = torch.empty(size, mask_side, mask_side, dtype=torch.int64)
    for half in range(2):
        images[..., half * side // 2 : (half + 1) * side // 2] += labels[:, half].view(-1, 1, 1, 1)
        masks[..., half * mask_side // 2 : (half + 1) * mask_side // 2] = labels[:, half].view(-1, 1, 1)
    masks[..., 0] = VOID
    return Scene(images, masks, torch.arange(size) + size * seed)


class Scenes(Dataset):
    """One scene per row, each of another seed."""

    def __init__(self, length: int, **kwargs: Any) -> None:
        self.scenes = [scene(1, seed=seed, **kwargs) for seed in range(length)]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: Any) -> Scene:
        return self.scenes[getattr(key, "index", key)]


def join(scenes: list[Scene]) -> Scene:
    return Scene(*(torch.cat(parts) for parts in zip(*scenes, strict=True)))


def scene_loader(count: int, size: int = 2, **kwargs: Any) -> DataLoader:
    return DataLoader(Scenes(count, **kwargs), batch_size=size, collate_fn=join)
