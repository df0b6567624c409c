"""From what a reader found to train, validation and test parts that do not leak into one another."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.image_files import same_content
from datamodules.readers.samples import Samples
from datamodules.splits import PARTS, grouped_split, leaks, merge_groups, stratified_split

Split = Literal["auto", "given", "grouped", "random"]


def divide(found: Mapping[str, Samples], split: Split, seed: int, val: float, test: float) -> dict[str, Samples]:
    """Keep the parts that came with the data, or divide everything anew.

    Args:
        found: What a reader returned: some of ``train``, ``val`` and ``test``, or ``all``.
        split: See :class:`datamodules.images.ImageDataModule`.
        seed: Seed of a new split.
        val: Share of the validation part in a new split.
        test: Share of the test part in a new split.

    Returns:
        The parts. A validation part that is missing is cut from the training part; a missing test part stays missing.

    Raises:
        ValueError: If the split that comes with the data is asked for and there is none.
    """
    if split == "given" and "all" in found:
        raise ValueError("--data.split given: this data set comes without a split; set auto, grouped or random")
    if "all" in found or split in ("grouped", "random"):
        return _anew(Samples.concatenate(list(found.values())), split, seed, val, test)
    if "train" in found and "val" not in found:
        rank_zero_info(f"no validation part: {val:.0%} of the training part is set aside")
        return {**found, **_anew(found["train"], split, seed, val, 0.0 if "test" in found else test)}
    return dict(found)


def labelled_only(parts: Mapping[str, Samples]) -> dict[str, Samples]:
    """Leave unlabelled images out.

    Raises:
        ValueError: If a part has no labelled image.
    """
    kept = {part: samples.take(samples.labels >= 0) for part, samples in parts.items()}
    empty = [part for part, samples in kept.items() if not len(samples)]
    if empty:
        raise ValueError(f"split '{empty[0]}' has no labelled image; only --data.augment pretrain works without labels")
    return kept


def check_leaks(parts: Mapping[str, Samples], published: bool, allowed: bool) -> None:
    """Refuse parts that share an image or a group.

    Args:
        parts: The parts.
        published: The publisher fixed them: what they share is said and left, so that results stay comparable.
        allowed: The user knows; said and left.

    Raises:
        ValueError: With the number of images or groups and three examples.
    """
    found = leaks(_owners(parts))
    if not found:
        return
    text = f"{len(found)} image(s) or group(s) are in more than one split, such as {'; '.join(found[:3])}"
    if published:
        rank_zero_warn(f"{text}; this is so in the published data set and is left as it is")
    elif allowed:
        rank_zero_warn(f"{text}; used as they are, as allow_leakage is set")
    else:
        raise ValueError(f"{text}; set --data.split grouped to split anew, or --data.allow_leakage true to go on")


def _anew(samples: Samples, split: Split, seed: int, val: float, test: float) -> dict[str, Samples]:
    if split == "random":
        rows = stratified_split(samples.labels, val, test, seed)
    else:
        groups = merge_groups(samples.groups, _identical([samples]).values(), len(samples))
        rows = grouped_split(samples.labels, groups, val, test, seed)
    return {part: samples.take(rows[part]) for part in PARTS if part != "test" or test}


def _identical(parts: Sequence[Samples]) -> dict[str, list[int]]:
    """Content -> rows, counted through all parts, for images that occur more than once."""
    if parts[0].paths is not None:
        return same_content([path for samples in parts for path in samples.paths.tolist()])
    by_content: dict[str, list[int]] = {}
    for row, image in enumerate(chain.from_iterable(samples.pixels for samples in parts)):
        by_content.setdefault(blake2b(np.ascontiguousarray(image), digest_size=16).hexdigest(), []).append(row)
    return {content: rows for content, rows in by_content.items() if len(rows) > 1}


def _owners(parts: Mapping[str, Samples]) -> dict[str, list[tuple[str, str]]]:
    """Content or group -> the (part, id) of each of its rows."""
    rows_of = [(part, name) for part, samples in parts.items() for name in samples.ids.tolist()]
    found = list(parts.values())
    owners = {content: [rows_of[row] for row in rows] for content, rows in _identical(found).items()}
    groups = [
        group for samples in found for group in (samples.groups if samples.groups is not None else [""] * len(samples))
    ]
    for owner, group in zip(rows_of, groups, strict=True):
        if group:
            owners.setdefault(f"group {group}", []).append(owner)
    return owners
