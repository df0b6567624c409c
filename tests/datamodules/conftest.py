"""Small data sets written in the layouts of the real ones."""

import csv
import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ISIC_CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")


def save_image(path: Path, seed: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Path:
    """Write a picture of smooth noise; no two seeds give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = 3 if mode == "RGB" else 1
    noise = np.random.RandomState(seed).randint(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(noise if channels == 3 else noise[..., 0], mode=None)
    image.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Three classes of 12 images and hidden files, ``root/<class>/*``."""
    root = tmp_path / "cells"
    for label, name in enumerate(("basophil", "eosinophil", "platelet")):
        for number in range(12):
            save_image(root / name / f"{name[:2].upper()}_{number}.jpg", seed=100 * label + number)
    (root / "basophil" / ".DS_169665.jpg").write_bytes(b"not an image")
    (root / ".cache").mkdir()
    save_image(root / ".cache" / "hidden.png", seed=999)
    (root / "basophil" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def part_folders(tmp_path: Path) -> Path:
    """Two classes below train, val and test."""
    root = tmp_path / "pictures"
    seed = 0
    for part, count in (("train", 6), ("val", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                save_image(root / part / name / f"{number}.JPEG", seed=seed)
                seed += 1
    return root


@pytest.fixture
def medmnist_file(tmp_path: Path) -> Callable[..., Path]:
    """Write ``<name>.npz`` with the arrays of a MedMNIST archive, changed as asked."""

    def write(name: str = "cells", channels: int = 3, **changes: np.ndarray | None) -> Path:
        random = np.random.RandomState(0)
        arrays = {}
        for part, count in (("train", 30), ("val", 9), ("test", 12)):
            shape = (count, 28, 28, 3) if channels == 3 else (count, 28, 28)
            arrays[f"{part}_images"] = random.randint(0, 256, shape, dtype=np.uint8)
            arrays[f"{part}_labels"] = (np.arange(count) % 3).astype(np.uint8)[:, None]
        arrays.update(changes)
        path = tmp_path / f"{name}.npz"
        np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write


@pytest.fixture
def isic_folder(tmp_path: Path) -> Path:
    """Sixty images of two lesions of three, some single ones, some without a lesion id; UNK is empty."""
    root = tmp_path / "isic"
    labels, metadata = [["image", *ISIC_CLASSES]], [["image", "age_approx", "anatom_site_general", "lesion_id", "sex"]]
    for number in range(60):
        name = f"ISIC_{number:07d}" + ("_downsampled" if number % 10 == 0 else "")
        save_image(root / "ISIC_2019_Training_Input" / f"{name}.jpg", seed=number)
        label = (number // 3) % 8
        labels.append([name, *(float(label == column) for column in range(9))])
        lesion = "" if number % 15 == 14 else f"BCN_{number // 3:07d}"
        metadata.append([name, 55.0, "anterior torso", lesion, "female"])
    write_csv(root / "ISIC_2019_Training_GroundTruth.csv", labels)
    write_csv(root / "ISIC_2019_Training_Metadata.csv", metadata)
    return root


@pytest.fixture
def aptos_folder(tmp_path: Path) -> Path:
    """Sixty fundus-like discs on black, twelve per grade, of different sizes."""
    root = tmp_path / "aptos"
    rows: list[list[object]] = [["id_code", "diagnosis"]]
    for number in range(60):
        width, height = 40 + number % 5 * 6, 30 + number % 3 * 4
        picture = np.zeros((height, width, 3), dtype=np.uint8)
        y, x = np.mgrid[:height, :width]
        disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 2 - 4) ** 2
        picture[disc] = (200, 90 + number, 40)
        name = f"{number:012x}"
        (root / "train_images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / "train_images" / f"{name}.png")
        rows.append([name, number % 5])
    write_csv(root / "train.csv", rows)
    return root


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


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
