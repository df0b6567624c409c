"""Which pictures are labelled and which are not: lists on disk, seeded draws, and what may be wrong with them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from datamodules.image_files import is_image
from datamodules.readers.samples import check_distinct, checked_folder, text_lines
from datamodules.readers.segmentation_samples import SegmentationSamples, missing_masks

LIST_FILES = {
    "labeled": ("labeled_filename.txt", "labeled.txt"),
    "unlabeled": ("unlabeled_filename.txt", "unlabeled.txt"),
    "valid": ("valid_filename.txt",),
}


class LabelSplit:
    """The lists of a folder: ``{labeled,unlabeled[,valid]}_filename.txt``, or ``labeled.txt`` and ``unlabeled.txt``.

    A line holds the id of a picture, or its path and (not looked at) that of its mask. Lists of the first kind lie in a
    folder ``<labels>/<seed>``, those of the second often in ``<labels>``: where that is a number, it is checked.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: If the folder or the labelled list is missing.
        ValueError: If a list names a picture twice or none at all, or the labelled one has another length than its
            folder's name says.
    """

    def __init__(self, path: str) -> None:
        self.folder = checked_folder(path, "split_path", "the lists of labelled and unlabelled pictures")
        self.files: dict[str, Path] = {}
        for part, names in LIST_FILES.items():
            found = [self.folder / name for name in names if (self.folder / name).is_file()]
            if found:
                self.files[part] = found[0]
        if "labeled" not in self.files:
            raise FileNotFoundError(f"{self.folder}: {' or '.join(LIST_FILES['labeled'])} is missing")
        self.names = {part: _read_list(file) for part, file in self.files.items()}
        self._check_count()

    def find(self, part: str, pool: SegmentationSamples, *, labelled: bool) -> SegmentationSamples:
        """Return the pictures of a list.

        Args:
            part: ``labeled``, ``unlabeled`` or ``valid``.
            pool: Pictures that may be named.
            labelled: Whether each must have a mask.

        Raises:
            FileNotFoundError: If the list is missing, or pictures or masks of it; says how many, and the first three.
        """
        if part not in self.files:
            raise FileNotFoundError(f"{self.folder}: {' or '.join(LIST_FILES[part])} is missing")
        file, names = self.files[part], self.names[part]
        rows = self._rows(names, pool)
        if lost := [name for name, row in zip(names, rows, strict=True) if row is None]:
            raise FileNotFoundError(
                f"{file}: {len(lost)} of {len(names)} names have no picture in the data set: {_first(lost)}; its "
                f"pictures have names such as '{pool.ids[0]}'. Complete the data, or take lists made for this data set"
            )
        samples = pool.take([row for row in rows if row is not None])
        check_distinct(file, samples.ids)
        if labelled:
            masks = samples.masks or [None] * len(samples)
            lost = [name for name, mask in zip(samples.ids, masks, strict=True) if mask is None]
            if lost:
                raise missing_masks(file, lost, len(samples))
        return samples

    def names_none_of(self, part: str, pool: SegmentationSamples) -> bool:
        """Whether no name of a list is that of a picture."""
        return all(row is None for row in self._rows(self.names[part], pool))

    def _rows(self, names: Sequence[str], pool: SegmentationSamples) -> list[int | None]:
        """Row of each name, which is an id, or a path that is one without its suffix and its first folders."""
        row_of = {name: row for row, name in enumerate(pool.ids)}
        return [next((row_of[end] for end in _ends(name) if end in row_of), None) for name in names]

    def _check_count(self) -> None:
        file, path = self.files["labeled"], self.folder.absolute()
        promised = path.name
        if file.name == LIST_FILES["labeled"][0] and promised.isdecimal() and path.parent.name.isdecimal():
            promised = path.parent.name
        have = len(self.names["labeled"])
        if promised.isdecimal() and int(promised) != have:
            raise ValueError(
                f"{file}: lists {have} pictures, but its folder '{promised}' says {int(promised)}; take the complete "
                "list, or rename the folder"
            )


def draw_labelled(count: int, labelled: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows whose labels may be used; those of a smaller number are among those of a larger one.

    Args:
        count: Number of rows.
        labelled: How many to choose.
        seed: Seed of the draw.

    Returns:
        Sorted rows of the chosen ones and of the rest.

    Raises:
        ValueError: If there are not as many.
    """
    if labelled > count:
        raise ValueError(f"labeled is {labelled}, but the training part has {count} pictures; set at most {count}")
    order = np.random.RandomState(seed).permutation(count)
    return np.sort(order[:labelled]), np.sort(order[labelled:])


def check_disjoint(parts: Mapping[str, SegmentationSamples]) -> None:
    """Refuse a picture that is in two parts: the same file, or where it has none, the same id.

    Args:
        parts: Name of a part, for the message, -> its rows.

    Raises:
        ValueError: Says how many there are, and the first three.
    """
    seen: dict[str, set[str]] = {}
    for name, samples in parts.items():
        own = dict(zip(_identities(samples), samples.ids, strict=True))
        for other, theirs in seen.items():
            if shared := [row_id for identity, row_id in own.items() if identity in theirs]:
                raise ValueError(
                    f"{len(shared)} picture(s) are both {other} and {name}: {_first(shared)}; take them out of one"
                )
        seen[name] = set(own)


def _identities(samples: SegmentationSamples) -> list[str]:
    """What tells a picture from others: its file, or its id where it has none."""
    return [
        str(image.resolve()) if isinstance(image, Path) else name
        for name, image in zip(samples.ids, samples.images, strict=True)
    ]


def _read_list(file: Path) -> list[str]:
    """First word of each line."""
    names = [line.split()[0] for line in text_lines(file)]
    if not names:
        raise ValueError(f"{file}: the list is empty; add names, one a line")
    check_distinct(file, names)
    return names


def _ends(name: str) -> Iterable[str]:
    """The name itself, and its path without suffix, from the whole one to the last part."""
    yield name
    path = PurePosixPath(name)
    parts = (path.with_suffix("") if is_image(path.name) else path).parts
    for first in range(len(parts)):
        yield "/".join(parts[first:])


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
