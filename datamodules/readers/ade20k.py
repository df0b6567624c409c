"""ADE20K as in the scene parsing benchmark: 150 classes, 20 210 and 2 000 pictures."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from datamodules.image_files import list_images
from datamodules.readers.samples import check_distinct, existing_folder
from datamodules.readers.segmentation_samples import SegmentationFacts, SegmentationSamples, paired_masks

CLASSES = 150
FOLDER = "ADEChallengeData2016"
PARTS = {"train": "training", "val": "validation"}
NAMES_FILE = "objectInfo150.txt"


class Ade20kReader:
    """Reads ``{images,annotations}/{training,validation}``; masks hold 0 for unlabelled and 1..150.

    Args:
        root: The folder ``ADEChallengeData2016``, or the one that holds it.

    Raises:
        FileNotFoundError: If a folder or a mask is missing, or a part is empty.
        ValueError: If two pictures of a part have one name.
    """

    def __init__(self, root: str | None) -> None:
        folder = existing_folder(root, "ade20k")
        self.root = folder / FOLDER if (folder / FOLDER).is_dir() else folder
        for parent in ("images", "annotations"):
            for part in PARTS.values():
                if not (self.root / parent / part).is_dir():
                    raise FileNotFoundError(
                        f"{self.root / parent / part} does not exist; set --data.root to the unpacked {FOLDER} with "
                        "{images,annotations}/{training,validation}"
                    )

    @cached_property
    def facts(self) -> SegmentationFacts:
        """The benchmark's 150 classes; their names are read from the file that comes with the data."""
        return SegmentationFacts(self._class_names(), image_size=512, first_value=1, void_values=(0,))

    def read(self) -> Mapping[str, SegmentationSamples]:
        """Return ``train`` and ``val``."""
        parts = {}
        for part, name in PARTS.items():
            folder = self.root / "images" / name
            images = list_images(folder)
            if not images:
                raise FileNotFoundError(f"{folder}: no picture found; unpack the data set again")
            ids = [image.stem for image in images]
            check_distinct(folder, ids, "rename one of each, with its mask")
            masks = paired_masks(images, folder, self.root / "annotations" / name)
            parts[part] = SegmentationSamples(ids, images, masks)
        return parts

    def _class_names(self) -> tuple[str, ...]:
        """First synonym of each class, from the last column of the table, or numbers without it."""
        path: Path = self.root / NAMES_FILE
        if not path.is_file():
            return tuple(f"class {number}" for number in range(1, CLASSES + 1))
        lines = path.read_text().splitlines()[1:]
        names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())
        if len(names) != CLASSES:
            raise ValueError(f"{path}: names {len(names)} classes, expected {CLASSES} lines below the heading")
        return names
