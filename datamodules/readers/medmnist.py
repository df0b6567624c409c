"""MedMNIST archives: one ``<name>.npz`` with the images and labels of all three parts."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.downloads import RemoteFile, fetch
from datamodules.readers.samples import Facts, Samples, class_columns

if TYPE_CHECKING:
    from pandas import DataFrame

ZENODO = "https://zenodo.org/records/10519652/files"
SIZES = (28, 64, 128, 224)
PARTS = ("train", "val", "test")
KEYS = tuple(f"{part}_{what}" for part in PARTS for what in ("images", "labels"))


@dataclass(frozen=True)
class Published:
    """One data set of the collection (Yang et al., Scientific Data 2023; record 10519652 on Zenodo).

    Args:
        channels: 1 or 3.
        class_names: Name of each index.
        md5: Checksum of the archive of each size in ``SIZES``.
    """

    channels: int
    class_names: tuple[str, ...]
    md5: tuple[str, str, str, str]


BLOOD = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
DERMA = (
    "actinic keratoses and intraepithelial carcinoma",
    "basal cell carcinoma",
    "benign keratosis-like lesions",
    "dermatofibroma",
    "melanoma",
    "melanocytic nevi",
    "vascular lesions",
)
OCT = ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)
PATH = (
    "adipose",
    "background",
    "debris",
    "lymphocytes",
    "mucus",
    "smooth muscle",
    "normal colon mucosa",
    "cancer-associated stroma",
    "colorectal adenocarcinoma epithelium",
)
TISSUE = (
    "collecting duct, connecting tubule",
    "distal convoluted tubule",
    "glomerular endothelial cells",
    "interstitial endothelial cells",
    "leukocytes",
    "podocytes",
    "proximal tubule segments",
    "thick ascending limb",
)

CATALOGUE = {
    "bloodmnist": Published(
        3,
        BLOOD,
        (
            "7053d0359d879ad8a5505303e11de1dc",
            "2b94928a2ae4916078ca51e05b6b800b",
            "adace1e0ed228fccda1f39692059dd4c",
            "b718ff6835fcbdb22ba9eacccd7b2601",
        ),
    ),
    "breastmnist": Published(
        1,
        ("malignant", "normal, benign"),
        (
            "750601b1f35ba3300ea97c75c52ff8f6",
            "742edef2a1fd1524b2efff4bd7ba9364",
            "363e4b3f8d712e9b5de15470a2aaadf1",
            "b56378a6eefa9fed602bb16d192d4c8b",
        ),
    ),
    "dermamnist": Published(
        3,
        DERMA,
        (
            "0744692d530f8e62ec473284d019b0c7",
            "b70a2f5635c6199aeaa28c31d7202e1f",
            "2defd784463fa5243564e855ed717de1",
            "8974907d8e169bef5f5b96bc506ae45d",
        ),
    ),
    "octmnist": Published(
        1,
        OCT,
        (
            "c68d92d5b585d8d81f7112f81e2d0842",
            "e229e9440236b774d9f0dfef9d07bdaf",
            "0a97e76651ace45c5d943ee3f65b63ae",
            "abc493b6d529d5de7569faaef2773ba3",
        ),
    ),
    "organamnist": Published(
        1,
        ORGANS,
        (
            "68e3f8846a6bd62f0c9bf841c0d9eacc",
            "2dcccc29b88e6da5a01161ef20cda288",
            "eeae80d0a227a8d099027e1b3cfd3b60",
            "50747347e05c87dd3aaf92c49f9f3170",
        ),
    ),
    "organcmnist": Published(
        1,
        ORGANS,
        (
            "b9ceb9546e10131b32923c5bbeaea2b1",
            "3ce34a8724ea6f548e6db4744d03b6a9",
            "773c1f009daa3fe5d9a2a201b2a7ed94",
            "050f5e875dc056f6768abf94ec9995d1",
        ),
    ),
    "organsmnist": Published(
        1,
        ORGANS,
        (
            "9ab87b696fb54e2a387ebe992d6ed5f1",
            "53a6d115339d874c25e309a994ff46d3",
            "ded0c5fa01a95dc4978b956f613e9b8e",
            "b354719e553fbbb2513d5533f52a4cb1",
        ),
    ),
    "pathmnist": Published(
        3,
        PATH,
        (
            "a8b06965200029087d5bd730944a56c1",
            "55aa9c1e0525abe5a6b9d8343a507616",
            "ac42d08fb904d92c244187169d1fd1d9",
            "2c51a510bcdc9cf8ddb2af93af1eadec",
        ),
    ),
    "pneumoniamnist": Published(
        1,
        ("normal", "pneumonia"),
        (
            "28209eda62fecd6e6a2d98b1501bb15f",
            "8f4eceb4ccffa70c672198ea285246c6",
            "05b46931834c231683c68f40c47b2971",
            "d6a3c71de1b945ea11211b03746c1fe1",
        ),
    ),
    "retinamnist": Published(
        3,
        ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"),
        (
            "bd4c0672f1bba3e3a89f0e4e876791e4",
            "afda852cc34dcda56f86ad2b2457dbcc",
            "e48e916a24454daf90583d4e6efb1a18",
            "eae7e3b6f3fcbda4ae613ebdcbe35348",
        ),
    ),
    "tissuemnist": Published(
        1,
        TISSUE,
        (
            "ebe78ee8b05294063de985d821c1c34b",
            "123ece2eba09d0aa5d698fda57103344",
            "61b955355d7425a89687b06cca3ce0c2",
            "b077128c4a949f0a4eb01517f9037b9c",
        ),
    ),
}


class MedMNISTReader:
    """An archive in the MedMNIST layout: one of the collection, or any other file with the same arrays.

    Args:
        root: Folder of the archives, made if a download needs it.
        name: ``bloodmnist``, ...; also the stem of a file of one's own (``cells`` for ``cells.npz``).
        size: Side length of the published images: 28, 64, 128 or 224.
        download: Fetch a missing archive of the collection.
        verify_md5: Refuse an archive of the collection whose content is not the published one.
        mirror: Address of a folder with the archives, instead of Zenodo.
        class_names: Names of the class indices, for a file of one's own; None for those of the collection, or numbers.

    Raises:
        ValueError: If the size is not published, or the names do not fit the labels.
        FileNotFoundError: If there is no such file, and no such data set in the collection to download.
    """

    id_column = "id"

    def __init__(
        self,
        root: str | None,
        name: str,
        size: int = 28,
        download: bool = True,
        verify_md5: bool = True,
        mirror: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if size not in SIZES:
            raise ValueError(f"medmnist_size is {size}, expected one of {', '.join(map(str, SIZES))}")
        folder = Path(root or "data/medmnist").expanduser()
        file_name = f"{name}.npz" if size == SIZES[0] else f"{name}_{size}.npz"
        self.name, self.size, self.path = name, size, folder / file_name
        self.published = CATALOGUE.get(name)
        self.class_names = None if class_names is None else tuple(class_names)
        self.published_split = verify_md5 and self.published is not None
        self.download = download
        if self.published is not None:
            url = f"{mirror.rstrip('/')}/{file_name}" if mirror else f"{ZENODO}/{file_name}?download=1"
            self.remote = RemoteFile(url, self.published.md5[SIZES.index(size)] if verify_md5 else None)
        self._check_there()

    @cached_property
    def facts(self) -> Facts:
        """From the catalogue, otherwise from the headers and labels of the file."""
        if self.published is not None:
            names, size, channels = self.published.class_names, self.size, self.published.channels
        else:
            names, size, channels = self._look()
        given = len(self.class_names) if self.class_names is not None else len(names)
        # a file of one's own may lack the last classes, a published one may not
        if given < len(names) or (self.published is not None and given != len(names)):
            raise ValueError(f"class_names has {len(self.class_names)} names, but {self.path} has {len(names)} classes")
        return _facts(self.class_names or names, size, channels)

    def _look(self) -> tuple[tuple[str, ...], int, int]:
        """Class names, side length and channels of a file of one's own."""
        with self._open() as archive:
            shape = _image_shape(archive, "train_images.npy", self.path)
            top = max(int(self._labels(archive, part).max(initial=0)) for part in PARTS)
        channels = shape[3] if len(shape) == 4 else 1
        return tuple(str(label) for label in range(top + 1)), shape[1], channels

    def prepare(self) -> None:
        """Download the archive if it is missing, and check its sum."""
        if self.published is None:
            return
        if self.download or self.path.exists():
            fetch(self.remote, self.path)

    def read(self) -> dict[str, Samples]:
        """Return the parts of the archive."""
        if self.download and not self.path.exists():
            self.prepare()
        with self._open() as archive:
            return {part: self._part(archive, part) for part in PARTS}

    def predictions(self, ids: Sequence[str], probabilities: np.ndarray) -> "DataFrame":
        """Return ``id`` and one column per class."""
        return class_columns(self.id_column, ids, self.facts.class_names, probabilities)

    def _check_there(self) -> None:
        if self.path.exists() or (self.download and self.published is not None):
            return
        if self.published is not None:
            raise FileNotFoundError(
                f"{self.path} does not exist and --data.download is false; fetch {self.remote.url} and put it there"
            )
        close = get_close_matches(self.name, CATALOGUE, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        if self.name == "chestmnist":
            hint = "ChestMNIST has several labels per image, which this datamodule does not read. "
        raise FileNotFoundError(
            f"{self.path} does not exist and '{self.name}' is no data set of the MedMNIST collection; {hint}"
            f"known: {', '.join(CATALOGUE)}; for a file of your own set --data.root to its folder"
        )

    def _open(self) -> "np.lib.npyio.NpzFile":
        try:
            archive = np.load(self.path, allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path} does not exist; run with --data.download true") from None
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
            raise ValueError(
                f"{self.path}: is no complete npz archive ({error}); delete it and fetch it again"
            ) from error
        missing = [key for key in KEYS if key not in archive.files]
        if missing:
            found = ", ".join(archive.files) or "none"
            archive.close()
            raise ValueError(
                f"{self.path}: keys {found}; a MedMNIST archive has {', '.join(KEYS)} (missing: {', '.join(missing)})"
            )
        return archive

    def _labels(self, archive: "np.lib.npyio.NpzFile", part: str) -> np.ndarray:
        labels = self._array(archive, f"{part}_labels")
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise ValueError(
                f"{self.path}: {part}_labels has {labels.shape[1]} labels per image; "
                "only sets with one label per image are supported"
            )
        labels = labels.reshape(-1)
        if not np.issubdtype(labels.dtype, np.integer) or (len(labels) and labels.min() < 0):
            raise ValueError(f"{self.path}: {part}_labels must be whole numbers from 0, found {labels.dtype}")
        return labels.astype(np.int64)

    def _part(self, archive: "np.lib.npyio.NpzFile", part: str) -> Samples:
        labels, pixels = self._labels(archive, part), self._array(archive, f"{part}_images")
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (3, 4)
            or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3))
        ):
            raise ValueError(
                f"{self.path}: {part}_images is {pixels.dtype} {pixels.shape}, expected uint8 (N, H, W) or (N, H, W, 3)"
            )
        if len(labels) != len(pixels):
            raise ValueError(f"{self.path}: {len(pixels)} {part}_images but {len(labels)} {part}_labels")
        classes = len(self.facts.class_names)
        if len(labels) and labels.max() >= classes:
            row = int(np.argmax(labels >= classes))
            raise ValueError(f"{self.path}: {part}_labels row {row} is {labels[row]}, expected 0..{classes - 1}")
        ids = np.array([f"{part}-{row}" for row in range(len(labels))])
        return Samples(ids=ids, labels=labels, pixels=pixels if pixels.ndim == 4 else pixels[..., None])

    def _array(self, archive: "np.lib.npyio.NpzFile", key: str) -> np.ndarray:
        try:
            return archive[key]
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
            raise ValueError(f"{self.path}: array {key} is damaged ({error}); fetch the file again") from error


def _facts(class_names: tuple[str, ...], size: int, channels: int) -> Facts:
    """MedMNIST's own examples normalise with mean and standard deviation 0.5."""
    return Facts(
        class_names=class_names,
        image_size=size,
        channels=channels,
        subject="colour" if channels == 3 else "grey",
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )


def _image_shape(archive: "np.lib.npyio.NpzFile", member: str, path: Path) -> tuple[int, ...]:
    """Read the shape of an array from its header, without unpacking it."""
    with archive.zip.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape = read(stream)[0]
    if len(shape) not in (3, 4):
        raise ValueError(f"{path}: {member} has shape {shape}, expected (N, H, W) or (N, H, W, 3)")
    return shape
