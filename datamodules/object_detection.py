"""Pictures with boxes around objects, for training, evaluation and prediction."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import DetectionBatch
from datamodules.box_augmentations import LARGEST_CANVAS, BoxPipeline, Resize
from datamodules.readers.boxes import BoxReader, BoxSamples
from datamodules.readers.camvid_boxes import SMALLEST, CamVidBoxReader
from datamodules.readers.coco import CocoReader
from datamodules.readers.described import DescribedBoxes, describe_boxes
from datamodules.readers.samples import IMAGENET_MEAN, IMAGENET_STD
from datamodules.readers.segmentation_samples import read_picture
from datamodules.repeatable_loaders import (
    RepeatableLoaders,
    check_at_least,
    check_normalisation,
    pictures_to_predict,
)
from datamodules.sampling import SampleKey

Layout = Literal["coco", "camvid"]
Sample = tuple[Tensor, dict[str, Tensor], int]


class ObjectDetection(RepeatableLoaders):
    """Pictures with boxes around objects.

    Images are float32 in [0, 1], as detectors normalise them inside. Labels start at 1; ``num_classes`` does not count
    the background. Training leaves out images without objects and objects that are crowd regions; evaluation has all.

    Args:
        layout: ``coco`` (COCO 2017 and data in its layout) or ``camvid``: boxes around the connected components of
            the masks of cars, pedestrians and bicyclists with more than ``min_pixels``. Objects of a class that touch
            are one box there.
        root: folder of the data set; see :class:`CocoReader` and :class:`CamVidBoxReader`.
        class_names: names of all categories in the order of the labels (layout ``coco``); None for that of their ids.
        min_pixels: components of at most so many pixels are no objects (layout ``camvid``).
        image_size: side of the square, or shorter side, in pixels.
        resize: ``fixed`` squeezes images into a square (SSDLite); ``shorter_side`` keeps the ratio of the sides, the
            longer one at most 1.67 times the shorter (RetinaNet).
        augment: augment training images: with ``fixed`` colours, zoom-out, crops and flips; otherwise flips only.
        zoom_out: largest canvas that ``fixed`` training images are put on, in sides of the image; 1 for none, as for
            small objects.
        batch_size: images per training step and process.
        eval_batch_size: images per evaluation step and process; None for ``batch_size``.
        repeat_factor: how often an epoch passes over the training images, each time augmented anew.
        num_workers: loading processes; None chooses at most 2 per process.
        seed: seed of order and augmentation; None for that of `seed_everything`, or 0.
        drop_last: leave out the last, smaller training batch; None does so only if it would hold a single image.
        predict_split: which part ``predict`` runs on; COCO has no annotated test part.
        predict_path: folder of pictures to predict instead.
        main_metric: metric that the model is selected by.
        mean: per channel, of values in [0, 1]; None for that of ImageNet. Also the colour around zoomed-out images.
        std: per channel, of values in [0, 1]; None for that of ImageNet.
        description: what a checkpoint keeps of the data set it was trained with, see the property; with it and
            ``predict_path`` the data set itself is not needed. ``predict`` of a checkpoint gives it.

    Raises:
        ValueError: if a value is out of range; names field, value and range.
        FileNotFoundError: if the data is not there.
    """

    def __init__(
        self,
        layout: Layout = "coco",
        root: str | None = None,
        class_names: list[str] | None = None,
        min_pixels: int = SMALLEST,
        image_size: int = 320,
        resize: Resize = "fixed",
        augment: bool = True,
        zoom_out: float = LARGEST_CANVAS,
        batch_size: int = 24,
        eval_batch_size: int | None = None,
        repeat_factor: int = 1,
        num_workers: int | None = None,
        seed: int | None = None,
        drop_last: bool | None = None,
        predict_split: Literal["train", "val", "test"] = "val",
        predict_path: str | None = None,
        main_metric: Literal["map", "map_50", "map_75"] = "map",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the model has facts of the same names
        _check_values(self.hparams)
        self.reader: BoxReader = DescribedBoxes(description) if self._described else self.make_reader()
        self._parts: dict[str, BoxSamples] = {}

    def make_reader(self) -> BoxReader:
        """Return the reader of the chosen layout."""
        options = self.hparams
        if options.layout == "coco":
            return CocoReader(options.root, options.class_names)
        return CamVidBoxReader(options.root, options.min_pixels)

    @property
    def class_names(self) -> list[str]:
        """Name of each class, the first of label 1."""
        return self.reader.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes without the background."""
        return len(self.reader.class_names)

    @property
    def image_size(self) -> int:
        """Side of the square, or shorter side, of the images that a model gets, in pixels."""
        return self.hparams.image_size

    @property
    def in_channels(self) -> int:
        """Channels of the images that a model gets."""
        return len(IMAGENET_MEAN)

    @property
    def main_metric(self) -> str:
        """Metric that a model is selected by."""
        return self.hparams.main_metric

    @property
    def mean(self) -> list[float]:
        """Per channel, of values in [0, 1]."""
        return list(self.hparams.mean or IMAGENET_MEAN)

    @property
    def std(self) -> list[float]:
        """Per channel, of values in [0, 1]."""
        return list(self.hparams.std or IMAGENET_STD)

    @property
    def description(self) -> str:
        """What predictions for other images need to know of the data set, as JSON."""
        return describe_boxes(self.reader)

    def setup(self, stage: str | None = None) -> None:
        """Read the boxes of the parts that a stage needs, and check them.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict`` or None for all but ``predict``.

        Raises:
            ValueError: if no training image has an object.
        """
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        for part in needed.get(stage, ("train", "val", "test")):
            self.samples(part)
        if stage in (None, "fit"):
            self._training_rows()

    def samples(self, part: str) -> BoxSamples:
        """Images and objects of ``train``, ``val``, ``test`` or ``predict``."""
        if part == "predict" and self.hparams.predict_path is None:
            part = self.hparams.predict_split
        if part == "test" and self.hparams.layout == "coco":
            part = "val"
        if part not in self._parts:
            self._parts[part] = self._pictures() if part == "predict" else self.reader.read(part)
        return self._parts[part]

    def train_dataloader(self) -> DataLoader:
        """Augmented training batches; order and augmentation are functions of (seed, epoch, pass, row)."""
        rows = np.tile(self._training_rows(), self.hparams.repeat_factor)
        dataset = BoxDataset(self.samples("train"), rows, self._pipeline(self.hparams.augment), self.seed, train=True)
        return self._repeatable_training(dataset, collate)

    def val_dataloader(self) -> DataLoader:
        """Validation images, each once over all processes."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Test images, each once over all processes; for COCO the validation part stands in."""
        if self.hparams.layout == "coco":
            rank_zero_warn("the validation part stands in for the missing test part, so test results are optimistic")
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Images of ``predict_split`` or ``predict_path``, each once over all processes."""
        return self._evaluation_loader("predict")

    def sample_ids(self, split: str | None = None) -> list[str]:
        """File name of each row of a split.

        Args:
            split: ``train``, ``val`` or ``test``; None for the images of ``predict``.
        """
        return [os.path.basename(path) for path in self.samples(split or "predict").paths.tolist()]

    def picture(self, row: int) -> Tensor:
        """A picture of ``predict`` as it is on disk, (3, H, W) uint8."""
        return picture_tensor(str(self.samples("predict").paths[row]))

    def coco_results(self, index: Sequence[int], detections: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
        """Put detections into the format of COCO's files of results.

        Args:
            index: rows of the predicted images, as in the batches.
            detections: for each of them ``boxes`` (n, 4) xyxy in pixels of the picture, ``labels`` and ``scores``.

        Returns:
            For each detection ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``; for a
            folder of pictures also ``file_name``, since only names that are numbers make ids of their own there.

        Raises:
            ValueError: if the model knows other classes than the data set.
        """
        samples, ids = self.samples("predict"), self.reader.category_ids
        results = []
        for row, found in zip(index, detections, strict=True):
            named = {} if self.hparams.predict_path is None else {"file_name": os.path.basename(samples.paths[row])}
            columns = (found[key].tolist() for key in ("boxes", "labels", "scores"))
            for (left, top, right, bottom), label, score in zip(*columns, strict=True):
                if not 1 <= label <= len(ids):
                    raise ValueError(
                        f"the model predicts label {label}, but the data set has {len(ids)} classes; use the data set "
                        "that the model was trained on"
                    )
                box = [round(value, 2) for value in (left, top, right - left, bottom - top)]
                results.append(
                    {"image_id": int(samples.ids[row]), "category_id": ids[label - 1], "bbox": box, "score": score}
                    | named
                )
        return results

    # Parts of the data set

    def _training_rows(self) -> np.ndarray:
        samples = self.samples("train")
        rows = samples.trainable()
        if not len(rows):
            raise ValueError(
                f"--data.root '{self.hparams.root}': none of the {len(samples)} training images has an object to learn "
                "from (crowd regions do not count); check the annotations"
            )
        return rows

    def _pictures(self) -> BoxSamples:
        from PIL import Image

        _, files = pictures_to_predict(self.hparams.predict_path)
        sizes = []
        for file in files:
            with Image.open(file) as image:
                sizes.append(image.size[::-1])
        numbered = all(file.stem.isdigit() for file in files)
        ids = [int(file.stem) for file in files] if numbered else range(1, len(files) + 1)
        return BoxSamples.build(ids, [str(file) for file in files], sizes, [np.zeros((0, 7))] * len(files))

    # Loaders

    def _pipeline(self, train: bool) -> BoxPipeline:
        options = self.hparams
        return BoxPipeline(options.resize, options.image_size, train, tuple(self.mean), options.zoom_out)

    def _evaluation_loader(self, part: str) -> DataLoader:
        samples = self.samples(part)
        dataset = BoxDataset(samples, np.arange(len(samples)), self._pipeline(train=False), self.seed, train=False)
        return self._repeatable_evaluation(dataset, collate)


class BoxDataset(Dataset[Sample]):
    """Rows of a detection data set, transformed in a way that depends on the seed, the epoch and the row alone.

    Args:
        samples: images and objects.
        rows: which images this data set holds, in order; repeated ones are augmented on their own.
        pipeline: changes image and boxes.
        seed: first part of the key.
        train: leave out crowd regions.
    """

    def __init__(self, samples: BoxSamples, rows: np.ndarray, pipeline: BoxPipeline, seed: int, train: bool) -> None:
        self.samples, self.rows, self.pipeline = samples, rows, pipeline
        self.seed, self.train = seed, train

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """Return (image, target, row), see :class:`DetectionBatch`; an int stands for that row in epoch 0."""
        epoch, pass_, index = (0, 0, int(key)) if isinstance(key, int | np.integer) else key
        row = int(self.rows[index])
        image = self._picture(row)
        columns = self._objects(row)
        image, boxes, kept = self.pipeline(image, columns.pop("boxes"), (self.seed, epoch, pass_, int(index), 0))
        target = {"boxes": boxes, **{name: values[kept] for name, values in columns.items()}}
        return image, target | {"size": torch.from_numpy(self.samples.sizes[row])}, row

    def _picture(self, row: int) -> Tensor:
        path, size = str(self.samples.paths[row]), tuple(self.samples.sizes[row].tolist())
        image = picture_tensor(path)
        if tuple(image.shape[1:]) != size:
            raise ValueError(
                f"{path}: is {image.shape[2]} x {image.shape[1]} pixels, but its annotations are for "
                f"{size[1]} x {size[0]}; use the picture that was annotated"
            )
        return image

    def _objects(self, row: int) -> dict[str, Tensor]:
        where = self.samples.objects(row)
        columns = {
            name: torch.from_numpy(getattr(self.samples, name)[where])
            for name in ("boxes", "labels", "iscrowd", "area")
        }
        if not self.train:
            return columns
        single = columns["iscrowd"] == 0
        return {name: values[single] for name, values in columns.items()}


def collate(samples: list[Sample]) -> DetectionBatch:
    """Put samples into a batch; images keep their sizes."""
    images, targets, rows = zip(*samples, strict=True)
    return DetectionBatch(images=list(images), targets=list(targets), index=torch.tensor(rows, dtype=torch.int64))


def picture_tensor(path: str) -> Tensor:
    """Decode a file, (3, H, W) uint8 RGB.

    Raises:
        UnreadableImageError: if it cannot be decoded.
    """
    return torch.from_numpy(read_picture(Path(path)).copy()).permute(2, 0, 1).contiguous()


def _check_values(options: Any) -> None:
    """Refuse values outside their range before anything is read."""
    at_least = {
        "image_size": 32,
        "batch_size": 1,
        "eval_batch_size": 1,
        "repeat_factor": 1,
        "num_workers": 0,
        "seed": 0,
        "min_pixels": 0,
    }
    check_at_least(options, at_least)
    if options.zoom_out < 1:
        raise ValueError(f"zoom_out is {options.zoom_out}, expected 1 (none) or more")
    if options.layout not in ("coco", "camvid"):
        raise ValueError(f"layout is {options.layout!r}, expected coco or camvid")
    if options.resize not in ("fixed", "shorter_side"):
        raise ValueError(f"resize is {options.resize!r}, expected fixed or shorter_side")
    if options.class_names is not None and options.layout != "coco":
        raise ValueError(f"class_names is {options.class_names}, but layout '{options.layout}' has classes of its own")
    check_normalisation(options, len(IMAGENET_MEAN))
