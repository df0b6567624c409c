"""Pictures in one folder and masks of the same names in another."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.image_files import list_images
from datamodules.readers.folder import PART_FOLDERS
from datamodules.readers.samples import check_distinct, existing_folder, text_lines
from datamodules.readers.segmentation_samples import (
    MAX_CLASSES,
    SegmentationFacts,
    SegmentationSamples,
    paired_masks,
)

NAMES_FILE = "classes.txt"


class MaskFolderReader:
    """Reads ``images/**`` with ``masks/**.png`` (or ``.PNG``); a mask holds a class index per pixel, 255 for void.

    The parts come from sub-folders ``images/{train,val,test}``, or from lists ``{train,val,test}.txt`` with one name
    (without suffix) per line, or are left to be drawn. Class names come from ``classes.txt``, one per line.

    Args:
        root: The folder.
        classes: Number of classes, needed without ``classes.txt``.

    Raises:
        FileNotFoundError: If a folder, a picture or a mask is missing.
        ValueError: If the classes are not given, or given twice and not alike, or if a list names a picture twice or
            none at all.
    """

    def __init__(self, root: str | None, classes: int | None = None) -> None:
        self.root = existing_folder(root, "folder")
        self.images, self.masks = self.root / "images", self.root / "masks"
        for folder in (self.images, self.masks):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} does not exist; layout 'folder' expects pictures in images/ and masks of the same names "
                    "in masks/"
                )
        self._class_names = self._names(classes)

    @cached_property
    def facts(self) -> SegmentationFacts:
        """Class names from the file, otherwise numbers."""
        return SegmentationFacts(self._class_names, image_size=512)

    def read(self) -> Mapping[str, SegmentationSamples]:
        """Return the parts that folders or lists define, otherwise one part ``all``."""
        images = list_images(self.images)
        if not images:
            raise FileNotFoundError(f"{self.images}: no picture found")
        ids = [image.relative_to(self.images).with_suffix("").as_posix() for image in images]
        if len(set(ids)) != len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise ValueError(f"{self.images}: two pictures are called '{twice}'; they cannot share one mask")
        everything = SegmentationSamples(ids, images, paired_masks(images, self.images, self.masks))
        self._check_masks_without_pictures(ids)
        tops = [name.split("/")[0] for name in ids]
        if all(top in PART_FOLDERS and top != name for top, name in zip(tops, ids, strict=True)):
            parts = [PART_FOLDERS[top] for top in tops]
            return {
                part: everything.take([row for row, found in enumerate(parts) if found == part])
                for part in dict.fromkeys(parts)
            }
        lists = {PART_FOLDERS[path.stem]: path for path in self.root.glob("*.txt") if path.stem in PART_FOLDERS}
        return {part: self._listed(everything, path) for part, path in lists.items()} or {"all": everything}

    def _check_masks_without_pictures(self, ids: list[str]) -> None:
        masks = [mask.relative_to(self.masks).with_suffix("").as_posix() for mask in list_images(self.masks)]
        if alone := sorted(set(masks) - set(ids)):
            rank_zero_warn(
                f"{self.masks}: {len(alone)} of {len(masks)} masks have no picture in {self.images} and are left out: "
                f"{', '.join(alone[:3])}{', ...' if len(alone) > 3 else ''}"
            )

    def _listed(self, everything: SegmentationSamples, path: Path) -> SegmentationSamples:
        rows = {name: row for row, name in enumerate(everything.ids)}
        names = text_lines(path)
        unknown = [name for name in names if name not in rows]
        if unknown:
            raise FileNotFoundError(
                f"{path}: {len(unknown)} of {len(names)} names have no picture in {self.images}: "
                f"{', '.join(unknown[:3])}; a line is the name of a picture without its suffix"
            )
        if not names:
            raise ValueError(f"{path}: the list is empty; add names or take the list away")
        check_distinct(path, names)
        return everything.take([rows[name] for name in names])

    def _names(self, classes: int | None) -> tuple[str, ...]:
        path = self.root / NAMES_FILE
        if path.is_file():
            names = tuple(text_lines(path))
            if classes not in (None, len(names)):
                raise ValueError(
                    f"{path}: names {len(names)} classes, but --data.classes is {classes}; set one of them"
                )
            classes = len(names)
        elif classes is None:
            raise ValueError(
                f"{self.root}: write {NAMES_FILE} with one class name per line, or give the number of classes with "
                "--data.classes"
            )
        else:
            names = tuple(f"class {label}" for label in range(classes))
        if not 2 <= classes <= MAX_CLASSES:
            raise ValueError(f"{self.root}: {classes} classes, expected 2..{MAX_CLASSES}")
        return names
