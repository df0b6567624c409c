"""CamVid as in the SegNet tutorial: 11 classes of street scenes, three lists of frames."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from datamodules.image_files import IMAGE_SUFFIXES, missing_images
from datamodules.readers.samples import check_distinct, existing_folder
from datamodules.readers.segmentation_samples import SegmentationFacts, SegmentationSamples, missing_masks

PARTS = ("train", "val", "test")
COLOURS = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}


class CamvidReader:
    """Reads ``{train,val,test}.txt``, whose lines hold the path of a picture and of its mask; 11 is void.

    Of each path only the last two parts count, since the lists go round with the prefix of their author's machine; a
    picture may have any suffix.

    Args:
        root: The folder of the lists.

    Raises:
        FileNotFoundError: If a list is missing, or a file it names.
        ValueError: If a line does not hold two paths, or a list holds none, or a picture twice.
    """

    facts = SegmentationFacts(
        tuple(COLOURS), image_size=320, palette=tuple(COLOURS.values()), void_values=(len(COLOURS),)
    )

    def __init__(self, root: str | None) -> None:
        self.root = existing_folder(root, "camvid")
        missing = [f"{part}.txt" for part in PARTS if not (self.root / f"{part}.txt").is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.root}: {', '.join(missing)} is missing; set --data.root to the folder of CamVid's lists"
            )

    def read(self) -> Mapping[str, SegmentationSamples]:
        """Return ``train``, ``val`` and ``test``."""
        return {part: self._read_list(self.root / f"{part}.txt") for part in PARTS}

    def _read_list(self, path: Path) -> SegmentationSamples:
        pairs = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            names = line.split()
            if not names:
                continue
            if len(names) != 2 or any(len(PurePosixPath(name).parts) < 2 for name in names):
                raise ValueError(
                    f"{path}: line {number} is '{line}', expected the path of a picture and that of its mask, with a "
                    "space between them, such as /any/prefix/train/NAME.png /any/prefix/trainannot/NAME.png"
                )
            pairs.append([self.root.joinpath(*PurePosixPath(name).parts[-2:]) for name in names])
        if not pairs:
            raise ValueError(f"{path}: the list is empty; add lines or take the whole data set again")
        ids = [image.stem for image, _ in pairs]
        check_distinct(path, ids)
        images = [_with_any_suffix(image) for image, _ in pairs]
        masks = [mask for _, mask in pairs]
        if lost := [str(image) for image in images if not image.is_file()]:
            raise missing_images(self.root, lost, len(images), path.name)
        if lost := [str(mask) for mask in masks if not mask.is_file()]:
            raise missing_masks(self.root, lost, len(masks))
        return SegmentationSamples(ids, images, masks)


def _with_any_suffix(image: Path) -> Path:
    """The file itself, or one that differs in the suffix alone."""
    if image.is_file():
        return image
    others = (image.with_suffix(suffix) for suffix in sorted(IMAGE_SUFFIXES))
    return next((other for other in others if other.is_file()), image)
