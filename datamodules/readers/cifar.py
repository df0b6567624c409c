"""CIFAR-10 and CIFAR-100 in their python archives."""

import hashlib
import os
import pickle
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.downloads import ChecksumError, RemoteFile, fetch
from datamodules.readers.samples import Facts, Samples, class_columns

if TYPE_CHECKING:
    from pandas import DataFrame

TORONTO = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class Archive:
    """One of the two data sets (Krizhevsky, 2009).

    Args:
        file_name: Name of the archive.
        md5: Its published checksum.
        folder: Folder inside it.
        train: Training batches and their checksums.
        test: The test batch and its checksum.
        meta: File with the class names.
        labels_key: Key of the labels in a batch.
        names_key: Key of the class names in ``meta``.
        mean: Per channel, over the training images.
        std: Per channel, over the training images.
    """

    file_name: str
    md5: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: str
    labels_key: str
    names_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = Archive(
    file_name="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta="batches.meta",
    labels_key="labels",
    names_key="label_names",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Archive(
    file_name="cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta="meta",
    labels_key="fine_labels",
    names_key="fine_label_names",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


class CifarReader:
    """Reads the unpacked folder, which is unpacked from the archive, which is downloaded, as far as each is missing.

    Args:
        root: Folder that holds the archive or its unpacked folder; made if a download needs it.
        archive: ``CIFAR10`` or ``CIFAR100``.
        download: Fetch a missing archive.
        verify_md5: Refuse files whose content is not the published one.
        mirror: Address of a folder with the archive, instead of the author's page.

    Raises:
        FileNotFoundError: If the data is not there and not to be downloaded.
    """

    id_column = "id"

    def __init__(
        self,
        root: str | None,
        archive: Archive,
        download: bool = True,
        verify_md5: bool = True,
        mirror: str | None = None,
    ) -> None:
        self.archive, self.download, self.verify_md5 = archive, download, verify_md5
        self.published_split = verify_md5
        self.root = Path(root or "data/cifar").expanduser()
        self.folder = self.root / archive.folder
        self.packed = self.root / archive.file_name
        url = f"{(mirror or TORONTO).rstrip('/')}/{archive.file_name}"
        self.remote = RemoteFile(url, archive.md5 if verify_md5 else None)
        if not (download or self.folder.is_dir() or self.packed.exists()):
            raise FileNotFoundError(
                f"neither {self.folder} nor {self.packed} exists and --data.download is false; "
                f"fetch {url} and put it at {self.packed}"
            )

    @cached_property
    def facts(self) -> Facts:
        """Class names from the meta file; downloads the archive if it is missing."""
        self.prepare()
        names = _read_pickle(self.folder / self.archive.meta).get(self.archive.names_key)
        if not isinstance(names, list):
            raise ValueError(f"{self.folder / self.archive.meta}: has no '{self.archive.names_key}'")
        return Facts(
            class_names=tuple(names),
            image_size=32,
            channels=3,
            subject="photographs",
            mean=self.archive.mean,
            std=self.archive.std,
        )

    def prepare(self) -> None:
        """Download and unpack what is missing."""
        if self._complete():
            return
        from filelock import FileLock

        if self.download or self.packed.exists():
            fetch(self.remote, self.packed)
        with FileLock(f"{self.folder}.lock"):
            if not self._complete():
                self._unpack()

    def read(self) -> dict[str, Samples]:
        """Return ``train`` and ``test``."""
        self.prepare()
        return {"train": self._part("train", self.archive.train), "test": self._part("test", self.archive.test)}

    def predictions(self, ids: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """Return ``id`` and one column per class."""
        return class_columns(self.id_column, ids, self.facts.class_names, probabilities)

    def _complete(self) -> bool:
        names = (*self.archive.train, *self.archive.test, self.archive.meta)
        return all((self.folder / name).is_file() for name in names)

    def _unpack(self) -> None:
        """Unpack beside the final folder and rename, so that a broken run leaves no half folder."""
        beside = self.root / f"{self.archive.folder}.part"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            with tarfile.open(self.packed) as tar:
                tar.extractall(beside, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise ValueError(f"{self.packed}: cannot be unpacked ({error}); delete it and fetch it again") from error
        if not (beside / self.archive.folder).is_dir():
            shutil.rmtree(beside)
            raise ValueError(f"{self.packed}: holds no folder {self.archive.folder}; it is another archive")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(beside / self.archive.folder, self.folder)
        shutil.rmtree(beside)

    def _part(self, part: str, files: dict[str, str]) -> Samples:
        batches = [self._batch(self.folder / name, md5) for name, md5 in files.items()]
        pixels = np.concatenate([batch[0] for batch in batches])
        labels = np.concatenate([batch[1] for batch in batches])
        ids = np.array([f"{part}-{row}" for row in range(len(labels))])
        return Samples(ids=ids, labels=labels, pixels=pixels)

    def _batch(self, path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
        batch = _read_pickle(path, md5 if self.verify_md5 else None)
        data, labels = batch.get("data"), batch.get(self.archive.labels_key)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or data.dtype != np.uint8:
            raise ValueError(f"{path}: 'data' is no uint8 array of 3072 columns")
        if not isinstance(labels, list) or len(labels) != len(data):
            raise ValueError(
                f"{path}: '{self.archive.labels_key}' does not have one label for each of {len(data)} images"
            )
        labels = np.array(labels, dtype=np.int64)
        classes = len(self.facts.class_names)
        bad = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(bad):
            raise ValueError(f"{path}: image {bad[0]} has label {labels[bad[0]]}, expected 0..{classes - 1}")
        # A row holds the red, the green and the blue plane one after another.
        return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


class _ArraysOnly(pickle.Unpickler):
    """Loads dictionaries of numbers, text and NumPy arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few constructors that an array needs."""
        module = module.replace("numpy.core", "numpy._core")
        allowed = {
            ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode_latin1,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which no CIFAR file needs")
        return allowed[module, name]


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)


def _read_pickle(path: Path, md5: str | None = None) -> dict[str, Any]:
    content = path.read_bytes()
    if md5 is not None and (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise ChecksumError(
            f"{path}: MD5 is {found}, the published file has {md5}; delete the folder to unpack it again, "
            "or set --data.verify_md5 false to use it as it is"
        )
    import io

    try:
        loaded = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: is no CIFAR file ({error})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: is no CIFAR file (holds a {type(loaded).__name__})")
    return loaded
