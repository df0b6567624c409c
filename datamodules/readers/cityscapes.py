"""Cityscapes: 19 classes of street scenes in German-speaking cities."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from datamodules.readers.samples import check_distinct, existing_folder
from datamodules.readers.segmentation_samples import SegmentationFacts, SegmentationSamples, missing_masks

PARTS = ("train", "val")
IMAGE_END = "_leftImg8bit.png"
LAST_LABEL = 33


class StreetClass(NamedTuple):
    """A class that the benchmark evaluates.

    Args:
        label: Its value in ``_gtFine_labelIds.png``.
        colour: Red, green, blue in 0..255.
    """

    label: int
    colour: tuple[int, int, int]


CLASSES = {
    "road": StreetClass(7, (128, 64, 128)),
    "sidewalk": StreetClass(8, (244, 35, 232)),
    "building": StreetClass(11, (70, 70, 70)),
    "wall": StreetClass(12, (102, 102, 156)),
    "fence": StreetClass(13, (190, 153, 153)),
    "pole": StreetClass(17, (153, 153, 153)),
    "traffic light": StreetClass(19, (250, 170, 30)),
    "traffic sign": StreetClass(20, (220, 220, 0)),
    "vegetation": StreetClass(21, (107, 142, 35)),
    "terrain": StreetClass(22, (152, 251, 152)),
    "sky": StreetClass(23, (70, 130, 180)),
    "person": StreetClass(24, (220, 20, 60)),
    "rider": StreetClass(25, (255, 0, 0)),
    "car": StreetClass(26, (0, 0, 142)),
    "truck": StreetClass(27, (0, 0, 70)),
    "bus": StreetClass(28, (0, 60, 100)),
    "train": StreetClass(31, (0, 80, 100)),
    "motorcycle": StreetClass(32, (0, 0, 230)),
    "bicycle": StreetClass(33, (119, 11, 32)),
}
TRAIN_IDS = SegmentationFacts(
    tuple(CLASSES), image_size=512, palette=tuple(street_class.colour for street_class in CLASSES.values())
)
LABELS = tuple(street_class.label for street_class in CLASSES.values())
LABEL_IDS = SegmentationFacts(
    TRAIN_IDS.class_names,
    TRAIN_IDS.image_size,
    TRAIN_IDS.palette,
    class_values=LABELS,
    void_values=tuple(sorted(set(range(LAST_LABEL + 1)) - set(LABELS))),
)
MASK_ENDS = {"_gtFine_labelIds.png": LABEL_IDS, "_gtFine_labelTrainIds.png": TRAIN_IDS}


class CityscapesReader:
    """Reads ``leftImg8bit/{train,val}/<city>/*_leftImg8bit.png`` with masks below ``gtFine`` or the root itself.

    Masks are ``{train,val}/<city>/*_gtFine_labelIds.png``, whose values become class indices when they are read, or
    ``*_gtFine_labelTrainIds.png``, which hold the indices. The first picture decides for all of them. The pictures of
    ``test`` have no public labels and are left out.

    Args:
        root: The folder of ``leftImg8bit``.

    Raises:
        FileNotFoundError: If a folder or a mask is missing.
        ValueError: If pictures of two cities have one name.
    """

    def __init__(self, root: str | None) -> None:
        self.root = existing_folder(root, "cityscapes")
        self.images = self.root / "leftImg8bit"
        first = next(iter(self._pictures("train")))
        places = [(folder, end) for folder in (self.root / "gtFine", self.root) for end in MASK_ENDS]
        found = [place for place in places if self._mask(first, *place).is_file()]
        if not found:
            raise FileNotFoundError(
                f"{first}: no mask of it found; expected {self._mask(first, *places[0])} (unpack "
                "gtFine_trainvaltest.zip beside leftImg8bit)"
            )
        self.mask_folder, self.mask_end = found[0]
        self.facts = MASK_ENDS[self.mask_end]

    def read(self) -> Mapping[str, SegmentationSamples]:
        """Return ``train`` and ``val``."""
        return {part: self._part(part) for part in PARTS}

    def _part(self, part: str) -> SegmentationSamples:
        images = self._pictures(part)
        ids = [image.stem for image in images]
        check_distinct(self.images / part, ids, "rename one of each, with its mask")
        masks = [self._mask(image, self.mask_folder, self.mask_end) for image in images]
        if lost := [str(mask) for mask in masks if not mask.is_file()]:
            raise missing_masks(self.mask_folder, lost, len(masks))
        return SegmentationSamples(ids, images, masks)

    def _pictures(self, part: str) -> list[Path]:
        images = sorted((self.images / part).glob(f"*/*{IMAGE_END}"))
        if not images:
            raise FileNotFoundError(
                f"{self.images / part}: no <city>/*{IMAGE_END} found; set --data.root to the folder that holds "
                "leftImg8bit"
            )
        return images

    def _mask(self, image: Path, folder: Path, end: str) -> Path:
        name = image.name.removesuffix(IMAGE_END) + end
        return folder / image.relative_to(self.images).with_name(name)
