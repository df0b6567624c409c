"""The folder that PyTorch Geometric keeps a knowledge graph in, downloaded by it where it is missing."""

import os
import shutil
from pathlib import Path
from typing import Literal, get_args

from datamodules.downloads import DownloadError
from datamodules.readers.triples import PARTS, Graph, TripleFolder, find_file

Name = Literal["FB15k-237", "WN18RR"]
FILES = tuple(f"{stem}.txt" for stem in PARTS.values())


class PygGraph:
    """``raw/train.txt``, ``raw/valid.txt``, ``raw/test.txt`` of PyTorch Geometric's ``FB15k_237`` or ``WordNet18RR``.

    Files that are packed, ``train.txt.gz`` and so on, are taken as well.

    Entities and relations are numbered as :class:`datamodules.readers.triples.TripleFolder` does, which is not how
    PyTorch Geometric numbers them.

    Args:
        root: What its data set is given as ``root``, or the folder ``raw`` in it; None for ``data/<name>``.
        name: ``FB15k-237`` or ``WN18RR``.

    Raises:
        ValueError: If there is no such data set.
    """

    def __init__(self, root: str | None, name: Name) -> None:
        if name not in get_args(Name):
            raise ValueError(f"name '{name}' is unknown; expected one of {', '.join(get_args(Name))}")
        self.root, self.name = Path(root or f"data/{name}").expanduser(), name
        self.raw = self.root if find_file(self.root, FILES[0]) else self.root / "raw"

    @property
    def sources(self) -> list[Path]:
        """All files that the graph is read from, which have to be there."""
        return TripleFolder(self.raw).sources

    def prepare(self) -> None:
        """Download what is missing, on one process at a time.

        Raises:
            DownloadError: If it cannot be fetched; says what to put where.
        """
        from filelock import FileLock

        if not self._missing():  # a lock file may not be allowed beside data that is complete
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "download.lock"):
            if self._missing():
                self._download()

    def read(self) -> Graph:
        """Read the graph, downloading it first if it is not there."""
        self.prepare()
        return TripleFolder(self.raw).read()

    def _missing(self) -> list[str]:
        return [name for name in FILES if find_file(self.raw, name) is None]

    def _download(self) -> None:
        from torch_geometric.datasets import FB15k_237, WordNet18RR

        dataset = {"FB15k-237": FB15k_237, "WN18RR": WordNet18RR}[self.name]
        partial = self.root / "download.part"
        shutil.rmtree(partial, ignore_errors=True)  # a file that an earlier attempt left may be half of one
        try:
            dataset(str(partial))
        except Exception as error:  # whatever its way of fetching files raises
            shutil.rmtree(partial, ignore_errors=True)
            raise DownloadError(
                f"PyTorch Geometric could not fetch {self.name} ({type(error).__name__}: {error}). On a machine with a "
                f"connection fetch {', '.join(f'{dataset.url}/{name}' for name in FILES)} and put them into {self.raw}"
                "; or where they are elsewhere already, set --data.layout tsv and --data.root to their folder"
            ) from error
        self.raw.mkdir(exist_ok=True)
        for name in self._missing():
            os.replace(partial / "raw" / name, self.raw / name)
        shutil.rmtree(partial)
