"""PASCAL VOC 2012: which pictures belong to which part, and what its masks say."""

import numpy as np
import pytest
from PIL import Image

from datamodules import SemanticSegmentation
from datamodules.readers.voc import VocReader
from tests.data_layouts import save_image, save_palette_mask, write_voc

NAMES = [f"2007_{number:06d}" for number in range(10)]


def ids(root):
    return {part: list(samples.ids) for part, samples in VocReader(str(root)).read().items()}


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_the_root_may_be_the_folder_or_one_above(tmp_path, place):
    write_voc(tmp_path)
    assert ids(tmp_path / place)["val"] == NAMES[3:5]


def test_augmented_masks_without_a_list_are_all_but_the_validation_part(tmp_path):
    assert ids(write_voc(tmp_path)) == {
        "train": [NAMES[number] for number in (0, 1, 2, 5, 6, 7)],
        "val": NAMES[3:5],
        "unlabeled": NAMES[8:],
    }


@pytest.mark.parametrize("name", ["train_aug.txt", "trainaug.txt"])
def test_a_list_of_the_augmented_part(tmp_path, name):
    """Ids, or two paths with a leading slash as in the list of DeepLab."""
    lists = write_voc(tmp_path) / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / name).write_text(f"{NAMES[5]}\n/JPEGImages/{NAMES[1]}.jpg /SegmentationClassAug/{NAMES[1]}.png\n")
    assert ids(tmp_path)["train"] == [NAMES[5], NAMES[1]]


def test_the_original_release_alone(tmp_path):
    root = write_voc(tmp_path, augmented=False)
    expected = {"train": NAMES[:3], "val": NAMES[3:5], "unlabeled": NAMES[5:]}
    assert ids(root) == expected
    # A list of the augmented part is of no use without its masks.
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt").write_text("\n".join(NAMES[:8]))
    assert ids(root) == expected


def test_augmented_masks_may_lie_among_the_original_ones(tmp_path):
    folder = write_voc(tmp_path, augmented=False) / "VOCdevkit/VOC2012"
    for number in (5, 6):
        save_palette_mask(folder / f"SegmentationClass/{NAMES[number]}.png", np.zeros((40, 48 + 2 * number)))
    (folder / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join([*NAMES[:3], *NAMES[5:7]]))
    assert ids(tmp_path)["train"] == [*NAMES[:3], *NAMES[5:7]]


def test_a_palette_mask_and_a_grey_one_mean_the_same(tmp_path):
    root = write_voc(tmp_path, augmented=False)
    assert Image.open(root / f"VOCdevkit/VOC2012/SegmentationClass/{NAMES[3]}.png").mode == "P"
    palette = SemanticSegmentation("voc", str(root), num_workers=0)
    grey = SemanticSegmentation("voc", str(write_voc(tmp_path / "augmented")), num_workers=0)
    for number, (one, other) in enumerate(zip(palette.val_dataloader(), grey.val_dataloader(), strict=True), 3):
        assert one.masks.equal(other.masks)
        assert one.images.shape == (1, 3, 40, 48 + 2 * number)
        assert (one.masks[0, 0] == 255).all()
        assert one.masks[0, 1:].unique().tolist() == [number, 20 - number]


def test_an_augmented_mask_wins(tmp_path):
    folder = write_voc(tmp_path) / "VOCdevkit/VOC2012"
    save_palette_mask(folder / f"SegmentationClass/{NAMES[0]}.png", np.full((40, 48), 7))
    train = VocReader(str(tmp_path)).read()["train"]
    assert train.masks[0] == folder / f"SegmentationClassAug/{NAMES[0]}.png"


def test_facts(tmp_path):
    data = SemanticSegmentation("voc", str(write_voc(tmp_path)))
    assert data.num_classes == 21
    assert (data.class_names[0], data.class_names[15], data.class_names[20]) == ("background", "person", "tvmonitor")
    # The colours of the development kit.
    assert data.palette[0] == [0, 0, 0]
    assert data.palette[15] == [192, 128, 128]
    assert data.palette[20] == [0, 64, 128]
    assert data.mask_to_file(np.array([[0, 20, 255]])).tolist() == [[0, 20, 255]]


def test_a_picture_that_a_list_names_and_the_disk_lacks(tmp_path):
    folder = write_voc(tmp_path) / "VOCdevkit/VOC2012"
    for number in (3, 4):
        (folder / f"JPEGImages/{NAMES[number]}.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"val.txt: 2 of 2 images are missing on disk: .*{NAMES[3]}.*{NAMES[4]}"
    ):
        ids(tmp_path)


def test_a_mask_that_a_list_names_and_the_disk_lacks(tmp_path):
    lists = write_voc(tmp_path) / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "val.txt").write_text(f"{NAMES[3]}\n{NAMES[9]}\n")
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 pictures have no mask: SegmentationClass\*/{NAMES[9]}.png"):
        ids(tmp_path)


def test_an_empty_list(tmp_path):
    (write_voc(tmp_path) / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val.txt: the list is empty"):
        ids(tmp_path)


@pytest.mark.parametrize("name", ["val.txt", "train.txt"])
def test_a_list_that_names_a_picture_twice(tmp_path, name):
    """By its id and by its path."""
    lists = write_voc(tmp_path, augmented=False) / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    first = (lists / name).read_text().split()[0]
    (lists / name).write_text(f"{first}\n{NAMES[4]}\n/JPEGImages/{first}.jpg\n")
    with pytest.raises(ValueError, match=rf"/{name}: names 1 picture\(s\) twice: {first}; keep one line each"):
        ids(tmp_path)


@pytest.mark.parametrize("name", ["val.txt", "train.txt"])
def test_a_missing_list(tmp_path, name):
    (write_voc(tmp_path, augmented=False) / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{name}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing; take the lists of VOC2012's own archive"):
        ids(tmp_path)


def test_another_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"JPEGImages does not exist; set --data.root to the folder VOC2012"):
        VocReader(str(tmp_path))


def test_a_mask_whose_palette_was_converted_to_colours(tmp_path):
    root = write_voc(tmp_path, augmented=False)
    save_image(root / f"VOCdevkit/VOC2012/SegmentationClass/{NAMES[3]}.png", seed=0, size=(54, 40))
    with pytest.raises(ValueError, match=rf"{NAMES[3]}.png: has 3 channels, expected one with a class index per pixel"):
        list(SemanticSegmentation("voc", str(root), num_workers=0).val_dataloader())
