import shutil

import numpy as np
import pytest

from datamodules.readers.folder import FolderReader
from tests.data_layouts import save_image, write_csv

HEADER = ["path", "class", "label", "split"]


def table_of(root, changes=None):
    """A split.csv for the class folders: number 0..7 train, 8, 9 val, 10, 11 test."""
    rows = [list(HEADER)]
    for label, name in enumerate(("basophil", "eosinophil", "platelet")):
        for number in range(12):
            split = "train" if number < 8 else "val" if number < 10 else "test"
            rows.append([f"{name}/{name[:2].upper()}_{number}.jpg", name, label, split])
    for row, column, value in changes or ():
        rows[row][column] = value
    write_csv(root / "split.csv", rows)
    return root


def test_class_folders_become_one_part(class_folders):
    reader = FolderReader(str(class_folders), "colour")
    parts = reader.read()
    assert reader.facts.class_names == ("basophil", "eosinophil", "platelet")
    assert list(parts) == ["all"]
    assert np.bincount(parts["all"].labels).tolist() == [12, 12, 12]
    for name, label, path in zip(parts["all"].ids, parts["all"].labels, parts["all"].paths, strict=True):
        assert name.split("/")[0] == reader.facts.class_names[label]
        assert path == str(class_folders / name)


def test_folders_inside_a_class_are_read(class_folders):
    save_image(class_folders / "platelet" / "patient 7" / "a.jpg", seed=1234)
    parts = FolderReader(str(class_folders), "colour").read()
    assert "platelet/patient 7/a.jpg" in parts["all"].ids.tolist()


def test_part_folders_become_parts(part_folders):
    reader = FolderReader(str(part_folders), "photographs")
    parts = reader.read()
    assert reader.facts.class_names == ("cat", "dog")
    assert {part: np.bincount(samples.labels).tolist() for part, samples in parts.items()} == {
        "test": [2, 2],
        "train": [6, 6],
        "val": [3, 3],
    }


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_validation_folders_have_several_names(part_folders, name):
    (part_folders / "val").rename(part_folders / name)
    assert len(FolderReader(str(part_folders), "photographs").read()["val"]) == 6


def test_a_class_may_be_called_test(tmp_path):
    for name in ("test", "control"):
        save_image(tmp_path / name / "a.png", seed=len(name))
    assert FolderReader(str(tmp_path), "colour").facts.class_names == ("control", "test")


def test_a_heap_of_images_is_unlabelled(tmp_path):
    for number in range(5):
        save_image(tmp_path / f"{number}.png", seed=number)
    reader = FolderReader(str(tmp_path), "colour")
    assert reader.facts.class_names == ()
    assert reader.read()["all"].labels.tolist() == [-1] * 5


def test_a_table_decides_parts_and_labels(class_folders):
    reader = FolderReader(str(table_of(class_folders)), "colour")
    parts = reader.read()
    assert {part: len(samples) for part, samples in parts.items()} == {"train": 24, "val": 6, "test": 6}
    assert parts["test"].ids.tolist()[:2] == ["basophil/BA_10.jpg", "basophil/BA_11.jpg"]


def test_a_table_orders_classes_by_label(class_folders):
    changes = [(1 + 12 * c + n, 2, 2 - c) for c in range(3) for n in range(12)]
    reader = FolderReader(str(table_of(class_folders, changes)), "colour")
    assert reader.facts.class_names == ("platelet", "eosinophil", "basophil")
    assert reader.read()["test"].labels.tolist() == [2, 2, 1, 1, 0, 0]


def test_a_table_may_hold_unlabelled_rows(class_folders):
    reader = FolderReader(str(table_of(class_folders, [(1, 1, ""), (1, 2, "")])), "colour")
    assert reader.read()["train"].labels.tolist()[:3] == [-1, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(5, 2, "x")], r"split\.csv: column 'label' has 'x', expected a whole number 0\.\.2 \(row 5, line 6\)"),
        ([(5, 2, "3")], r"column 'label' has '3', expected a whole number 0\.\.2 \(row 5, line 6\)"),
        ([(5, 2, "")], r"column 'label' has an empty field, expected a whole number 0\.\.2 \(row 5, line 6\)"),
        ([(5, 2, "1.0"), (7, 2, "2.0")], r"has '1\.0', expected .* \(row 5, line 6; 1 more like it\)"),
        ([(5, 2, "1")], r"do not match one to one: basophil=0, basophil=1"),
        ([(5, 3, "training")], r"column 'split' has 'training', expected train, val or test \(row 5, line 6\)"),
        ([(5, 0, "basophil/BA_0.jpg")], r"path 'basophil/BA_0\.jpg' occurs twice \(row 1, line 2 and row 5, line 6\)"),
        ([(5, 0, "basophil/none.jpg")], r"split\.csv: 1 of 36 images are missing on disk: .*basophil/none\.jpg"),
        ([(0, 3, "part")], r"column\(s\) split missing; found path, class, label, part"),
    ],
)
def test_a_wrong_table_is_refused_with_its_row(class_folders, changes, message):
    table_of(class_folders, changes)
    reader = FolderReader(str(class_folders), "colour")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        reader.read()


def test_an_empty_table_is_refused(class_folders):
    write_csv(class_folders / "split.csv", [HEADER])
    with pytest.raises(ValueError, match=r"split\.csv: has a header but no row"):
        assert FolderReader(str(class_folders), "colour").facts
    (class_folders / "split.csv").write_text("")
    with pytest.raises(ValueError, match=r"split\.csv: is no CSV table"):
        assert FolderReader(str(class_folders), "colour").facts


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data\.root '.*/nowhere' does not exist .*layout 'folder'"):
        FolderReader(str(tmp_path / "nowhere"), "colour")


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"--data\.root '.*/file' is a file"):
        FolderReader(str(tmp_path / "file"), "colour")


def test_no_root_at_all_is_named():
    with pytest.raises(ValueError, match=r"layout 'folder' reads a folder: set --data\.root to it"):
        FolderReader(None, "colour")


def test_an_empty_folder_says_what_it_expects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image found; expected <class>/\*, .* with suffix \.bmp \.jpeg"):
        FolderReader(str(tmp_path), "colour")


def test_class_folders_without_any_image_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="no image found"):
        FolderReader(str(tmp_path), "colour").read()


def test_one_empty_class_folder_is_named(class_folders):
    (class_folders / "__MACOSX").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image in class folder\(s\) __MACOSX; fill or remove"):
        FolderReader(str(class_folders), "colour").read()


def test_predictions_have_a_column_per_class(class_folders):
    table = FolderReader(str(class_folders), "colour").predictions(["a.jpg", "b.jpg"], np.eye(3)[:2])
    assert table.to_csv(index=False) == "path,basophil,eosinophil,platelet\na.jpg,1.0,0.0,0.0\nb.jpg,0.0,1.0,0.0\n"


def test_a_part_without_class_folders_is_left_out(part_folders):
    shutil.rmtree(part_folders / "test")
    save_image(part_folders / "test" / "x.png", seed=99)
    with pytest.warns(UserWarning, match=r"no class folders in test, left out; --data\.predict_path"):
        found = FolderReader(str(part_folders), "colour").read()
    assert "train" in found
    assert "test" not in found


def test_an_empty_class_folder_in_one_part_is_named(part_folders):
    (part_folders / "val" / "bird").mkdir()
    with pytest.raises(FileNotFoundError, match=r"pictures/val: no image in class folder\(s\) bird; fill or remove"):
        FolderReader(str(part_folders), "photographs").read()


def test_a_class_that_validation_lacks_is_told(part_folders):
    shutil.rmtree(part_folders / "val" / "dog")
    with pytest.warns(UserWarning, match=r"part 'val' lacks 1 of 2 classes, dog; its results say nothing about them"):
        parts = FolderReader(str(part_folders), "photographs").read()
    assert parts["val"].labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_validation_images_without_class_folders_are_refused(part_folders, name):
    """As the archive of ImageNet's validation images is unpacked."""
    shutil.rmtree(part_folders / "val")
    save_image(part_folders / name / "ILSVRC2012_val_00000001.JPEG", seed=99)
    with pytest.raises(ValueError, match=rf"pictures/{name}: images without class folders, .* into {name}/<class>"):
        FolderReader(str(part_folders), "photographs")
