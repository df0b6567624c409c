import numpy as np
import pytest

from datamodules.readers.isic2019 import LABELS, METADATA, Isic2019Reader
from tests.data_layouts import ISIC_CLASSES


def change(path, line, old, new):
    lines = path.read_text().splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines) + "\n")


def test_the_challenge_files_are_read_as_they_are(isic_folder):
    reader = Isic2019Reader(str(isic_folder))
    assert reader.facts.class_names == ISIC_CLASSES[:8]
    assert reader.facts.main_metric == "balanced_acc"
    samples = reader.read()["all"]
    assert samples.labels.tolist() == [(number // 3) % 8 for number in range(60)]
    assert samples.ids[10] == "ISIC_0000010_downsampled"
    assert samples.paths[10].endswith("ISIC_0000010_downsampled.jpg")
    assert samples.groups[:4].tolist() == ["BCN_0000000", "BCN_0000000", "BCN_0000000", "BCN_0000001"]
    assert samples.groups[14] == ""


def test_whole_numbers_and_decimals_mean_the_same(isic_folder):
    before = Isic2019Reader(str(isic_folder)).labels[1]
    table = isic_folder / LABELS
    table.write_text(table.read_text().replace("0.0", "0").replace("1.0", "1"))
    assert np.array_equal(Isic2019Reader(str(isic_folder)).labels[1], before)


def test_the_class_unknown_stays_when_it_is_used(isic_folder):
    change(isic_folder / LABELS, 5, "0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0", "0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0")
    assert Isic2019Reader(str(isic_folder)).facts.class_names == ISIC_CLASSES


@pytest.mark.parametrize(
    ("new", "shown"),
    [
        ("0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0", "MEL=0.0, NV=0.0"),
        ("0.0,1.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0", "NV=1.0, BCC=1.0"),
        ("0.0,0.5,0.0,0.0,0.0,0.0,0.0,0.0,0.0", "NV=0.5"),
        ("0.0,,0.0,0.0,0.0,0.0,0.0,0.0,0.0", "NV=,"),
    ],
)
def test_a_row_that_is_not_one_hot_is_named(isic_folder, new, shown):
    change(isic_folder / LABELS, 5, "0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0", new)
    with pytest.raises(ValueError, match=r"row 4, line 5, image ISIC_0000003: expected exactly one 1") as caught:
        assert Isic2019Reader(str(isic_folder)).facts
    assert shown in str(caught.value)
    assert "(1 such row(s))" in str(caught.value)


def test_an_unknown_column_is_named(isic_folder):
    table = isic_folder / LABELS
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",ANGIOMA", *(line + ",0.0" for line in lines[1:])]))
    with pytest.raises(
        ValueError, match=r"unknown column\(s\) ANGIOMA \(in row 1, line 2, image ISIC_0000000_downsampled: 0\.0"
    ):
        assert Isic2019Reader(str(isic_folder)).facts


def test_a_missing_column_is_named(isic_folder):
    change(isic_folder / LABELS, 1, "UNK", "OTHER")
    with pytest.raises(ValueError, match=r"column\(s\) UNK missing; found image, .*OTHER"):
        assert Isic2019Reader(str(isic_folder)).facts


def test_missing_images_are_counted(isic_folder):
    for number in (1, 2, 3, 4):
        (isic_folder / "ISIC_2019_Training_Input" / f"ISIC_{number:07d}.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"4 of 60 images are missing on disk: .*ISIC_0000001.*ISIC_2019_Training_Input"
    ):
        Isic2019Reader(str(isic_folder)).read()


def test_images_in_a_nested_folder_are_found(isic_folder):
    folder = isic_folder / "ISIC_2019_Training_Input"
    folder.rename(isic_folder / "moved")
    folder.mkdir()
    (isic_folder / "moved").rename(folder / "ISIC_2019_Training_Input")
    assert len(Isic2019Reader(str(isic_folder)).read()["all"]) == 60


def test_without_lesions_the_message_offers_a_random_split(isic_folder):
    (isic_folder / METADATA).unlink()
    with pytest.raises(FileNotFoundError, match=r"Metadata\.csv does not exist; .*--data\.split random"):
        Isic2019Reader(str(isic_folder))
    assert Isic2019Reader(str(isic_folder), with_lesions=False).read()["all"].groups is None


def test_an_image_twice_is_refused(isic_folder):
    change(isic_folder / LABELS, 5, "ISIC_0000003", "ISIC_0000002")
    with pytest.raises(ValueError, match=r"image 'ISIC_0000002' occurs twice \(row 3, line 4 and row 4, line 5\)"):
        assert Isic2019Reader(str(isic_folder)).facts


def test_predictions_are_the_nine_columns_of_the_challenge(isic_folder):
    table = Isic2019Reader(str(isic_folder)).predictions(["ISIC_0000001"], np.full((1, 8), 0.125))
    values = ",".join(["0.125"] * 8)
    assert table.to_csv(index=False) == f"image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\nISIC_0000001,{values},0.0\n"
