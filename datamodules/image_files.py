"""Find, decode and shrink image files."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
BORDER_THRESHOLD = 7
HEAD = 4096  # bytes


class UnreadableImageError(ValueError):
    """An image file that is truncated, corrupt or not an image."""


def is_image(name: str) -> bool:
    """Tell an image by its suffix; hidden files are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_images(folder: Path) -> list[Path]:
    """Return all image files under ``folder``, sorted, without hidden files and hidden folders."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if is_image(name)]
    return sorted(found)


def list_folders(folder: Path) -> list[Path]:
    """Return the visible sub-folders of ``folder``, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def locate(folder: Path, names: Sequence[str], table: str) -> list[Path]:
    """Find the image file of each name, whatever its suffix.

    Args:
        folder: Where the images lie.
        names: File names without suffix.
        table: The file that lists the names, for the message.

    Raises:
        FileNotFoundError: If any is missing; says how many, the first three and the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; {table} lists {len(names)} images that belong there")
    by_stem = {os.path.splitext(entry.name)[0]: entry.name for entry in os.scandir(folder) if is_image(entry.name)}
    missing = [name for name in names if name not in by_stem]
    if missing:
        raise missing_images(folder, [str(folder / f"{name}.*") for name in missing], len(names), table)
    return [folder / by_stem[name] for name in names]


def missing_images(folder: Path, missing: Sequence[str], total: int, table: str) -> FileNotFoundError:
    """Build the error for images that a table lists and the disk lacks."""
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return FileNotFoundError(
        f"{table}: {len(missing)} of {total} images are missing on disk: {shown} (searched {folder}); "
        "complete the folder or remove the rows"
    )


def read_image(path: str | Path, channels: int, shorter_side: int | None, crop_border: bool = False) -> np.ndarray:
    """Decode a file and resize it so that its shorter side has the given length.

    JPEG files are decoded at a reduced scale where that is enough, which is several times faster for large pictures.
    Pictures with more than 8 bits are stretched from their own minimum and maximum to 0..255.

    Args:
        path: The file.
        channels: 1 for grey, 3 for RGB; the file is converted.
        shorter_side: Length in pixels of the shorter side; None for the size on disk.
        crop_border: Cut away black borders first, as around a fundus photograph.

    Returns:
        (H, W, channels) uint8.

    Raises:
        UnreadableImageError: If the file cannot be decoded.
    """
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path) as opened:
            if not crop_border and shorter_side is not None:
                opened.draft(mode, _scaled(opened.size, shorter_side))
            image = to_mode(opened, mode)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"{path}: cannot be decoded ({error}); replace the file, or leave such files out with --data.on_error skip"
        ) from error
    if crop_border:
        image = _without_border(image)
    size = image.size if shorter_side is None else _scaled(image.size, shorter_side)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def is_grey_file(path: str | Path) -> bool:
    """Tell from the header whether a file holds a single channel; an unreadable file is not called grey."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;")
    except (OSError, SyntaxError, ValueError):
        return False


def same_content(paths: Iterable[str | Path]) -> dict[str, list[int]]:
    """Find files with identical bytes.

    Only files of equal length are opened, and only those that begin alike are read in full, so that large folders are
    cheap. Empty files are no images and not compared.

    Args:
        paths: The files.

    Returns:
        Checksum -> positions in ``paths``, for contents that occur at least twice.
    """
    paths = list(paths)
    sizes = [os.stat(path).st_size for path in paths]
    alike = _refine([[row for row, size in enumerate(sizes) if size]], lambda row: sizes[row])
    alike = _refine(alike, lambda row: _checksum(paths[row], HEAD))
    alike = _refine(alike, lambda row: _checksum(paths[row]))
    return {_checksum(paths[rows[0]]): rows for rows in alike}


def _refine(groups: Iterable[list[int]], key: Callable[[int], Any]) -> list[list[int]]:
    """Divide each group by a key, and leave out what is on its own."""
    refined: list[list[int]] = []
    for group in groups:
        found: dict[Any, list[int]] = {}
        for row in group:
            found.setdefault(key(row), []).append(row)
        refined += [rows for rows in found.values() if len(rows) > 1]
    return refined


def _checksum(path: str | Path, length: int = -1) -> str:
    """Of the first so many bytes, or of all."""
    import hashlib

    with open(path, "rb") as stream:
        if length < 0:
            return hashlib.file_digest(stream, "sha1").hexdigest()
        return hashlib.sha1(stream.read(length)).hexdigest()


def _scaled(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    width, height = size
    scale = shorter_side / min(width, height)
    return max(shorter_side, round(width * scale)), max(shorter_side, round(height * scale))


def to_mode(image: "Image", mode: str) -> "Image":
    """Convert an opened picture; one of more than 8 bits is stretched from its own minimum and maximum to 0..255."""
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _without_border(image: "Image") -> "Image":
    grey = np.asarray(image.convert("L"))
    rows = np.flatnonzero((grey > BORDER_THRESHOLD).any(axis=1))
    columns = np.flatnonzero((grey > BORDER_THRESHOLD).any(axis=0))
    if not len(rows):
        return image
    return image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
