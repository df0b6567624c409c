"""Images by row, from memory or from disk, and the data set that augments them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.augmentations import Augmentation
from datamodules.batches import ImageBatch
from datamodules.image_files import UnreadableImageError, is_grey_file, read_image
from datamodules.sampling import SampleKey

Sample = tuple[list[np.ndarray], int, int]


class ImageStore(Protocol):
    """Images by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> np.ndarray:
        """Return one image, (H, W, C) uint8; the caller must not write to it."""


class MemoryStore:
    """Images in one uint8 buffer that worker processes share.

    Args:
        images: (N, H, W, C) uint8, or a sequence of (H, W, C) uint8 images of different sizes.
    """

    def __init__(self, images: np.ndarray | Sequence[np.ndarray]) -> None:
        self._shapes = [image.shape for image in images]
        sizes = [int(np.prod(shape)) for shape in self._shapes]
        self._bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()
        if isinstance(images, np.ndarray):
            flat = np.ascontiguousarray(images).reshape(-1)
        else:
            flat = np.concatenate([image.reshape(-1) for image in images]) if images else np.empty(0, np.uint8)
        # A tensor, because torch hands tensors to spawned workers through shared memory instead of copying them.
        self._buffer = torch.from_numpy(flat)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._buffer[self._bounds[row] : self._bounds[row + 1]].numpy().reshape(self._shapes[row])


class FileStore:
    """Images decoded from disk each time they are asked for.

    Args:
        paths: The files.
        channels: 1 or 3.
        shorter_side: Length in pixels of the shorter side after decoding; None for the size on disk.
        crop_border: Cut away black borders.
    """

    def __init__(
        self, paths: Sequence[str], channels: int, shorter_side: int | None, crop_border: bool = False
    ) -> None:
        self.paths = list(paths)
        self.channels, self.shorter_side, self.crop_border = channels, shorter_side, crop_border

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> np.ndarray:
        return read_image(self.paths[row], self.channels, self.shorter_side, self.crop_border)

    def read_all(self, keep: bool, skip_unreadable: bool) -> tuple[MemoryStore | None, np.ndarray, list[str]]:
        """Decode every file once.

        Args:
            keep: Hold the images in memory; otherwise only look for unreadable files.
            skip_unreadable: Leave unreadable files out instead of raising.

        Returns:
            The images if they are kept, a mask of the readable rows, and the messages of the others.

        Raises:
            UnreadableImageError: For the first unreadable file, unless they are skipped.
        """

        nothing = np.empty(0, dtype=np.uint8)

        def read(row: int) -> np.ndarray | UnreadableImageError:
            try:
                image = self[row]
            except UnreadableImageError as error:
                if not skip_unreadable:
                    raise
                return error
            return image if keep else nothing

        with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
            images = list(pool.map(read, range(len(self))))
        readable = np.array([isinstance(image, np.ndarray) for image in images], dtype=bool)
        messages = [str(image) for image in images if not isinstance(image, np.ndarray)]
        kept = MemoryStore([image for image in images if isinstance(image, np.ndarray)]) if keep else None
        return kept, readable, messages

    def conversion(self, looked_at: int = 200) -> str | None:
        """Look at some headers, and say it if files hold another number of channels than the model is given."""
        paths = self.paths[:: max(1, len(self) // looked_at)]
        grey = sum(is_grey_file(path) for path in paths)
        other = grey if self.channels == 3 else len(paths) - grey
        if not other:
            return None
        have, want = ("grey", "three channels") if self.channels == 3 else ("coloured", "one channel")
        return f"{other} of {len(paths)} images looked at are {have}; they are converted to {want}"


class ImageDataset(Dataset[Sample]):
    """Rows of a store under an augmentation that depends on the seed, the epoch and the row alone.

    Args:
        store: Where the images are.
        labels: (N,) class indices of the rows, -1 for unlabelled.
        rows: Which rows of the store this data set holds, in order; None for all.
        augmentation: ``(image, key) -> image``; the key is (seed, epoch, pass, index, view).
        seed: First part of the key.
        views: How many augmented views of each image.
    """

    def __init__(
        self,
        store: ImageStore,
        labels: np.ndarray,
        rows: np.ndarray | None,
        augmentation: Augmentation,
        seed: int = 0,
        views: int = 1,
    ) -> None:
        self.store = store
        self.rows = np.arange(len(store)) if rows is None else np.asarray(rows)
        self.labels = np.asarray(labels)
        self.augmentation, self.seed, self.views = augmentation, seed, views

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """Return (views (H, W, C) uint8, label, row); an int stands for that row in epoch 0."""
        epoch, pass_, index = (0, 0, int(key)) if isinstance(key, int | np.integer) else key
        row = int(self.rows[index])
        image = self.store[row]
        views = [self.augmentation(image, (self.seed, epoch, pass_, row, view)) for view in range(self.views)]
        return views, int(self.labels[row]), row


class BatchBuilder:
    """Turns samples into an ``ImageBatch``: images stay uint8 until here, where a whole batch is converted at once.

    Args:
        mean: Per output channel, of values in [0, 1].
        std: Per output channel, of values in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = 255 * torch.tensor(mean).view(1, -1, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(1, -1, 1, 1))

    def __call__(self, samples: list[Sample]) -> ImageBatch:
        """Stack, move channels first, spread grey over the channels, normalise."""
        views = tuple(
            self._normalise(np.stack([sample[0][view] for sample in samples])) for view in range(len(samples[0][0]))
        )
        labels = torch.tensor([sample[1] for sample in samples], dtype=torch.int64)
        index = torch.tensor([sample[2] for sample in samples], dtype=torch.int64)
        return ImageBatch(views=views, labels=labels, index=index)

    def _normalise(self, images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return (pixels - self.mean).mul_(self.scale)


def usable_cores() -> int:
    """Number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_worker(_: int) -> None:
    """Keep OpenCV single-threaded inside a loading worker, where threads would only compete."""
    import cv2

    cv2.setNumThreads(0)
