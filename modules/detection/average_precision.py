"""COCO average precision that comes out the same on one process and on many."""

from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

BACKENDS = {"faster_coco_eval": "faster_coco_eval", "pycocotools": "pycocotools"}
SCORES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")


def available_backend() -> str:
    """The first installed package that computes COCO's average precision.

    Raises:
        ModuleNotFoundError: if there is none.
    """
    for backend, package in BACKENDS.items():
        if find_spec(package) is not None:
            return backend
    raise ModuleNotFoundError(
        "average precision needs faster-coco-eval or pycocotools: pip install 'lightning-apps[dense]'"
    )


class AveragePrecision(Metric):
    """Average precision at IoU 0.5 to 0.95, at 0.5 and 0.75, and by size of objects; -1 where there are no objects.

    torchmetrics' own metric exchanges one tensor per image and would wait forever where processes hold different
    numbers of images. Here all boxes of a process are rows of one tensor, and an image that was seen twice counts once.

    Args:
        class_names: adds ``<metric>/<name>`` for each class (labels from 1) that has objects; None for no such metric.

    Raises:
        ModuleNotFoundError: if no package computes the metric.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, class_names: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_names, self.backend = class_names, available_backend()
        self.add_state("images", default=[], dist_reduce_fx="cat")
        self.add_state("found", default=[], dist_reduce_fx="cat")
        self.add_state("objects", default=[], dist_reduce_fx="cat")

    def update(self, detections: list[dict[str, Tensor]], targets: list[dict[str, Tensor]], index: Tensor) -> None:
        """Take the images of a batch.

        Args:
            detections: ``boxes`` (n, 4) xyxy, ``scores`` (n,) and ``labels`` (n,) of each image.
            targets: ``boxes`` (m, 4), ``labels`` (m,), ``iscrowd`` (m,) and ``area`` (m,) of each image.
            index: (B,) number of each image.
        """
        counts = [
            [len(found["labels"]), len(target["labels"])] for found, target in zip(detections, targets, strict=True)
        ]
        self.images.append(torch.cat([index[:, None].cpu(), torch.tensor(counts)], 1).to(self.device))
        self.found.append(_rows(detections, ("scores", "labels"), self.device))
        self.objects.append(_rows(targets, ("labels", "iscrowd", "area"), self.device))

    def compute(self) -> dict[str, Tensor]:
        """Scores by the names ``map``, ``map_50``, ``map_75``, ``map_small``, ``map_medium``, ``map_large``."""
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(
            backend=self.backend, class_metrics=self.class_names is not None, sync_on_compute=False
        )
        metric.warn_on_many_detections = False
        images = dim_zero_cat(self.images).cpu()
        found = dim_zero_cat(self.found).cpu().split(images[:, 1].tolist())
        objects = dim_zero_cat(self.objects).cpu().split(images[:, 2].tolist())
        # In the order of the images, so that equal scores are ranked alike however the images were spread.
        for place in _first_places(images[:, 0]):
            metric.update(*_unpacked(found[place], objects[place]))
        return self._named(metric.compute())

    def _named(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {name: scores[name].float().to(self.device) for name in SCORES}
        if self.class_names is not None:
            labels, precisions = scores["classes"].view(-1).tolist(), scores["map_per_class"].view(-1)
            for label, precision in zip(labels, precisions, strict=True):
                values[f"map/{self.class_names[label - 1]}"] = precision.float().to(self.device)
        if values["map"] < 0:
            rank_zero_warn("average precision: no image had an object, so it is -1.")
        return values


def _rows(images: list[dict[str, Tensor]], columns: tuple[str, ...], device: torch.device) -> Tensor:
    rows = [
        torch.cat([image["boxes"].float(), *(image[column].float()[:, None] for column in columns)], dim=1)
        for image in images
    ]
    return torch.cat(rows).detach().to(device)


def _first_places(index: Tensor) -> list[int]:
    places: dict[int, int] = {}
    for place, number in enumerate(index.tolist()):
        places.setdefault(number, place)
    return [places[number] for number in sorted(places)]


def _unpacked(found: Tensor, objects: Tensor) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    detections = {"boxes": found[:, :4], "scores": found[:, 4], "labels": found[:, 5].long()}
    labels, crowd, area = objects[:, 4].long(), objects[:, 5].long(), objects[:, 6]
    return [detections], [{"boxes": objects[:, :4], "labels": labels, "iscrowd": crowd, "area": area}]
