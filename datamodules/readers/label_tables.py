"""Label tables in CSV files, with errors that name the row."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pandas import DataFrame, Series


def read_table(path: Path, required: Sequence[str]) -> "DataFrame":
    """Read a CSV file as text, so that nothing is guessed.

    Args:
        path: The file.
        required: Columns it must have.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is no table, is empty, lacks a column, or has a line with more fields than columns.
    """
    import pandas as pd

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must list the images with columns {', '.join(required)}")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig")
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        _check_widths(path)
        raise ValueError(f"{path}: is no CSV table ({error})") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes what is too much in the first line as names of rows
        _check_widths(path)
    missing = [column for column in required if column not in table.columns]
    if missing:
        other = len(table.columns) == 1 and any(separator in table.columns[0] for separator in ";\t")
        raise ValueError(
            f"{path}: column(s) {', '.join(missing)} missing; found {', '.join(table.columns)}, "
            f"expected {', '.join(required)}{'; separate columns by commas' if other else ''}"
        )
    if table.empty:
        raise ValueError(f"{path}: has a header but no row")
    return table


def _check_widths(path: Path) -> None:
    """Refuse the first line with more fields than the header, and leave other faults to who reads the file."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = csv.reader(file, skipinitialspace=True)
        try:
            header = next(filter(None, lines), [])
            long = next((fields for fields in lines if len(fields) > len(header)), None)
        except csv.Error:
            return
        if long is not None:
            raise ValueError(
                f"{path}, line {lines.line_num}: {len(long)} fields, more than the {len(header)} of the header; put "
                f"names with commas in double quotes: '{','.join(long)}'"
            )


def class_index(column: "Series", classes: int, path: Path, allow_empty: bool = False) -> np.ndarray:
    """Read class indices.

    Args:
        column: The column as text.
        classes: Number of classes C.
        path: The file, for the message.
        allow_empty: Read an empty field as -1, unlabelled.

    Returns:
        (N,) int64.

    Raises:
        ValueError: For the first field that is no whole number in 0..C-1.
    """
    allowed = {str(label): label for label in range(classes)}
    if allow_empty:
        allowed[""] = -1
    labels = column.str.strip().map(allowed)
    bad = np.flatnonzero(labels.isna())
    if len(bad):
        value = column.iloc[bad[0]]
        shown = f"'{value}'" if value else "an empty field"
        raise ValueError(
            f"{path}: column '{column.name}' has {shown}, expected a whole number 0..{classes - 1} "
            f"({row_name(bad[0], path)}{_and_more(bad)})"
        )
    return labels.to_numpy(dtype=np.int64)


def check_unique(column: "Series", path: Path) -> None:
    """Refuse a name that occurs twice.

    Raises:
        ValueError: With the name and both rows.
    """
    repeated = np.flatnonzero(column.duplicated())
    if len(repeated):
        name = column.iloc[repeated[0]]
        first = int(np.argmax(column == name))
        raise ValueError(
            f"{path}: {column.name} '{name}' occurs twice ({row_name(first, path)} and {row_name(repeated[0], path)}); "
            "remove one of the rows"
        )


def row_name(position: int, path: Path) -> str:
    """Name a row of a table the way a reader finds it: counted from 1, and the line of the file where it begins."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines, end = csv.reader(file, skipinitialspace=True), 0
        begins = []
        for fields in lines:
            if len(fields) > 1 or any(map(str.strip, fields)):  # pandas passes over blank lines
                begins.append(end + 1)
            end = lines.line_num
            if len(begins) == position + 2:  # the first is the header
                break
    return f"row {position + 1}, line {begins[-1]}"


def _and_more(bad: np.ndarray) -> str:
    return f"; {len(bad) - 1} more like it" if len(bad) > 1 else ""
