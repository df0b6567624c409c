"""Pictures with a class for each pixel: ADE20K, CamVid, Cityscapes, VOC, folders, and a small set without download."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.augmentations import SeededPipeline
from datamodules.readers.ade20k import Ade20kReader
from datamodules.readers.camvid import CamvidReader
from datamodules.readers.cityscapes import CityscapesReader
from datamodules.readers.described import DescribedPictures, describe_pictures
from datamodules.readers.mask_folder import MaskFolderReader
from datamodules.readers.mosaic import MosaicReader
from datamodules.readers.segmentation_samples import SegmentationReader, SegmentationSamples, distinct_colours
from datamodules.readers.shapes import ShapesReader
from datamodules.readers.voc import VocReader
from datamodules.repeatable_loaders import (
    RepeatableLoaders,
    check_at_least,
    check_new_split,
    check_normalisation,
    pictures_to_predict,
)
from datamodules.segmentation_dataset import SegmentationBatchBuilder, SegmentationDataset
from datamodules.splits import PARTS, stratified_split

if TYPE_CHECKING:
    from albumentations import BasicTransform

Layout = Literal["shapes", "mosaic", "ade20k", "camvid", "voc", "cityscapes", "folder"]


class SemanticSegmentation(RepeatableLoaders):
    """Pictures with masks for training, evaluation and prediction.

    A training picture is scaled at random, cropped, mirrored and changed in colour; the scales and the crop of the
    default are those of the ADE20K recipe. In evaluation a picture may be resized, but its mask never is: predictions
    are compared at the size on disk. The properties ``class_names``, ``num_classes``, ``image_size``, ``in_channels``,
    ``main_metric``, ``mean``, ``std`` and ``palette`` are known right after construction.

    Args:
        layout: ``shapes`` (hand-written digits on photographs, 64 pixels, made from scikit-learn's), ``mosaic``
            (regions filled with samples of one hand-written digit, 64 pixels, from scikit-learn as well), ``ade20k``
            (``ADEChallengeData2016/{images,annotations}/{training,validation}``), ``camvid`` (``{train,val,test}.txt``
            with the paths of pictures and masks), ``voc`` (``VOC2012``, with ``SegmentationClassAug`` if it is there),
            ``cityscapes`` (``leftImg8bit`` and ``gtFine``) or ``folder`` (``images/`` and ``masks/``).
        root: Folder of the data set; not needed for ``shapes`` and ``mosaic``.
        classes: Number of classes of a ``folder`` without ``classes.txt``.
        image_size: Side of the training crops in pixels; None for the data set's usual one.
        train_shorter_side: Length in pixels of the shorter side that ``scale_range`` multiplies (the longer one is at
            most four times as long); None for the picture's own size.
        scale_range: Smallest and largest random factor of the size.
        max_class_ratio: Largest share of one class among the labelled pixels of a crop, tried for up to ten times.
        flip: Mirror half of the training pictures left and right; None does so unless a mirrored class is another.
        photometric: Change brightness, contrast, saturation and hue of training pictures.
        test_shorter_side: Length in pixels of the shorter side in evaluation; None for the picture's own size.
        batch_size: Pictures per training step and process.
        eval_batch_size: Pictures per evaluation step and process; more than 1 is of use where all have one size.
        num_workers: Loading processes; None chooses 0 for what is made in memory, otherwise at most 2 per process.
        seed: Seed of order and augmentation; None for that of `seed_everything`, or 0.
        split_seed: Seed of the parts of a ``folder`` that brings none.
        val_fraction: Share of the validation part of such a folder.
        test_fraction: Share of the test part of such a folder.
        drop_last: Leave out the last, smaller training batch; None does so if it would hold a single picture.
        predict_split: Which part ``predict`` runs on.
        predict_path: Folder of pictures to predict instead.
        main_metric: Metric that the model is selected by.
        mean: Per channel, of values in [0, 1]; None for the data set's own.
        std: Per channel, of values in [0, 1]; None for the data set's own.
        description: What a checkpoint keeps of the data set it was trained with, see the property; with it and
            ``predict_path`` the data set itself is not needed. ``predict`` of a checkpoint gives it.

    Raises:
        ValueError: If a value is out of range; names field, value and range.
        FileNotFoundError: If the data is not there.
    """

    in_channels = 3

    def __init__(
        self,
        layout: Layout = "shapes",
        root: str | None = None,
        classes: int | None = None,
        image_size: int | None = None,
        train_shorter_side: int | None = None,
        scale_range: list[float] = (0.5, 2.0),
        max_class_ratio: float = 0.75,
        flip: bool | None = None,
        photometric: bool = True,
        test_shorter_side: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        num_workers: int | None = None,
        seed: int | None = None,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        drop_last: bool | None = None,
        predict_split: Literal["train", "val", "test"] = "test",
        predict_path: str | None = None,
        main_metric: Literal["miou", "aacc", "macc"] = "miou",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the model has facts of the same names
        self._check_options()
        self.reader = DescribedPictures(self.hparams.description) if self._described else self.make_reader()
        self._parts: dict[str, SegmentationSamples] | None = None
        self._pictures: SegmentationSamples | None = None

    def make_reader(self) -> SegmentationReader:
        """Return the reader of the chosen layout."""
        options = self.hparams
        if options.layout == "shapes":
            return ShapesReader()
        if options.layout == "mosaic":
            return MosaicReader()
        if options.layout == "ade20k":
            return Ade20kReader(options.root)
        if options.layout == "camvid":
            return CamvidReader(options.root)
        if options.layout == "voc":
            return VocReader(options.root)
        if options.layout == "cityscapes":
            return CityscapesReader(options.root)
        if options.layout == "folder":
            return MaskFolderReader(options.root, options.classes)
        known = ", ".join(get_args(Layout))
        raise ValueError(f"layout '{options.layout}' is unknown; expected one of {known}")

    def _check_options(self) -> None:
        """Refuse values outside their range before anything is read."""
        options = self.hparams
        self._check_shared_options()
        check_at_least(options, {"image_size": 1})
        check_scales("scale_range", options.scale_range)
        if not 0 < options.max_class_ratio <= 1:
            raise ValueError(f"max_class_ratio is {options.max_class_ratio}, expected a share in (0, 1]")

    def _check_shared_options(self) -> None:
        at_least = {"train_shorter_side": 1, "test_shorter_side": 1, "batch_size": 1, "eval_batch_size": 1}
        check_at_least(self.hparams, at_least | {"num_workers": 0, "seed": 0, "split_seed": 0})
        check_new_split(self.hparams.val_fraction, self.hparams.test_fraction)
        check_normalisation(self.hparams, 3)

    @property
    def class_names(self) -> list[str]:
        """Name of each class index."""
        return list(self.reader.facts.class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes, without void."""
        return len(self.reader.facts.class_names)

    @property
    def palette(self) -> list[list[int]]:
        """Colour (red, green, blue in 0..255) of each class."""
        return [list(colour) for colour in self.reader.facts.palette or distinct_colours(self.num_classes)]

    @property
    def image_size(self) -> int:
        """Side of the training crops in pixels."""
        return self.hparams.image_size or self.reader.facts.image_size

    @property
    def main_metric(self) -> str:
        """Metric that a model is selected by: ``miou``, ``aacc`` or ``macc``."""
        return self.hparams.main_metric

    @property
    def flip(self) -> bool:
        """Whether a mirrored picture shows the same classes: the option, or what is known of the data set."""
        return self.reader.facts.flip if self.hparams.flip is None else self.hparams.flip

    @property
    def mean(self) -> list[float]:
        """Per channel, of values in [0, 1]."""
        return list(self.hparams.mean or self.reader.facts.mean)

    @property
    def std(self) -> list[float]:
        """Per channel, of values in [0, 1]."""
        return list(self.hparams.std or self.reader.facts.std)

    @property
    def description(self) -> str:
        """What predictions for other pictures need to know of the data set, as JSON."""
        return describe_pictures(self.reader)

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures and masks that the stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict`` or None for all.
        """
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        for part in needed.get(stage, PARTS):
            self._part(part)

    def train_dataloader(self) -> DataLoader:
        """Augmented training batches; order and augmentation are functions of (seed, epoch, row)."""
        return self._repeatable_training(self.train_dataset(), self._batches)

    def train_dataset(self) -> SegmentationDataset:
        """The augmented training pictures, without a loader."""
        options = self.hparams
        build = partial(
            _training_transforms,
            image_size=self.image_size,
            shorter_side=options.train_shorter_side,
            scale_range=tuple(options.scale_range),
            max_class_ratio=options.max_class_ratio,
            flip=self.flip,
            photometric=options.photometric,
            mean=self.mean,
        )
        return SegmentationDataset(self._part("train"), self.reader.facts, SeededPipeline(build), seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Validation pictures, each once over all processes."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Test pictures, each once over all processes."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Pictures of ``predict_split`` or ``predict_path``, each once over all processes."""
        return self._evaluation_loader("predict")

    def sample_ids(self, split: str | None = None) -> list[str]:
        """Return the id of each row of a split.

        Args:
            split: ``train``, ``val`` or ``test``; None for the pictures of ``predict``.
        """
        return list(self._part(split or "predict").ids)

    def mask_to_file(self, mask: np.ndarray) -> np.ndarray:
        """Turn class indices (H, W) into the uint8 values that the data set's mask files and its evaluation use."""
        return self.reader.facts.file_values(mask)

    # Parts of the data set

    def _part(self, part: str) -> SegmentationSamples:
        if part == "predict":
            if self.hparams.predict_path is not None:
                return self._unlabelled()
            part = self.hparams.predict_split
        if self._parts is None:
            self._parts = self._split()
        if part == "test" and "test" not in self._parts and "val" in self._parts:
            self._parts["test"] = self._parts["val"]
            rank_zero_warn("the validation part stands in for the missing test part, so test results are optimistic")
        if part not in self._parts:
            have = ", ".join(self._parts)
            raise ValueError(f"the data set has no part '{part}', only {have}; add its pictures and masks")
        if not len(self._parts[part]):
            raise ValueError(f"part '{part}' of the data set is empty; add pictures and masks to it")
        return self._parts[part]

    def _split(self) -> dict[str, SegmentationSamples]:
        found = dict(self.reader.read())
        if set(found) != {"all"}:
            return found
        options, everything = self.hparams, found["all"]
        alike = np.zeros(len(everything), dtype=np.int64)
        rows = stratified_split(alike, options.val_fraction, options.test_fraction, options.split_seed)
        return {part: everything.take(rows[part]) for part in PARTS}

    def _unlabelled(self) -> SegmentationSamples:
        if self._pictures is None:
            self._pictures = pictures_without_masks(self.hparams.predict_path)
        return self._pictures

    # Loaders

    @property
    def _batches(self) -> SegmentationBatchBuilder:
        return SegmentationBatchBuilder(self.mean, self.std)

    def _evaluation_loader(self, part: str) -> DataLoader:
        dataset = SegmentationDataset(
            self._part(part), self.reader.facts, shorter_side=self.hparams.test_shorter_side, seed=self.seed
        )
        return self._repeatable_evaluation(dataset, self._batches)

    def _workers(self, dataset: SegmentationDataset) -> int:
        in_memory = isinstance(dataset.samples.images[0], np.ndarray)
        return 0 if in_memory and self.hparams.num_workers is None else super()._workers(dataset)


def pictures_without_masks(path: str, **option: str) -> SegmentationSamples:
    """All pictures below a folder; the id is the path in it, without suffix.

    Args:
        path: The folder.
        **option: See :func:`datamodules.repeatable_loaders.pictures_to_predict`.

    Raises:
        ValueError: If two pictures differ in the suffix alone.
        FileNotFoundError: If there is no such folder, or no picture in it.
    """
    folder, files = pictures_to_predict(path, **option)
    ids = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        name = option.get("option", "predict_path")
        raise ValueError(f"--data.{name} '{path}': two pictures are called '{twice}'; rename one of them")
    return SegmentationSamples(ids, files)


def _training_transforms(**settings: Any) -> "Sequence[BasicTransform]":
    from datamodules.mask_transforms import training_transforms

    return training_transforms(**settings)


def check_scales(name: str, low_high: Sequence[float]) -> None:
    """Raise a ValueError unless there are two factors of a size, the smaller one first."""
    low_high = list(low_high)
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
        raise ValueError(f"{name} is {low_high}, expected two factors above 0, the smaller one first")
