"""Triples that are parsed once, and then read from a file of numbers where they are needed."""

import json
import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np

from datamodules.readers.pyg_graph import PygGraph
from datamodules.readers.triples import PARTS, Graph, TripleFolder

NAMES = {"entity_names": "entities.txt", "relation_names": "relations.txt"}


class MappedGraph:
    """The graph of another reader, whose training triples stay on disk.

    They are kept in a folder ``triples-<key>`` where the key tells path, size and time of the files apart; after a
    change of these the graph is parsed anew. The folder appears when it is complete, and may be deleted at any time.

    Args:
        reader: Reads the graph.
        cache: Where to make the folder; None for beside the triples.
    """

    def __init__(self, reader: TripleFolder | PygGraph, cache: str | None = None) -> None:
        self.reader = reader
        self.cache = None if cache is None else Path(cache).expanduser()

    def prepare(self) -> None:
        """Parse the graph unless that is done already.

        Raises:
            PermissionError: If the folder cannot be made; names the option to set.
        """
        self.reader.prepare()
        folder = self._folder()
        if folder.is_dir():
            return
        graph = self.reader.read()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", suffix=".part", dir=folder.parent))
        except OSError as error:
            raise PermissionError(
                f"{folder}: cannot be written ({error}); set --data.cache to a folder for parsed triples"
            ) from error
        _write(graph, partial)
        try:
            os.rename(partial, folder)
        except OSError:
            shutil.rmtree(partial)
            if not folder.is_dir():  # otherwise another process was faster
                raise

    def read(self) -> Graph:
        """Open the parsed graph; its training triples are a memory map."""
        self.prepare()
        folder = self._folder()
        # Not read_text, which takes a carriage return within a name for the end of a line.
        names = {field: (folder / name).read_bytes().decode().split("\n") for field, name in NAMES.items()}
        parts = {part: np.load(folder / f"{part}.npy", mmap_mode="r" if part == "train" else None) for part in PARTS}
        parts |= {part: triples.astype(np.int64) for part, triples in parts.items() if part != "train"}
        return Graph(parts=parts, **names, **json.loads((folder / "counts.json").read_text()))

    def _folder(self) -> Path:
        files = [path.resolve() for path in self.reader.sources]
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        key = sha256(json.dumps(stamps).encode()).hexdigest()[:16]
        return (self.cache or files[0].parent) / f"triples-{key}"


def _write(graph: Graph, folder: Path) -> None:
    small = max(len(graph.entity_names), len(graph.relation_names)) <= np.iinfo(np.int32).max
    for part, triples in graph.parts.items():
        np.save(folder / f"{part}.npy", triples.astype(np.int32 if small else np.int64))
    for field, name in NAMES.items():
        (folder / name).write_text("\n".join(getattr(graph, field)), encoding="utf-8", newline="\n")
    (folder / "counts.json").write_text(json.dumps({"duplicates": graph.duplicates}))
