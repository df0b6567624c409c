"""Small data sets written in the layouts of the real ones."""

import io
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.data_layouts import write_aptos, write_class_folders, write_isic, write_medmnist, write_part_folders


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "cells")


@pytest.fixture
def part_folders(tmp_path: Path) -> Path:
    return write_part_folders(tmp_path / "pictures")


@pytest.fixture
def medmnist_file(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_medmnist, tmp_path)


@pytest.fixture
def isic_folder(tmp_path: Path) -> Path:
    return write_isic(tmp_path / "isic")


@pytest.fixture
def aptos_folder(tmp_path: Path) -> Path:
    return write_aptos(tmp_path / "aptos")


@pytest.fixture
def cifar_archive(tmp_path: Path) -> Callable[..., Path]:
    """Write an archive with the files of CIFAR-10 or CIFAR-100, twenty images per batch."""

    def write(classes: int = 10, folder: Path = tmp_path / "cifar", **batch_changes: object) -> Path:
        random = np.random.RandomState(classes)
        names = [f"class {label}" for label in range(classes)]
        if classes == 10:
            inside, meta, names_key, labels_key = "cifar-10-batches-py", "batches.meta", "label_names", "labels"
            batches = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        else:
            inside, meta, names_key, labels_key = "cifar-100-python", "meta", "fine_label_names", "fine_labels"
            batches = ["train", "test"]
        count = 20 if classes == 10 else 300
        files = {meta: {names_key: names}}
        for batch in batches:
            data = random.randint(0, 256, (count, 3072), dtype=np.uint8)
            files[batch] = {"data": data, labels_key: [row % classes for row in range(count)], **batch_changes}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"cifar-{classes}-python.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                data = pickle.dumps(content, protocol=2)
                entry = tarfile.TarInfo(f"{inside}/{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return path

    return write
