"""Stratified and grouped splits, label subsets, and the check that no part leaks into another.

Everything here is a function of the labels, the groups and a seed. The generator is NumPy's ``RandomState``, whose
stream is frozen, so that a split stays the same whatever version draws it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

PARTS = ("train", "val", "test")
SHOWN = 5


def stratified_split(labels: np.ndarray, val: float, test: float, seed: int) -> dict[str, np.ndarray]:
    """Split rows so that each class has the same share in each part, up to rounding.

    A class of at least three rows has at least one in each part that is not empty by request.

    Args:
        labels: (N,) class indices; -1 counts as a class of its own.
        val: Share of the validation part.
        test: Share of the test part.
        seed: Seed of the draw.

    Returns:
        Sorted rows of ``train``, ``val`` and ``test``.
    """
    random = np.random.RandomState(seed)
    rows: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        n_test, n_val = (_share(len(members), share) for share in (test, val))
        rows["test"].append(members[:n_test])
        rows["val"].append(members[n_test : n_test + n_val])
        rows["train"].append(members[n_test + n_val :])
    return {part: np.sort(np.concatenate(chunks)) for part, chunks in rows.items()}


def grouped_split(labels: np.ndarray, groups: np.ndarray, val: float, test: float, seed: int) -> dict[str, np.ndarray]:
    """Split rows so that no group is torn apart and the classes are as evenly spread as that allows.

    Rows are dealt to equal folds; the folds that mirror the classes best become the test and the validation part, so
    that one large group of a rare class ends up in training.

    Args:
        labels: (N,) class indices.
        groups: (N,) names; rows with an empty name are on their own.
        val: Share of the validation part.
        test: Share of the test part.
        seed: Seed of the draw.

    Returns:
        Sorted rows of ``train``, ``val`` and ``test``.

    Raises:
        ValueError: If there are fewer groups, or images of the largest class, than folds.
    """
    numbers = group_numbers(groups)
    if len(np.unique(numbers)) == len(labels):
        return stratified_split(labels, val, test, seed)
    from sklearn.model_selection import StratifiedGroupKFold

    folds = _number_of_folds(val, test)
    largest = int(np.unique(labels, return_counts=True)[1].max())
    for count, what in ((len(np.unique(numbers)), "groups"), (largest, "images of the largest class")):
        if count < folds:
            raise ValueError(
                f"{count} {what} cannot be spread over {folds} folds, which val_fraction {val} and test_fraction "
                f"{test} need; choose larger fractions or set --data.split random"
            )
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    fold = np.empty(len(labels), dtype=np.int64)
    for number, (_, held_out) in enumerate(splitter.split(np.zeros((len(labels), 1)), labels, numbers)):
        fold[held_out] = number
    n_test, n_val = round(test * folds), round(val * folds)
    typical = _most_typical_first(labels, fold, folds)
    folds_of = {"test": typical[:n_test], "val": typical[n_test : n_test + n_val], "train": typical[n_test + n_val :]}
    return {part: np.flatnonzero(np.isin(fold, folds_of[part])) for part in PARTS}


def group_numbers(groups: np.ndarray) -> np.ndarray:
    """Number the groups; each row with an empty name becomes a group of its own.

    Args:
        groups: (N,) names.

    Returns:
        (N,) int64.
    """
    _, numbers = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    alone = np.asarray(groups, dtype=str) == ""
    numbers[alone] = numbers.max(initial=0) + 1 + np.arange(alone.sum())
    return numbers.astype(np.int64)


def merge_groups(groups: np.ndarray | None, together: Iterable[Sequence[int]], length: int) -> np.ndarray:
    """Join groups that share rows, such as two lesions of which the same file exists.

    Args:
        groups: (N,) names, or None if no row belongs to any.
        together: Lists of rows that belong together.
        length: N.

    Returns:
        (N,) names; rows that belong to nothing have an empty name.
    """
    numbers = np.arange(length) if groups is None else group_numbers(groups)
    parent = list(range(length))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_of: dict[int, int] = {}
    for row, number in enumerate(numbers.tolist()):
        parent[root(row)] = root(first_of.setdefault(number, row))
    for rows in together:
        for row in rows:
            parent[root(row)] = root(rows[0])
    roots = np.array([root(row) for row in range(length)])
    _, inverse, counts = np.unique(roots, return_inverse=True, return_counts=True)
    return np.where(counts[inverse] > 1, np.char.add("group-", roots.astype(str)), "")


def labelled_rows(labels: np.ndarray, fraction: float, per_class: int | None, seed: int) -> np.ndarray:
    """Choose the rows whose labels may be used.

    The choice is nested: the rows of 1 % are among those of 10 %.

    Args:
        labels: (N,) class indices, -1 for unlabelled, which is never chosen.
        fraction: Share of each class, in (0, 1]; at least one row.
        per_class: Number per class instead of a share.
        seed: Seed of the draw.

    Returns:
        Sorted rows.

    Raises:
        ValueError: If a class has fewer rows than asked for.
    """
    random = np.random.RandomState(seed)
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        members = random.permutation(np.flatnonzero(labels == label))
        wanted = per_class if per_class is not None else max(1, round(fraction * len(members)))
        if wanted > len(members):
            raise ValueError(
                f"labels_per_class is {wanted}, but class {label} has {len(members)} training images; "
                f"set --data.labels_per_class to at most {len(members)}"
            )
        chosen.append(members[:wanted])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def check_classes(labels: Mapping[str, np.ndarray], class_names: Sequence[str]) -> None:
    """Refuse parts with a class that training never sees.

    Args:
        labels: Part -> (N,) class indices.
        class_names: Name of each index.

    Raises:
        ValueError: With the names of the classes.
    """
    known = set(labels["train"].tolist())
    for part in ("val", "test"):
        unseen = sorted(set(labels.get(part, np.empty(0, np.int64)).tolist()) - known - {-1})
        if unseen:
            names = ", ".join(class_names[label] for label in unseen[:SHOWN])
            names += f", and {len(unseen) - SHOWN} more" if len(unseen) > SHOWN else ""
            raise ValueError(
                f"split '{part}' has images of {len(unseen)} class(es) without any training image: {names}; "
                "add training images or take these classes out"
            )


def leaks(shared: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
    """Describe what occurs in more than one part.

    Args:
        shared: Content or group -> the (part, id) of each row that has it.

    Returns:
        One line for each that spans several parts.
    """
    found = []
    for rows in shared.values():
        if len({part for part, _ in rows}) > 1:
            one_per_part = dict(reversed(rows))
            found.append(" = ".join(f"{part}: {name}" for part, name in sorted(one_per_part.items())))
    return found


def _share(count: int, share: float) -> int:
    if share == 0 or count < 3:
        return 0
    return max(1, round(count * share))


def _most_typical_first(labels: np.ndarray, fold: np.ndarray, folds: int) -> np.ndarray:
    """Order folds by how far the share of any class in them is from that of an even spread."""
    _, classes = np.unique(labels, return_inverse=True)
    counts = np.zeros((folds, classes.max() + 1))
    np.add.at(counts, (fold, classes), 1)
    deviation = np.abs(counts / counts.sum(axis=0) - 1 / folds).max(axis=1)
    return np.argsort(deviation, kind="stable")


def _number_of_folds(val: float, test: float) -> int:
    for folds in range(2, 101):
        whole = [abs(share * folds - round(share * folds)) < 1e-6 for share in (val, test)]
        if all(whole):
            return folds
    raise ValueError(
        f"val_fraction {val} and test_fraction {test} are no whole numbers of at most 100 folds; "
        "grouped splits need fractions such as 0.1, 0.15 or 0.2"
    )
