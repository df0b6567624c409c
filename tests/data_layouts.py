"""Writers of small data sets in the layouts of the real ones."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
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


def write_class_folders(root: Path) -> Path:
    """Three classes of 12 images and hidden files, ``root/<class>/*``."""
    for label, name in enumerate(("basophil", "eosinophil", "platelet")):
        for number in range(12):
            save_image(root / name / f"{name[:2].upper()}_{number}.jpg", seed=100 * label + number)
    (root / "basophil" / ".DS_169665.jpg").write_bytes(b"not an image")
    (root / ".cache").mkdir()
    save_image(root / ".cache" / "hidden.png", seed=999)
    (root / "basophil" / "notes.txt").write_text("no image")
    return root


def write_part_folders(root: Path) -> Path:
    """Two classes below train, val and test."""
    seed = 0
    for part, count in (("train", 6), ("val", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                save_image(root / part / name / f"{number}.JPEG", seed=seed)
                seed += 1
    return root


def write_medmnist(
    folder: Path, name: str = "cells", channels: int = 3, classes: int = 3, **changes: np.ndarray | None
) -> Path:
    """``<name>.npz`` with the arrays of a MedMNIST archive, changed as asked; None leaves one out."""
    random = np.random.RandomState(0)
    arrays = {}
    for part, count in (("train", 30), ("val", 9), ("test", 12)):
        shape = (count, 28, 28, 3) if channels == 3 else (count, 28, 28)
        arrays[f"{part}_images"] = random.randint(0, 256, shape, dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    arrays.update(changes)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npz"
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_isic(root: Path) -> Path:
    """Sixty images of two lesions of three, some single ones, some without a lesion id; UNK is empty."""
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


def write_aptos(root: Path) -> Path:
    """Sixty fundus-like discs on black, twelve per grade, of different sizes."""
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


def save_mask(path: Path, values: np.ndarray) -> Path:
    """Write one value per pixel as a grey picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def halves(left: int, right: int, size: tuple[int, int], void: int) -> np.ndarray:
    """A mask of (width, height) with one value per half and a first row of void."""
    mask = np.full((size[1], size[0]), left, dtype=np.uint8)
    mask[:, size[0] // 2 :] = right
    mask[0] = void
    return mask


def write_ade20k(root: Path, counts: tuple[int, int] = (6, 3)) -> Path:
    """``ADEChallengeData2016`` with pictures of different sizes; a mask holds 0 for unlabelled and 1..150."""
    folder = root / "ADEChallengeData2016"
    for part, short, count in (("training", "train", counts[0]), ("validation", "val", counts[1])):
        for number in range(1, count + 1):
            name, size = f"ADE_{short}_{number:08d}", (40 + 4 * number, 36)
            save_image(folder / "images" / part / f"{name}.jpg", seed=number + 50 * (short == "val"), size=size)
            mask = halves(number, 151 - number, size, void=0)
            save_mask(folder / "annotations" / part / f"{name}.png", mask)
    lines = [f"{number}\t0.1\t10\t10\t1\tthing {number}, object {number}" for number in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(lines) + "\n")
    return root


def write_camvid(root: Path, counts: tuple[int, int, int] = (6, 3, 3)) -> Path:
    """Lists with the prefix of somebody else's machine that name png files, of which the pictures are jpg."""
    for number, (part, count) in enumerate(zip(("train", "val", "test"), counts, strict=True)):
        lines = []
        for row in range(count):
            name = f"0001TP_{row + 100 * number:06d}"
            save_image(root / part / f"{name}.jpg", seed=row + 100 * number, size=(48, 36))
            save_mask(root / f"{part}annot" / f"{name}.png", halves(row % 11, (row + 3) % 11, (48, 36), void=11))
            lines.append(f"/SegNet/CamVid/{part}/{name}.png /SegNet/CamVid/{part}annot/{name}.png")
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_mask_folder(root: Path, names: list[str], classes: int = 3) -> Path:
    """``images/`` and ``masks/`` with a picture of each name, and ``classes.txt``."""
    for seed, name in enumerate(names):
        save_image(root / "images" / f"{name}.jpg", seed=seed, size=(32, 24))
        save_mask(root / "masks" / f"{name}.png", halves(seed % classes, (seed + 1) % classes, (32, 24), void=255))
    (root / "classes.txt").write_text("\n".join(f"kind {label}" for label in range(classes)) + "\n")
    return root


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_coco(root: Path) -> Path:
    """Eight training and four validation pictures with boxes in COCO's files; three categories whose ids have gaps.

    The first picture of a part has no object; the second of the training part, and one object of the validation part,
    are crowd regions.
    """
    categories = [{"id": 24, "name": "zebra"}, {"id": 1, "name": "person"}, {"id": 10, "name": "traffic light"}]
    for part, count, first in (("train", 8, 100), ("val", 4, 500)):
        images, annotations = [], []
        for number in range(count):
            width, height = 40 + 4 * number, 32
            name = f"{first + 7 * number:012d}.jpg"
            save_image(root / f"{part}2017" / name, seed=first + number, size=(width, height))
            images.append({"id": first + 7 * number, "file_name": name, "width": width, "height": height})
            for place in range(min(number, 2)):
                box = [2.5 + 10 * place, 3.0 + number, 18.0, 12.5]
                crowd = int(place == 0 and number == 1)
                annotations.append({
                    "id": first + 1 + len(annotations), "image_id": images[-1]["id"], "bbox": box, "iscrowd": crowd,
                    "category_id": categories[(number + place) % 3]["id"], "area": box[2] * box[3] / 2,
                })  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": categories}
        file = root / "annotations" / f"instances_{part}2017.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return root


def write_voc(root: Path, augmented: bool = True) -> Path:
    """``VOCdevkit/VOC2012``: pictures 00..09, of which 00..02 and 03..04 are train and val of the original release.

    The original masks are palette pictures, as genuine ones. ``augmented`` adds grey masks of 00..07 in
    ``SegmentationClassAug``; 08 and 09 never have one. Sizes differ; the first row of a mask is void.
    """
    folder = root / "VOCdevkit" / "VOC2012"
    names = [f"2007_{number:06d}" for number in range(10)]
    for number, name in enumerate(names):
        size = (48 + 2 * number, 40)
        save_image(folder / "JPEGImages" / f"{name}.jpg", seed=number, size=size)
        mask = halves(number, 20 - number, size, void=255)
        if number < 5:
            save_palette_mask(folder / "SegmentationClass" / f"{name}.png", mask)
        if augmented and number < 8:
            save_mask(folder / "SegmentationClassAug" / f"{name}.png", mask)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(names[:3]) + "\n")
    (lists / "val.txt").write_text("\n".join(names[3:5]))
    return root


def save_palette_mask(path: Path, values: np.ndarray) -> Path:
    """Write one value per pixel as a picture of mode P, whose colours have nothing to do with the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putdata(values.reshape(-1).tolist())
    image.putpalette([part for index in range(256) for part in (255 - index, index, 7)])
    image.save(path)
    return path


def write_cityscapes(root: Path, masks: str = "gtFine", end: str = "labelIds") -> Path:
    """``leftImg8bit/{train,val}/<city>`` with six and two pictures, and their masks below ``masks`` ("" for the root).

    The halves of mask ``number`` are the classes ``number`` and ``number + 10``, and its first row is void.
    """
    labels = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    places = [("train", "aachen"), ("train", "aachen"), ("train", "ulm"), ("train", "ulm"), ("train", "ulm")]
    places += [("train", "zurich"), ("val", "lindau"), ("val", "munster")]
    for number, (part, city) in enumerate(places):
        name = f"{city}_{number:06d}_000019"
        save_image(root / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png", seed=number, size=(80, 40))
        values = (number, number + 10, 255) if end == "labelTrainIds" else (labels[number], labels[number + 10], 4)
        mask = halves(*values[:2], (80, 40), void=values[2])
        save_mask(root / masks / part / city / f"{name}_gtFine_{end}.png", mask)
    return root


def write_label_split(folder: Path, labeled: list[str], unlabeled: list[str], valid: list[str] | None = None) -> Path:
    """The three lists of PRCL's split folders; the last line has no newline."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, names in (("labeled", labeled), ("unlabeled", unlabeled), ("valid", valid)):
        if names is not None:
            (folder / f"{part}_filename.txt").write_text("\n".join(names))
    return folder
