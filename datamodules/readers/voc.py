"""PASCAL VOC 2012: 20 kinds of objects and background, alone or with the extra masks of SBD."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from datamodules.image_files import locate
from datamodules.readers.samples import check_distinct, existing_folder
from datamodules.readers.segmentation_samples import (
    SegmentationFacts,
    SegmentationSamples,
    distinct_colours,
    missing_masks,
)

CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PLACES = (".", "VOC2012", "VOCdevkit/VOC2012")
AUGMENTED_LISTS = ("train_aug.txt", "trainaug.txt")


class VocReader:
    """Reads ``JPEGImages/ID.jpg`` with the mask ``SegmentationClassAug/ID.png``, else ``SegmentationClass/ID.png``.

    Masks hold 0 for background, 1..20, and 255 for borders; those of the palette kind, as in the original release, are
    read by their index. ``ImageSets/Segmentation/val.txt`` names the validation part. The training part is that of
    ``train_aug.txt`` or ``trainaug.txt`` where all of its masks are there; otherwise all of ``SegmentationClassAug``
    without the validation part; otherwise ``train.txt``. A list may hold ids, or paths of pictures (and of masks, which
    are not looked at). Pictures without any mask are the part ``unlabeled``: lists of others may name them.

    Args:
        root: ``VOC2012``, or a folder that holds ``VOC2012`` or ``VOCdevkit/VOC2012``.

    Raises:
        FileNotFoundError: If a folder, a list, or a file that a list names is missing.
        ValueError: If a list is empty or names a picture twice.
    """

    facts = SegmentationFacts(CLASS_NAMES, image_size=321, palette=((0, 0, 0), *distinct_colours(20)))

    def __init__(self, root: str | None) -> None:
        folder = existing_folder(root, "voc")
        found = [folder / place for place in PLACES if (folder / place / "JPEGImages").is_dir()]
        if not found:
            raise FileNotFoundError(
                f"{folder / 'JPEGImages'} does not exist; set --data.root to the folder VOC2012, or to the one that "
                "holds VOC2012 or VOCdevkit/VOC2012"
            )
        self.root = found[0]
        self.images, self.lists = self.root / "JPEGImages", self.root / "ImageSets" / "Segmentation"
        if not (self.lists / "val.txt").is_file():
            raise FileNotFoundError(f"{self.lists / 'val.txt'} is missing; take the lists of VOC2012's own archive")

    def read(self) -> Mapping[str, SegmentationSamples]:
        """Return ``train``, ``val``, and ``unlabeled`` if there are pictures without a mask."""
        augmented = _masks_by_id(self.root / "SegmentationClassAug")
        masks = _masks_by_id(self.root / "SegmentationClass") | augmented
        val = _read_list(self.lists / "val.txt")
        train, source = self._train_ids(augmented, masks, set(val))
        parts = {"train": self._part(train, masks, source), "val": self._part(val, masks, "val.txt")}
        rest = sorted(path for path in self.images.glob("*.jpg") if path.stem not in masks)
        if rest:
            parts["unlabeled"] = SegmentationSamples([path.stem for path in rest], rest)
        return parts

    def _train_ids(
        self, augmented: Mapping[str, Path], masks: Mapping[str, Path], val: set[str]
    ) -> tuple[list[str], str]:
        """Ids of the training part, and where they come from."""
        for name in AUGMENTED_LISTS:
            if (self.lists / name).is_file():
                ids = _read_list(self.lists / name)
                if augmented or masks.keys() >= set(ids):
                    return ids, name
        if augmented:
            return sorted(augmented.keys() - val), "SegmentationClassAug"
        if not (self.lists / "train.txt").is_file():
            raise FileNotFoundError(f"{self.lists / 'train.txt'} is missing; take the lists of VOC2012's own archive")
        return _read_list(self.lists / "train.txt"), "train.txt"

    def _part(self, ids: Sequence[str], masks: Mapping[str, Path], source: str) -> SegmentationSamples:
        images = locate(self.images, ids, source)
        if lost := [name for name in ids if name not in masks]:
            raise missing_masks(self.root, [f"SegmentationClass*/{name}.png" for name in lost], len(ids))
        return SegmentationSamples(ids, images, [masks[name] for name in ids])


def _masks_by_id(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.png")}


def _read_list(path: Path) -> list[str]:
    """Ids of a list: the first word of each line, without folder and suffix."""
    words = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not words:
        raise ValueError(f"{path}: the list is empty; take the lists of VOC2012's own archive")
    ids = [PurePosixPath(word).stem for word in words]
    check_distinct(path, ids)
    return ids
