"""COCO 2017: ``{train2017,val2017}/*.jpg`` and ``annotations/instances_{train,val}2017.json``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.image_files import missing_images
from datamodules.readers.boxes import OUTSIDE_TOLERANCE, BoxSamples
from datamodules.readers.samples import existing_folder

PARTS = ("train", "val")
SHOWN = 5


class CocoReader:
    """Reads boxes in the format of COCO's instances.

    Labels are numbered from 1 in the order of the category ids, which have gaps (1 to 90 for 80 classes), or in the
    order of ``class_names``.

    Args:
        root: folder with ``train2017``, ``val2017`` and ``annotations``.
        class_names: names of all categories, in the order of the labels; None for that of the ids.

    Raises:
        FileNotFoundError: if the folder or both files of annotations are missing.
        ValueError: if the file has other categories than ``class_names``.
    """

    def __init__(self, root: str | None, class_names: Sequence[str] | None = None) -> None:
        self.root = existing_folder(root, "coco")
        self._content: dict[str, dict[str, Any]] = {}
        # The file of the validation part is small and has the same categories.
        part = next((part for part in reversed(PARTS) if self._file(part).is_file()), "val")
        self._content[part] = self._load(part)
        self.categories = _chosen(_categories(self._content[part]), class_names, self._file(part))

    @property
    def class_names(self) -> list[str]:
        """Name of each class, in the order of the labels."""
        return list(self.categories)

    @property
    def category_ids(self) -> list[int]:
        """COCO's id of each class, in the order of the labels."""
        return list(self.categories.values())

    def read(self, part: str) -> BoxSamples:
        """Images of a part in the order of the file, each with its objects.

        Boxes of no width or height are left out with a warning.

        Raises:
            FileNotFoundError: if the file, or images that it lists, are missing.
            ValueError: for an annotation that does not fit; names the file and the annotation's id.
        """
        content, file = self._load(part), self._file(part)
        if _categories(content) != self.categories:
            raise ValueError(f"{file}: its categories differ from those of the other part; use files of one data set")
        images = {image["id"]: image for image in content["images"]}
        labels = {number: label for label, number in enumerate(self.category_ids, start=1)}
        objects: dict[int, list[list[float]]] = {number: [] for number in images}
        empty = []
        for annotation in content["annotations"]:
            _check_ids(annotation, images, labels, file)
            image = images[annotation["image_id"]]
            box = _corners(annotation, image, file)
            if box is None:
                empty.append(annotation["id"])
                continue
            crowd, area = annotation.get("iscrowd", 0), annotation.get("area")
            area = (box[2] - box[0]) * (box[3] - box[1]) if area is None else area
            objects[image["id"]].append([*box, labels[annotation["category_id"]], crowd, area])
        if empty:
            rank_zero_warn(f"{file}: {len(empty)} boxes without width or height left out: annotation {_some(empty)}")
        return BoxSamples.build(
            list(images),
            self._paths(part, list(images.values())),
            [(image["height"], image["width"]) for image in images.values()],
            [np.array(rows, dtype=np.float64).reshape(-1, 7) for rows in objects.values()],
        )

    def _file(self, part: str) -> Path:
        return self.root / "annotations" / f"instances_{part}2017.json"

    def _paths(self, part: str, images: list[dict[str, Any]]) -> list[str]:
        folder = self.root / f"{part}2017"
        present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        missing = [str(folder / image["file_name"]) for image in images if image["file_name"] not in present]
        if missing:
            raise missing_images(folder, missing, len(images), str(self._file(part)))
        return [str(folder / image["file_name"]) for image in images]

    def _load(self, part: str) -> dict[str, Any]:
        if part not in PARTS:
            raise ValueError(f"layout 'coco' has no part '{part}' with annotations, only {', '.join(PARTS)}")
        if part in self._content:
            return self._content.pop(part)  # read once; the whole file would take gigabytes to keep
        file = self._file(part)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; --data.root is the folder that holds annotations/ and {part}2017/"
            )
        try:
            content = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file}: is no JSON ({error}); download it again") from error
        lacking = [key for key in ("images", "annotations", "categories") if key not in content]
        if lacking:
            raise ValueError(f"{file}: has no {', '.join(lacking)}; expected a file of COCO instances")
        return content


def _categories(content: dict[str, Any]) -> dict[str, int]:
    """Name -> id, in the order of the ids."""
    return {entry["name"]: entry["id"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])}


def _chosen(found: dict[str, int], class_names: Sequence[str] | None, file: Path) -> dict[str, int]:
    """The categories in the order of ``class_names``, which must be all of them."""
    if class_names is None:
        return found
    if unknown := [name for name in found if name not in class_names]:
        raise ValueError(
            f"{file}: categories {_some(unknown)} are not among --data.class_names ({len(class_names)} names); "
            "add them, or leave class_names out"
        )
    if absent := [name for name in class_names if name not in found]:
        raise ValueError(f"--data.class_names: {_some(absent)} not among the categories of {file}; take them out")
    return {name: found[name] for name in class_names}


def _check_ids(annotation: dict[str, Any], images: dict[int, Any], labels: dict[int, int], file: Path) -> None:
    if annotation["image_id"] not in images:
        raise ValueError(
            f"{file}: annotation {annotation['id']} belongs to image {annotation['image_id']}, which the file does not "
            "list; remove the annotation or add the image"
        )
    if annotation["category_id"] not in labels:
        raise ValueError(
            f"{file}: annotation {annotation['id']} has category {annotation['category_id']}, which is not among the "
            f"file's categories ({len(labels)} of them); correct it or remove the annotation"
        )


def _corners(annotation: dict[str, Any], image: dict[str, Any], file: Path) -> list[float] | None:
    """Corners of a box within the image; None if it has no width or height."""
    left, top, width, height = annotation["bbox"]
    if width <= 0 or height <= 0:
        return None
    box = [left, top, left + width, top + height]
    limits = [image["width"], image["height"]] * 2
    outside = max(-left, -top, box[2] - limits[0], box[3] - limits[1])
    inside = [min(max(value, 0), limit) for value, limit in zip(box, limits, strict=True)]
    if outside > OUTSIDE_TOLERANCE:
        raise ValueError(
            f"{file}: annotation {annotation['id']} has the box {annotation['bbox']} (x, y, width, height), which ends "
            f"outside image {image['id']} of {image['width']} x {image['height']} pixels; correct the box or the size"
        )
    return inside if inside[2] > inside[0] and inside[3] > inside[1] else None


def _some(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:SHOWN])
    return shown + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")
