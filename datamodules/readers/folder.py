"""Images in folders: one folder per class, the same below train/val/test, or a plain heap of unlabelled images."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.image_files import IMAGE_SUFFIXES, is_image, list_folders, list_images, missing_images
from datamodules.readers.label_tables import check_unique, class_index, read_table, row_name
from datamodules.readers.samples import Facts, Samples, Subject, class_columns, existing_folder

if TYPE_CHECKING:
    from pandas import DataFrame

PART_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_TABLE = "split.csv"
SPLIT_COLUMNS = ("path", "class", "label", "split")
SHOWN = 5


class FolderReader:
    """Reads ``root/<class>/*``, ``root/{train,val,test}/<class>/*`` or ``root/*``; hidden files are skipped.

    With ``root/split.csv`` (columns ``path,class,label,split``; class and label empty for an unlabelled image) the
    table decides which file belongs to which class and part, and other files are left out.

    Args:
        root: The folder.
        subject: What the images show.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no image.
    """

    id_column = "path"
    published_split = False

    def __init__(self, root: str | None, subject: Subject) -> None:
        self.root = existing_folder(root, "folder")
        self.subject = subject
        self._part_folders = self._find_parts()
        if not self._has_table and not any(True for _ in self._class_folders()) and not self._loose_images():
            raise self._nothing_found()

    @cached_property
    def facts(self) -> Facts:
        """Class names from the table, otherwise from the names of the folders."""
        grey = self.subject == "grey"
        normalisation = {"mean": (0.5,), "std": (0.5,)} if grey else {}
        return Facts(
            class_names=self._class_names(),
            image_size=224,
            channels=1 if grey else 3,
            subject=self.subject,
            crop_ratio=0.875,
            in_memory=False,
            **normalisation,
        )

    def prepare(self) -> None:
        """Nothing to do: the images are on disk."""

    def read(self) -> dict[str, Samples]:
        """Return the parts that the table or the folders define, otherwise one part ``all``."""
        if self._has_table:
            return self._read_table()
        if self._part_folders:
            parts: dict[str, list[Samples]] = {}
            for folder, part in self._part_folders.items():
                parts.setdefault(part, []).append(self._read_classes(self.root / folder))
            whole = {part: Samples.concatenate(found) for part, found in parts.items()}
            self._tell_missing_classes(whole)
            return whole
        return {"all": self._read_classes(self.root)}

    def predictions(self, ids: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """Return ``path`` and one column per class."""
        return class_columns(self.id_column, ids, self.facts.class_names, probabilities)

    @property
    def _has_table(self) -> bool:
        return (self.root / SPLIT_TABLE).is_file()

    def _find_parts(self) -> dict[str, str]:
        """Sub-folders named after a part, if they hold folders or are the only ones; a class may be called 'test'."""
        folders = list_folders(self.root)
        named = {folder.name: PART_FOLDERS[folder.name] for folder in folders if folder.name in PART_FOLDERS}
        if self._has_table or not named:
            return {}
        with_classes = {name: part for name, part in named.items() if list_folders(self.root / name)}
        left_out = sorted(set(named) - set(with_classes))
        flat = [name for name in left_out if named[name] == "val" and list_images(self.root / name)]
        if with_classes and flat:
            raise ValueError(
                f"{self.root / flat[0]}: images without class folders, so their labels are unknown; sort them into "
                f"{flat[0]}/<class>/, list all files in {SPLIT_TABLE} ({','.join(SPLIT_COLUMNS)}), or move it away"
            )
        if with_classes and left_out:
            rank_zero_warn(
                f"{self.root}: no class folders in {', '.join(left_out)}, left out; "
                "--data.predict_path predicts such images"
            )
        return with_classes

    def _class_folders(self) -> list[Path]:
        parents = [self.root / name for name in self._part_folders] or [self.root]
        return [folder for parent in parents for folder in list_folders(parent)]

    def _loose_images(self) -> list[Path]:
        if self._part_folders:
            return []
        return sorted(path for path in self.root.iterdir() if path.is_file() and is_image(path.name))

    def _class_names(self) -> tuple[str, ...]:
        if self._has_table:
            table = read_table(self.root / SPLIT_TABLE, SPLIT_COLUMNS)
            return self._names_in(table)
        return tuple(sorted({folder.name for folder in self._class_folders()}))

    def _names_in(self, table: "DataFrame") -> tuple[str, ...]:
        """Order the class names by their labels, which must be 0..C-1, each with one name."""
        path = self.root / SPLIT_TABLE
        labelled = table[table["class"] != ""]
        pairs = labelled[["class", "label"]].drop_duplicates()
        labels = class_index(labelled["label"], labelled["class"].nunique(), path)
        for column in ("class", "label"):
            twice = pairs[pairs[column].duplicated(keep=False)]
            if len(twice):
                clash = ", ".join(f"{name}={label}" for name, label in twice.itertuples(index=False))
                raise ValueError(f"{path}: classes and labels do not match one to one: {clash}")
        by_label = dict(zip(labels.tolist(), labelled["class"], strict=True))
        return tuple(by_label[label] for label in sorted(by_label))

    def _read_table(self) -> dict[str, Samples]:
        path = self.root / SPLIT_TABLE
        table = read_table(path, SPLIT_COLUMNS)
        names = self._names_in(table)
        check_unique(table["path"], path)
        parts = table["split"].str.strip().map(PART_FOLDERS)
        if parts.isna().any():
            row = int(np.argmax(parts.isna()))
            value = table["split"].iloc[row]
            raise ValueError(
                f"{path}: column 'split' has '{value}', expected train, val or test ({row_name(row, path)})"
            )
        files = [self.root / name for name in table["path"]]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise missing_images(self.root, missing, len(files), SPLIT_TABLE)
        everything = Samples(
            ids=table["path"].to_numpy(dtype=str),
            labels=class_index(table["label"], len(names), path, allow_empty=True),
            paths=np.array([str(file) for file in files]),
        )
        return {part: everything.take(np.flatnonzero(parts == part)) for part in dict.fromkeys(parts)}

    def _read_classes(self, parent: Path) -> Samples:
        """Read the classes below ``parent``, or the images in it if there is no class at all."""
        names = self.facts.class_names
        by_class = {names.index(folder.name): list_images(folder) for folder in list_folders(parent)}
        labelled = [(file, label) for label, files in by_class.items() for file in files]
        found = labelled or [(file, -1) for file in self._loose_images()]
        if not found:
            raise self._nothing_found()
        empty = [names[label] for label, files in by_class.items() if not files]
        if empty:
            raise FileNotFoundError(
                f"{parent}: no image in class folder(s) {', '.join(empty)}; fill or remove the folder(s)"
            )
        files = [file for file, _ in found]
        return Samples(
            ids=np.array([file.relative_to(self.root).as_posix() for file in files]),
            labels=np.array([label for _, label in found], dtype=np.int64),
            paths=np.array([str(file) for file in files]),
        )

    def _tell_missing_classes(self, parts: dict[str, Samples]) -> None:
        """Say which classes of the training part another part lacks."""
        names = self.facts.class_names
        for part in sorted(parts.keys() - {"train"}) if "train" in parts else ():
            missing = sorted(set(parts["train"].labels) - set(parts[part].labels))
            if missing:
                rank_zero_warn(
                    f"{self.root}: part '{part}' lacks {len(missing)} of {len(names)} classes, "
                    f"{_some([names[label] for label in missing])}; its results say nothing about them"
                )

    def _nothing_found(self) -> FileNotFoundError:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        return FileNotFoundError(
            f"{self.root}: no image found; expected <class>/*, {{train,val,test}}/<class>/* or images without classes, "
            f"with suffix {suffixes}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
