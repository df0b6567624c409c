"""Pictures of rectangles with boxes, for the tests of detectors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import DetectionBatch
from modules.detection import Detector

BACKBONE = "mobilenetv3_small_050"
SIDE = 64
COLOURS = ((1.0, 0.1, 0.1), (0.1, 0.1, 1.0))


def picture(seed: int, side: int = SIDE) -> tuple[Tensor, dict[str, Tensor]]:
    """Two rectangles on grey, red ones of label 1 and blue ones of label 2, on a picture on disk of twice the size."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((3, side, side), 0.5)
    boxes, labels = [], []
    for half in range(2):
        size = torch.randint(side // 4, side // 2, (2,), generator=generator)
        corner = torch.stack(
            [
                torch.randint(0, side // 2 - int(size[0]) + 1, (), generator=generator) + half * side // 2,
                torch.randint(0, side - int(size[1]), (), generator=generator),
            ]
        )
        label = int(torch.randint(0, 2, (), generator=generator))
        left, top, right, bottom = *corner.tolist(), *(corner + size).tolist()
        image[:, top:bottom, left:right] = torch.tensor(COLOURS[label])[:, None, None]
        boxes.append([left, top, right, bottom])
        labels.append(label + 1)
    corners = torch.tensor(boxes, dtype=torch.float32)
    area = (2 * (corners[:, 2:] - corners[:, :2])).prod(1)
    target = {"boxes": corners, "labels": torch.tensor(labels), "iscrowd": torch.zeros(2, dtype=torch.int64)}
    return image, {**target, "area": area, "size": torch.tensor([2 * side, 2 * side])}


def detection_batch(seeds: Sequence[int], side: int = SIDE) -> DetectionBatch:
    images, targets = zip(*(picture(seed, side) for seed in seeds), strict=True)
    return DetectionBatch(list(images), list(targets), torch.tensor(list(seeds)))


def box_loader(batches: int, size: int = 2, side: int = SIDE) -> DataLoader:
    items = [detection_batch(range(size * place, size * (place + 1)), side) for place in range(batches)]
    return DataLoader(items, batch_size=None)


def detector(name: str = "ssdlite", **settings: Any) -> Detector:
    torch.manual_seed(0)
    defaults = {"backbone": BACKBONE, "num_classes": 2, "image_size": SIDE, "lr_reference_batch": None}
    return Detector(name, **{**defaults, **settings})
