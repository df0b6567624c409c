from collections import Counter

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from datamodules.splits import (
    check_classes,
    group_numbers,
    grouped_split,
    labelled_rows,
    leaks,
    merge_groups,
    stratified_split,
)

LABELS = np.repeat([0, 1, 2, 3], [100, 57, 20, 3])


def test_stratified_split_gives_each_class_its_share():
    parts = stratified_split(LABELS, val=0.1, test=0.2, seed=0)
    for label, count in Counter(LABELS.tolist()).items():
        counts = {part: sum(LABELS[row] == label for row in rows) for part, rows in parts.items()}
        expected = {"val": max(1, round(count * 0.1)), "test": max(1, round(count * 0.2))}
        assert counts == {**expected, "train": count - sum(expected.values())}


def test_stratified_split_covers_every_row_once():
    parts = stratified_split(LABELS, val=0.1, test=0.1, seed=3)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(LABELS)))


def test_stratified_split_depends_on_the_seed_alone():
    first, again, other = (stratified_split(LABELS, 0.1, 0.1, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[part], again[part]) for part in first)
    assert not np.array_equal(first["test"], other["test"])


def test_stratified_split_is_the_same_on_every_machine():
    parts = stratified_split(np.arange(40) % 2, 0.1, 0.1, seed=0)
    assert parts["test"].tolist() == [2, 3, 23, 36]
    assert parts["val"].tolist() == [16, 35, 37, 38]


def test_stratified_split_leaves_a_part_out_that_has_no_share():
    parts = stratified_split(LABELS, val=0.1, test=0.0, seed=0)
    assert len(parts["test"]) == 0
    assert len(parts["val"]) == 10 + 6 + 2 + 1


def test_grouped_split_keeps_groups_together_and_classes_balanced():
    random = np.random.RandomState(0)
    groups, labels = [], []
    for group in range(400):
        label = random.choice(4, p=[0.6, 0.2, 0.15, 0.05])
        for _ in range(random.randint(1, 5)):
            groups.append(f"lesion {group}" if group % 7 else "")
            labels.append(label)
    groups, labels = np.array(groups), np.array(labels)
    parts = grouped_split(labels, groups, val=0.1, test=0.1, seed=0)
    seen = {part: {groups[row] for row in rows} - {""} for part, rows in parts.items()}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    assert sum(len(rows) for rows in parts.values()) == len(labels)
    for part, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        for label in range(4):
            found = np.mean(np.isin(np.flatnonzero(labels == label), parts[part]))
            assert found == pytest.approx(share, abs=0.05)


def test_grouped_split_takes_shares_of_several_folds():
    groups = np.array([f"g{row // 2}" for row in range(400)])
    parts = grouped_split(np.arange(400) // 2 % 2, groups, val=0.15, test=0.25, seed=0)
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 240, "val": 60, "test": 100}


def test_a_large_group_of_a_rare_class_goes_to_training():
    labels = np.concatenate([np.zeros(300, int), np.ones(60, int)])
    groups = np.array([f"g{row // 2}" for row in range(330)] + ["large"] * 30)
    for seed in range(10):
        parts = grouped_split(labels, groups, val=0.1, test=0.1, seed=seed)
        assert set(range(330, 360)) <= set(parts["train"].tolist())
        assert all(2 <= labels[parts[part]].sum() <= 6 for part in ("val", "test"))


def test_grouped_split_without_groups_is_the_stratified_one():
    grouped = grouped_split(LABELS, np.full(len(LABELS), ""), 0.1, 0.1, seed=0)
    plain = stratified_split(LABELS, 0.1, 0.1, seed=0)
    assert all(np.array_equal(grouped[part], plain[part]) for part in plain)


def test_grouped_split_refuses_odd_shares():
    with pytest.raises(ValueError, match=r"val_fraction 0\.1234567 .* fractions such as 0\.1, 0\.15 or 0\.2"):
        grouped_split(np.zeros(4, int), np.array(["a", "a", "b", "b"]), 0.1234567, 0.1, seed=0)


def test_grouped_split_refuses_too_few_groups():
    with pytest.raises(ValueError, match="2 groups cannot be spread over 10 folds"):
        grouped_split(np.zeros(4, int), np.array(["a", "a", "b", "b"]), 0.1, 0.1, seed=0)


def test_grouped_split_refuses_classes_smaller_than_the_folds():
    labels, groups = np.arange(30) % 4, np.array(["a", "a"] + [""] * 28)
    with pytest.raises(ValueError, match="8 images of the largest class cannot be spread over 10 folds, which val_fr"):
        grouped_split(labels, groups, 0.1, 0.1, seed=0)
    assert sum(len(rows) for rows in grouped_split(labels, groups, 0.2, 0.2, seed=0).values()) == 30


def test_rows_without_a_group_are_numbered_apart():
    numbers = group_numbers(np.array(["b", "", "a", "b", ""]))
    assert numbers[0] == numbers[3]
    assert len(set(numbers.tolist())) == 4


def test_merged_groups_are_the_connected_components():
    random = np.random.RandomState(0)
    groups = np.array([f"g{number}" if number else "" for number in random.randint(0, 30, 60)])
    together = [random.choice(60, 3, replace=False).tolist() for _ in range(8)]
    edges = [(rows[0], row) for rows in together for row in rows]
    edges += [(a, b) for a in range(60) for b in range(60) if groups[a] and groups[a] == groups[b]]
    _, expected = connected_components(coo_matrix((np.ones(len(edges)), np.array(edges).T), shape=(60, 60)))
    merged = merge_groups(groups, together, 60)
    for a in range(60):
        for b in range(a):
            assert (merged[a] == merged[b] and merged[a] != "") == (expected[a] == expected[b])


def test_merging_nothing_leaves_rows_on_their_own():
    assert merge_groups(None, [], 5).tolist() == [""] * 5


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.01, [1, 1, 1, 1]), (0.1, [10, 6, 2, 1]), (1.0, [100, 57, 20, 3])]
)
def test_a_label_fraction_holds_its_share_of_each_class(fraction, expected):
    rows = labelled_rows(LABELS, fraction, None, seed=0)
    assert [int((LABELS[rows] == label).sum()) for label in range(4)] == expected


def test_small_label_fractions_are_part_of_larger_ones():
    one, ten = (set(labelled_rows(LABELS, fraction, None, seed=0).tolist()) for fraction in (0.01, 0.1))
    three = set(labelled_rows(LABELS, 1.0, 3, seed=0).tolist())
    assert one <= three
    assert one <= ten
    assert len(three) == 12


def test_unlabelled_rows_are_never_chosen():
    labels = np.array([-1, 0, -1, 1, 0])
    assert labelled_rows(labels, 1.0, None, seed=0).tolist() == [1, 3, 4]
    assert labelled_rows(np.full(3, -1), 1.0, None, seed=0).tolist() == []


def test_more_labels_than_images_are_refused():
    with pytest.raises(ValueError, match=r"labels_per_class is 4, but class 3 has 3 training images; set .* at most 3"):
        labelled_rows(LABELS, 1.0, 4, seed=0)


def test_a_class_that_training_never_sees_is_named():
    labels = {"train": np.array([0, 0]), "val": np.array([0, 2, -1]), "test": np.array([0])}
    with pytest.raises(
        ValueError, match=r"split 'val' has images of 1 class\(es\) without any training image: platelet"
    ):
        check_classes(labels, ["basophil", "ig", "platelet"])
    check_classes({**labels, "val": np.array([0, -1])}, ["basophil", "ig", "platelet"])


def test_leaks_name_one_image_of_each_part():
    shared = {
        "a": [("train", "1.jpg"), ("train", "2.jpg")],
        "b": [("train", "3.jpg"), ("test", "4.jpg"), ("train", "5.jpg")],
    }
    assert leaks(shared) == ["test: 4.jpg = train: 3.jpg"]
