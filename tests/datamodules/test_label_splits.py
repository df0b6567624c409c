"""Lists of labelled and unlabelled pictures: formats, seeded draws, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.label_splits import LabelSplit, check_disjoint, draw_labelled
from datamodules.readers.segmentation_samples import SegmentationSamples
from tests.data_layouts import write_label_split

POOL = SegmentationSamples(
    ["a", "b", "deep/c", "d_leftImg8bit", "e"],
    [Path(f"/data/images/{name}.jpg") for name in ("a", "b", "deep/c", "d_leftImg8bit", "e")],
    [Path("/data/masks/x.png")] * 4 + [None],
)


def found(folder, part, labelled=False):
    return list(LabelSplit(str(folder)).find(part, POOL, labelled=labelled).ids)


def test_the_official_format_without_a_final_newline(tmp_path):
    folder = write_label_split(tmp_path / "2/3407", ["b", "a"], ["deep/c"], ["d_leftImg8bit"])
    assert not (folder / "labeled_filename.txt").read_text().endswith("\n")
    assert found(folder, "labeled", labelled=True) == ["b", "a"]
    assert found(folder, "unlabeled") == ["deep/c"]
    assert found(folder, "valid") == ["d_leftImg8bit"]


def test_two_columns_of_paths(tmp_path):
    """As UniMatch lists VOC and Cityscapes; the second column is not looked at."""
    (tmp_path / "labeled.txt").write_text(
        "JPEGImages/a.jpg SegmentationClass/a.png\nimages/deep/c.jpg masks/deep/c.png\n"
        "leftImg8bit/train/ulm/d_leftImg8bit.png gtFine/train/ulm/d_gtFine_labelTrainIds.png\n"
    )
    (tmp_path / "unlabeled.txt").write_text("b\n\n")
    assert found(tmp_path, "labeled", labelled=True) == ["a", "deep/c", "d_leftImg8bit"]
    assert found(tmp_path, "unlabeled") == ["b"]


def test_a_list_of_another_data_set(tmp_path):
    folder = write_label_split(tmp_path, ["a", "2007_1", "2007_2", "2007_3", "2007_4"], ["b"])
    message = (
        r"labeled_filename.txt: 4 of 5 names have no picture in the data set: 2007_1, 2007_2, 2007_3, \.\.\.; .*'a'"
    )
    with pytest.raises(FileNotFoundError, match=message):
        found(folder, "labeled")


def test_a_labelled_picture_without_a_mask(tmp_path):
    folder = write_label_split(tmp_path, ["a", "e"], ["b"])
    with pytest.raises(FileNotFoundError, match=r"1 of 2 pictures have no mask: e is missing"):
        found(folder, "labeled", labelled=True)
    assert found(folder, "labeled") == ["a", "e"]


@pytest.mark.parametrize("part", ["labeled", "unlabeled", "valid"])
def test_an_empty_list(tmp_path, part):
    lists = {"labeled": ["a"], "unlabeled": ["b"], "valid": ["e"], part: []}
    with pytest.raises(ValueError, match=rf"{part}_filename.txt: the list is empty"):
        LabelSplit(str(write_label_split(tmp_path, **lists)))


def test_a_missing_list(tmp_path):
    folder = write_label_split(tmp_path, ["a"], ["b"])
    (folder / "unlabeled_filename.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"unlabeled_filename.txt or unlabeled.txt is missing"):
        found(folder, "unlabeled")
    (folder / "labeled_filename.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"labeled_filename.txt or labeled.txt is missing"):
        LabelSplit(str(folder))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data.split_path '.*nowhere' does not exist"):
        LabelSplit(str(tmp_path / "nowhere"))


def test_a_name_twice(tmp_path):
    with pytest.raises(ValueError, match=r"labeled_filename.txt: names 2 picture\(s\) twice: b, a; keep one line each"):
        LabelSplit(str(write_label_split(tmp_path, ["b", "a", "b", "a", "e"], ["d"])))


def test_a_picture_twice_under_two_names(tmp_path):
    with pytest.raises(ValueError, match=r"labeled_filename.txt: names 1 picture\(s\) twice: a; keep"):
        found(write_label_split(tmp_path, ["a", "JPEGImages/a.jpg"], ["b"]), "labeled")


@pytest.mark.parametrize(("folder", "promised"), [("46/0", 46), ("46/3407", 46), ("92", 92), ("voc/662", 662)])
def test_a_folder_that_promises_another_number(tmp_path, folder, promised):
    lists = write_label_split(tmp_path / folder, ["a", "b"], ["e"])
    with pytest.raises(ValueError, match=rf"labeled_filename.txt: lists 2 pictures, but its folder '{promised}' says"):
        LabelSplit(str(lists))


@pytest.mark.parametrize("folder", ["2/0", "2/3407", "2", "1_8", "few", "few/2"])
def test_a_folder_that_promises_what_it_holds(tmp_path, folder):
    assert found(write_label_split(tmp_path / folder, ["a", "b"], ["e"]), "labeled") == ["a", "b"]


def test_a_number_above_the_folder_of_two_columns_means_nothing(tmp_path):
    folder = tmp_path / "2012" / "2"
    folder.mkdir(parents=True)
    (folder / "labeled.txt").write_text("a\nb\n")
    assert found(folder, "labeled") == ["a", "b"]


def test_smaller_draws_are_among_larger_ones():
    draws = {count: draw_labelled(40, count, seed=5) for count in (1, 7, 20, 40)}
    for count, (labelled, rest) in draws.items():
        assert len(labelled) == count
        assert sorted([*labelled, *rest]) == list(range(40))
        assert (np.diff(labelled) > 0).all()
    assert set(draws[1][0]) < set(draws[7][0]) < set(draws[20][0])
    assert draw_labelled(40, 7, seed=5)[0].tolist() == draws[7][0].tolist() != draw_labelled(40, 7, seed=6)[0].tolist()


def test_more_labels_than_pictures():
    with pytest.raises(ValueError, match="labeled is 41, but the training part has 40 pictures; set at most 40"):
        draw_labelled(40, 41, seed=0)


def test_a_picture_in_two_parts(tmp_path):
    def files(*names):
        return SegmentationSamples(list(names), [tmp_path / f"{name}.jpg" for name in names])

    check_disjoint({"labelled": files("a", "b"), "unlabelled": files("c"), "validation": files("d")})
    with pytest.raises(ValueError, match=r"1 picture\(s\) are both labelled and unlabelled: b; take them out of one"):
        check_disjoint({"labelled": files("a", "b"), "unlabelled": files("c", "b")})
    many = [f"x{number}" for number in range(5)]
    with pytest.raises(
        ValueError, match=r"5 picture\(s\) are both unlabelled and validation: x0, x1, x2, \.\.\.; take"
    ):
        check_disjoint({"labelled": files("a"), "unlabelled": files(*many), "validation": files("a1", *many)})
    pixels = [np.zeros((2, 2, 3), np.uint8)]
    with pytest.raises(ValueError, match="both labelled and test: a"):
        check_disjoint({"labelled": SegmentationSamples(["a"], pixels), "test": SegmentationSamples(["a"], pixels)})
