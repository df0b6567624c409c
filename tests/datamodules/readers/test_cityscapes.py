"""Cityscapes: two places and two kinds of masks."""

import numpy as np
import pytest

from datamodules import SemanticSegmentation
from datamodules.readers.cityscapes import LABEL_IDS, CityscapesReader
from tests.data_layouts import halves, save_image, save_mask, write_cityscapes

LAYOUTS = [(masks, end) for masks in ("gtFine", "") for end in ("labelIds", "labelTrainIds")]


def data(root):
    return SemanticSegmentation("cityscapes", str(root), num_workers=0)


@pytest.mark.parametrize(("masks", "end"), LAYOUTS)
def test_masks_are_class_indices_in_each_layout(tmp_path, masks, end):
    module = data(write_cityscapes(tmp_path, masks, end))
    assert module.sample_ids("train")[0] == "aachen_000000_000019_leftImg8bit"
    assert module.sample_ids("val") == ["lindau_000006_000019_leftImg8bit", "munster_000007_000019_leftImg8bit"]
    assert len(module.sample_ids("train")) == 6
    for number, batch in enumerate(module.val_dataloader(), 6):
        assert batch.images.shape == (1, 3, 40, 80)
        assert (batch.masks[0, 0] == 255).all()
        assert (batch.masks[0, 1:, :40] == number).all()
        assert (batch.masks[0, 1:, 40:] == number + 10).all()


def test_the_genuine_folder_comes_first(tmp_path):
    write_cityscapes(tmp_path, "", "labelTrainIds")
    write_cityscapes(tmp_path, "gtFine", "labelIds")
    assert CityscapesReader(str(tmp_path)).read()["val"].masks[0].relative_to(tmp_path).parts[0] == "gtFine"
    assert data(tmp_path).reader.facts is LABEL_IDS


def test_every_label_of_the_benchmark(tmp_path):
    """The table of the official scripts: everything but 19 labels is ignored."""
    by_label = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    by_label |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    values = np.array([[*range(34), 255]], dtype=np.uint8)
    expected = [[by_label.get(label, 255) for label in (*range(34), 255)]]
    assert LABEL_IDS.class_indices(values, "a mask").tolist() == expected
    assert LABEL_IDS.class_indices(values.astype(np.int32), "a mask").tolist() == expected
    back = LABEL_IDS.file_values(np.array([[*range(19), 255]]))
    assert back.dtype == np.uint8
    assert back.tolist() == [[*sorted(by_label), 255]]


@pytest.mark.parametrize(("end", "value"), [("labelIds", 26), ("labelTrainIds", 13)])
def test_what_is_written_has_the_values_that_were_read(tmp_path, end, value):
    assert data(write_cityscapes(tmp_path, end=end)).mask_to_file(np.array([[13]])).tolist() == [[value]]


def test_facts(tmp_path):
    module = data(write_cityscapes(tmp_path))
    assert module.num_classes == 19
    assert (module.class_names[0], module.class_names[13], module.class_names[18]) == ("road", "car", "bicycle")
    assert module.palette[13] == [0, 0, 142]
    assert module.image_size == 512


@pytest.mark.parametrize(
    ("end", "value", "allowed"),
    [
        (
            "labelIds",
            34,
            r"7..8, 11..13, 17, 19..28, 31..33 for a class or 0..6, 9..10, 14..16, 18, 29..30, 255 for void",
        ),
        ("labelTrainIds", 19, r"0..18 for a class or 255 for void"),
        ("labelTrainIds", 33, r"0..18 for a class or 255 for void"),
    ],
)
def test_a_value_that_stands_for_nothing(tmp_path, end, value, allowed):
    write_cityscapes(tmp_path, end=end)
    path = tmp_path / f"gtFine/val/munster/munster_000007_000019_gtFine_{end}.png"
    save_mask(path, halves(value, 7, (80, 40), void=255))
    with pytest.raises(
        ValueError, match=rf"munster_000007.*: pixel \(row 1, column 0\) has the value {value}, .*{allowed}"
    ):
        list(data(tmp_path).val_dataloader())


@pytest.mark.parametrize("values", [np.array([[300]], np.uint16), np.array([[-2]], np.int32)])
def test_a_value_that_fits_no_byte(values):
    with pytest.raises(ValueError, match=rf"a mask: pixel \(row 0, column 0\) has the value {values[0, 0]}, expected"):
        LABEL_IDS.class_indices(values, "a mask")


def test_a_missing_mask(tmp_path):
    write_cityscapes(tmp_path)
    (tmp_path / "gtFine/train/ulm/ulm_000003_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 6 pictures have no mask: .*ulm_000003_000019_gtFine_labelIds.png"
    ):
        data(tmp_path).setup("fit")


def test_pictures_of_two_cities_of_one_name(tmp_path):
    name = "ulm_000003_000019"
    write_cityscapes(tmp_path)
    save_image(tmp_path / f"leftImg8bit/train/aachen/{name}_leftImg8bit.png", seed=9, size=(80, 40))
    with pytest.raises(
        ValueError, match=rf"leftImg8bit/train: names 1 picture\(s\) twice: {name}_.*; rename one of each"
    ):
        data(tmp_path).setup("fit")


def test_no_masks_at_all(tmp_path):
    write_cityscapes(tmp_path, masks="elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"aachen_000000_.*: no mask of it found; expected .*gtFine/train/aachen"
    ):
        data(tmp_path)


def test_another_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"leftImg8bit/train: no <city>/\*_leftImg8bit.png found; set --data.root"
    ):
        data(tmp_path)
