"""Knowledge graphs in text files: triples of names or of numbers, with dictionaries or without."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from datamodules.triple_index import row_keys

if TYPE_CHECKING:
    from pyarrow import StringArray

PARTS = {"train": "train", "val": "valid", "test": "test"}
"""Parts of a graph, and what their files are called."""

BLOCK = 1 << 26  # bytes that are taken apart at once
BOM = b"\xef\xbb\xbf"
SPACE_TO_TAB = bytes.maketrans(b" ", b"\t")
COLUMNS = ("head", "relation", "tail")


@dataclass(frozen=True)
class Graph:
    """A knowledge graph in three parts.

    Args:
        entity_names: Name of each entity.
        relation_names: Name of each relation, without reversed ones.
        parts: (n, 3) int64 head, relation, tail by part: ``train``, ``val``, ``test``. Training has no triple twice.
        duplicates: Number of repeated training triples that were left out.
    """

    entity_names: list[str]
    relation_names: list[str]
    parts: dict[str, np.ndarray]
    duplicates: int = 0


class Table(NamedTuple):
    """Fields of a file as numbers of distinct texts.

    Args:
        path: The file.
        codes: (lines, fields) int64 which text each field is.
        texts: The distinct texts.
        first_line: Line of the file that the first row is, counted from 1.
    """

    path: Path
    codes: np.ndarray
    texts: "StringArray"
    first_line: int

    def line(self, row: int) -> str:
        """Name the line of a row."""
        return f"{self.path}, line {row + self.first_line}"


class TripleFolder:
    """A folder with a file of triples for each part, ``head<TAB>relation<TAB>tail`` a line.

    Files are ``train.txt``, ``valid.txt`` and ``test.txt``, or the same with ``.gz``. Names are numbered by
    ``entities.dict`` and ``relations.dict`` (``number<TAB>name``) where they are there. Otherwise the sorted names of
    the training part come first, then those that only occur elsewhere, sorted as well.

    A folder of ``train2id.txt``, ``valid2id.txt`` and ``test2id.txt`` (a first line with the count, then head, tail and
    relation as numbers; note the order) is read too, with names from ``entity2id.txt`` and ``relation2id.txt`` (a first
    line with the count, then ``name<TAB>number``) where they are there.

    Args:
        root: The folder.
        option: Name of the option that it comes from, for messages.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
    """

    def __init__(self, root: str | Path, option: str = "root") -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"--data.{option} '{root}' is no folder; set it to the folder of the triples")
        self.numbered = not find_file(self.root, "train.txt") and find_file(self.root, "train2id.txt") is not None
        suffix = "2id.txt" if self.numbered else ".txt"
        self.files = {part: self._file(f"{stem}{suffix}") for part, stem in PARTS.items()}
        names = ("entity2id.txt", "relation2id.txt") if self.numbered else ("entities.dict", "relations.dict")
        self.dictionaries = [find_file(self.root, name) for name in names]

    @property
    def sources(self) -> list[Path]:
        """All files that the graph is read from."""
        return [*self.files.values(), *(path for path in self.dictionaries if path is not None)]

    def prepare(self) -> None:
        """Nothing is to be downloaded."""

    def read(self) -> Graph:
        """Read the graph.

        Raises:
            ValueError: If a file is not as it should be; names file and line.
        """
        if self.numbered:
            return self._read_numbers()
        tables = {part: read_table(path, 3) for part, path in self.files.items()}
        entities, relations = self.dictionaries
        entity_names = _read_dictionary(entities) if entities else _collect(tables, (0, 2))
        relation_names = _read_dictionary(relations) if relations else _collect(tables, (1,))
        parts = {}
        for part, table in tables.items():
            heads, tails = (_numbers(table, column, entity_names, entities) for column in (0, 2))
            parts[part] = np.stack([heads, _numbers(table, 1, relation_names, relations), tails], axis=1)
        return build_graph(entity_names, relation_names, parts)

    def _read_numbers(self) -> Graph:
        parts = {}
        for part, path in self.files.items():
            table = read_table(path, 3, counted=True, spaces=True)
            parts[part] = _whole_numbers(table)[table.codes][
                :, [0, 2, 1]
            ]  # the files have the tail before the relation
            parts[part] = np.ascontiguousarray(parts[part])
        names = []
        for path, columns in zip(self.dictionaries, ((0, 2), (1,)), strict=True):
            top = 1 + max(int(triples[:, columns].max()) for triples in parts.values())
            if path is None:
                names.append([str(number) for number in range(top)])
                continue
            names.append(_read_dictionary(path, counted=True))
            for part, triples in parts.items():
                bad = np.flatnonzero((triples[:, columns] >= len(names[-1])).any(axis=1))
                if len(bad):
                    raise ValueError(
                        f"{self.files[part]}, line {bad[0] + 2}: {max(triples[bad[0], columns])} is not in "
                        f"{path.name}, which has 0..{len(names[-1]) - 1}"
                    )
        return build_graph(*names, parts)

    def _file(self, name: str) -> Path:
        path = find_file(self.root, name)
        if path is None:
            wanted = ", ".join(f"{stem}.txt" for stem in PARTS.values())
            raise FileNotFoundError(
                f"{self.root}: no {name} or {name}.gz; a graph has {wanted} with head, relation and tail separated by "
                "tabs (or .txt.gz), or train2id.txt, valid2id.txt, test2id.txt with numbers"
            )
        return path


def build_graph(entity_names: Sequence[str], relation_names: Sequence[str], parts: dict[str, np.ndarray]) -> Graph:
    """Leave out repeated training triples; the first of each stays where it is."""
    triples = parts["train"]
    firsts = np.unique(row_keys(triples, len(entity_names), len(relation_names)), return_index=True)[1]
    duplicates = len(triples) - len(firsts)
    if duplicates:
        parts = parts | {"train": triples[np.sort(firsts)]}
    return Graph(list(entity_names), list(relation_names), parts, duplicates)


def read_table(path: Path, width: int, *, counted: bool = False, spaces: bool = False) -> Table:
    """Take a text file apart at its tabs, and number the distinct texts.

    Lines end with LF or CR LF; empty lines are allowed at the end alone. Nothing else has a meaning: quotes, spaces,
    `NA` and `null` are as they are.

    Args:
        path: The file, packed if it is called ``.gz``.
        width: Number of fields of each line.
        counted: Whether the first line holds the number of the others.
        spaces: Whether spaces separate as tabs do.

    Raises:
        ValueError: For the first line with another number of fields or an empty one, and for a file without a line.
    """
    import pyarrow as pa

    first_line = line = 2 if counted else 1
    codes, texts = [], []
    with _open(path) as stream:
        count = _count(stream, path) if counted else None
        for block in _blocks(stream, path):
            fields = _fields(block.translate(SPACE_TO_TAB) if spaces else block, width, path, line)
            encoded = fields.dictionary_encode()
            codes.append(encoded.indices.to_numpy().reshape(-1, width))
            texts.append(encoded.dictionary)
            line += len(codes[-1])
    if not codes:
        raise ValueError(f"{path}: is empty, expected lines of {width} fields separated by tabs")
    if count is not None and count != line - first_line:
        raise ValueError(f"{path}: the first line says {count} lines follow, but there are {line - first_line}")
    if len(codes) == 1:
        return Table(path, codes[0].astype(np.int64), texts[0], first_line)
    # the same text may be of several blocks
    encoded = pa.chunked_array(texts).combine_chunks().dictionary_encode()
    places = np.split(encoded.indices.to_numpy().astype(np.int64), np.cumsum([len(some) for some in texts])[:-1])
    joined = np.concatenate([place[block] for place, block in zip(places, codes, strict=True)])
    return Table(path, joined, encoded.dictionary, first_line)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _count(stream: BinaryIO, path: Path) -> int:
    text = stream.readline().removeprefix(BOM).strip()
    if not text.isdigit():
        raise ValueError(
            f"{path}, line 1: '{text.decode(errors='replace')}' is no count; the first line says how many follow"
        )
    return int(text)


def _blocks(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """Pieces of whole lines, each ended by a line feed, without empty lines at the end of the file."""
    rest, start = b"", True
    while True:
        try:
            piece = stream.read(BLOCK)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: is no complete gzip file ({error}); fetch it again") from error
        if start:
            piece, start = piece.removeprefix(BOM), False
        if not piece:
            break
        text = (rest + piece).replace(b"\r\n", b"\n")
        # empty lines wait for what follows them
        lines = text[: text.rfind(b"\n") + 1].rstrip(b"\n")
        if lines:
            yield lines + b"\n"
            rest = text[len(lines) + 1 :]
        else:
            rest = text
    if rest := rest.rstrip(b"\r\n"):
        yield rest + b"\n"


def _fields(block: bytes, width: int, path: Path, first_line: int) -> "StringArray":
    """All fields of the lines of a block, one after the other.

    The text without its separators, and the places where these were, are what Arrow calls an array of strings.
    """
    import pyarrow as pa

    text = np.frombuffer(block, dtype=np.uint8)
    separating = (text == ord("\t")) | (text == ord("\n"))
    ends = np.flatnonzero(separating)
    newlines = text[ends] == ord("\n")
    aligned = len(ends) % width == 0
    if aligned:
        newlines = newlines.reshape(-1, width)
        aligned = bool(newlines[:, -1].all()) and not newlines[:, :-1].any()
    if not aligned or ends[0] == 0 or (np.diff(ends) == 1).any():
        _refuse_line(block, width, path, first_line)
    offsets = np.append(0, ends - np.arange(len(ends))).astype(np.int32)
    strings = pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(text[~separating]))
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid:
        _refuse_bytes(block, path, first_line)
    return strings


def _refuse_line(block: bytes, width: int, path: Path, first_line: int) -> None:
    for number, line in enumerate(block.split(b"\n")[:-1], first_line):
        fields = line.split(b"\t")
        if len(fields) == width and all(fields):
            continue
        shown = line.decode(errors="replace")
        found = f"{len(fields)} fields" if len(fields) != width else "an empty field"
        raise ValueError(f"{path}, line {number}: expected {width} fields separated by tabs, found {found}: '{shown}'")


def _refuse_bytes(block: bytes, path: Path, first_line: int) -> None:
    for number, line in enumerate(block.split(b"\n"), first_line):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: is no UTF-8 text ({error})") from error


def _read_dictionary(path: Path, *, counted: bool = False) -> list[str]:
    """Names in the order of their numbers; with a count first, the name comes before the number."""
    table = read_table(path, 2, counted=counted)
    number_column, name_column = (1, 0) if counted else (0, 1)
    numbers = _whole_numbers(table, number_column)[table.codes[:, number_column]]
    names = table.codes[:, name_column]
    count = len(numbers)
    for what, values in (("number", numbers), ("name", names)):
        order = np.argsort(values, kind="stable")
        repeated = np.flatnonzero(np.diff(values[order]) == 0)
        if len(repeated):
            row = order[repeated + 1].min()
            shown = values[row] if what == "number" else f"'{table.texts[int(values[row])]}'"
            raise ValueError(f"{table.line(row)}: {what} {shown} was there before; each occurs once")
    beyond = np.flatnonzero(numbers >= count)
    if len(beyond):
        row = beyond[0]
        raise ValueError(f"{table.line(row)}: number {numbers[row]}, expected each of 0..{count - 1} for {count} names")
    ordered = np.empty(count, dtype=np.int64)
    ordered[numbers] = names
    return table.texts.take(ordered).to_pylist()


def _whole_numbers(table: Table, column: int | None = None) -> np.ndarray:
    """(texts,) int64 the number that each text is; -1 where it is none and stands in another column."""
    used = np.unique(table.codes if column is None else table.codes[:, column])
    numbers = np.full(len(table.texts), -1, dtype=np.int64)
    for code in used.tolist():
        text = table.texts[code].as_py()
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            where = table.codes if column is None else table.codes[:, [column]]
            row = int(np.argmax((where == code).any(axis=1)))
            raise ValueError(f"{table.line(row)}: '{text}', expected a whole number from 0")
        numbers[code] = int(text)
    return numbers


def _collect(tables: dict[str, Table], columns: tuple[int, ...]) -> list[str]:
    """Sorted names of the training part, then sorted names that only occur elsewhere."""
    found = {
        part: set(table.texts.take(np.unique(table.codes[:, columns])).to_pylist()) for part, table in tables.items()
    }
    further = set().union(*(names for part, names in found.items() if part != "train")) - found["train"]
    return sorted(found["train"]) + sorted(further)


def _numbers(table: Table, column: int, names: list[str], dictionary: Path | None) -> np.ndarray:
    """(lines,) int64 number of the name in a column of each line."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = pc.index_in(table.texts, value_set=pa.array(names, type=pa.string())).fill_null(-1).to_numpy()
    column_numbers = numbers.astype(np.int64)[table.codes[:, column]]
    unknown = np.flatnonzero(column_numbers < 0)
    if len(unknown):
        row = unknown[0]
        name = table.texts[int(table.codes[row, column])]
        raise ValueError(
            f"{table.line(row)}: {COLUMNS[column]} '{name}' is not in {dictionary}; add it there, or remove "
            "entities.dict and relations.dict to number the names anew"
        )
    return column_numbers


def find_file(root: Path, name: str) -> Path | None:
    """The file of a name in a folder, or the packed one, ``<name>.gz``."""
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)
