"""The LightningDataModule behind every image data set: splits, label subsets, caching, loaders, predictions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.augmentations import Augmentation, CentreView, Recipe, Strength, augmentation
from datamodules.image_dataset import (
    BatchBuilder,
    FileStore,
    ImageDataset,
    ImageStore,
    MemoryStore,
)
from datamodules.partition import check_leaks, divide, labelled_only
from datamodules.readers.described import DescribedImages, describe_images
from datamodules.readers.samples import Reader, Samples
from datamodules.repeatable_loaders import (
    RepeatableLoaders,
    check_at_least,
    check_new_split,
    check_normalisation,
    pictures_to_predict,
)
from datamodules.splits import PARTS, check_classes, labelled_rows

if TYPE_CHECKING:
    from pandas import DataFrame

CACHE_LIMIT = 1 << 30
SMALL_SET = 20_000
SMALL_SIDE = 64


class ImageDataModule(RepeatableLoaders):
    """Labelled images for pre-training, fine-tuning, evaluation and prediction.

    Subclasses name the layouts on disk and return a reader for them from :meth:`make_reader`. The properties
    ``class_names``, ``num_classes``, ``image_size``, ``in_channels``, ``main_metric``, ``mean`` and ``std`` are known
    right after construction, from labels and headers only.

    Args:
        image_size: Side length in pixels of the images that a model gets; None for the data set's own.
        channels: 1 or 3; None for the data set's own. Images are converted where needed.
        batch_size: Images per training step and process.
        eval_batch_size: Images per evaluation step and process; None for ``batch_size``.
        num_workers: Loading processes; None chooses 0 for small sets in memory, otherwise at most 2 per process.
        seed: Seed of order and augmentation; None for that of `seed_everything`, or 0.
        augment: How training images are varied. ``pretrain`` and ``finetune`` are the data set's own pipeline,
            ``randaugment`` is the recipe of ImageNet (timm's random crop, flip and RandAugment; no colour jitter),
            ``padded_crop`` that of small images (reflected borders, random crop, flip). ``pretrain`` trains on all
            images and needs no labels, the others on the labelled subset.
        auto_augment: Policy of ``randaugment`` in timm's notation.
        re_prob: How often ``randaugment`` erases a random rectangle.
        crop_padding: Pixels that ``padded_crop`` reflects on each side; None for a tenth of the side.
        crop_ratio: Share of the shorter side that evaluation keeps of a file: 0.875 resizes it to 256 pixels for 224, 1
            takes images that come in their final size as they are; None for the data set's own.
        views: Augmented views per training image: 2 only with ``pretrain``.
        label_fraction: Share of each class whose labels may be used, in (0, 1].
        labels_per_class: Number of labels per class instead of a share.
        label_seed: Seed of the choice of labels.
        split: ``auto`` uses the split that comes with the data, otherwise a grouped one. ``given`` insists on the one
            that comes with the data. ``grouped`` splits anew, stratified by class, with images of one group (a lesion,
            identical files) in one part. ``random`` is stratified by class and knows no groups.
        split_seed: Seed of a new split.
        val_fraction: Share of the validation part in a new split.
        test_fraction: Share of the test part in a new split.
        allow_leakage: Go on, with a warning, when the same image or group is in two parts.
        cache: ``ram`` decodes every file once and keeps it as uint8; ``none`` decodes anew each time; ``auto`` keeps
            files in memory up to 1 GiB. Each process of a distributed run has its own memory.
        on_error: What to do with an unreadable image: ``raise``, or ``skip`` it, which reads every file at the start.
        crop_border: Cut black borders away before resizing, as around a fundus photograph; None where the data set has
            them.
        drop_last: Leave out the last, smaller training batch; None does so in pre-training, and elsewhere only if it
            would hold a single image.
        predict_split: Which part ``predict`` runs on.
        predict_path: Folder of unlabelled images to predict instead.
        main_metric: Metric that the model is selected by; None for the data set's own.
        mean: Per channel, of values in [0, 1]; None for the data set's own.
        std: Per channel, of values in [0, 1]; None for the data set's own.
        description: What a checkpoint keeps of the data set it was trained with, see the property; with it and
            ``predict_path`` the data set itself is not needed. ``predict`` of a checkpoint gives it.

    Raises:
        ValueError: If a value is out of range; names field, value and range.
        FileNotFoundError: If the data is not there.
    """

    def __init__(
        self,
        image_size: int | None = None,
        channels: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int | None = None,
        augment: Strength = "finetune",
        auto_augment: str = "rand-m9-mstd0.5-inc1",
        re_prob: float = 0.0,
        crop_padding: int | None = None,
        crop_ratio: float | None = None,
        views: int = 1,
        label_fraction: float = 1.0,
        labels_per_class: int | None = None,
        label_seed: int = 0,
        split: Literal["auto", "given", "grouped", "random"] = "auto",
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        allow_leakage: bool = False,
        cache: Literal["auto", "ram", "none"] = "auto",
        on_error: Literal["raise", "skip"] = "raise",
        crop_border: bool | None = None,
        drop_last: bool | None = None,
        predict_split: Literal["train", "val", "test"] = "test",
        predict_path: str | None = None,
        main_metric: Literal["acc", "balanced_acc", "kappa"] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the model has facts of the same names
        _check_values(self.hparams)
        self.reader = DescribedImages(description) if self._described else self.make_reader()
        self._parts: dict[str, Samples] | None = None
        self._stores: dict[str, ImageStore] = {}
        self._said: set[str] = set()
        self._predict_samples: Samples | None = None
        check_normalisation(self.hparams, 1, self.in_channels)

    def make_reader(self) -> Reader:
        """Return the reader of the chosen layout."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str]:
        """Name of each class index."""
        return list(self.reader.facts.class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a folder of unlabelled images."""
        return len(self.reader.facts.class_names)

    @property
    def image_size(self) -> int:
        """Side length in pixels of the images that a model gets."""
        return self.hparams.image_size or self.reader.facts.image_size

    @property
    def in_channels(self) -> int:
        """Channels of the images that a model gets."""
        return self.hparams.channels or self.reader.facts.channels

    @property
    def main_metric(self) -> str:
        """Metric that a model is selected by: ``acc``, ``balanced_acc`` or ``kappa``."""
        return self.hparams.main_metric or self.reader.facts.main_metric

    @property
    def mean(self) -> list[float]:
        """Per channel, of values in [0, 1]."""
        return self._per_channel(self.hparams.mean, self.reader.facts.mean)

    @property
    def std(self) -> list[float]:
        """Per channel, of values in [0, 1]."""
        return self._per_channel(self.hparams.std, self.reader.facts.std)

    @property
    def description(self) -> str:
        """What predictions for other images need to know of the data set, as JSON."""
        return describe_images(self.reader)

    def prepare_data(self) -> None:
        """Download what is missing."""
        self.reader.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read labels, check them, and read the images that the stage needs into memory where they are cached.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict`` or None for all.
        """
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), None: PARTS}.get(stage, ())
        for part in needed:
            self._store(part)
        if stage in (None, "fit"):
            self._check_train_part()
        if stage == "predict":
            self._store("predict")

    def train_dataloader(self) -> DataLoader:
        """Augmented training batches; order and augmentation are functions of (seed, epoch, row)."""
        return self._repeatable_training(self.train_dataset(), BatchBuilder(self.mean, self.std))

    def train_dataset(self) -> ImageDataset:
        """The augmented training images, without a loader."""
        pretrain = self.hparams.augment == "pretrain"
        chosen = self._labelled_rows()
        labels = self._part("train").labels
        if pretrain:
            labels = np.where(np.isin(np.arange(len(labels)), chosen), labels, -1)
        return ImageDataset(
            self._training_store(),
            labels,
            None if pretrain else chosen,
            self._training_view(),
            seed=self.seed,
            views=self.hparams.views,
        )

    def val_dataloader(self) -> DataLoader:
        """Validation images as they are, each once over all processes."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Test images as they are, each once over all processes."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Images of ``predict_split`` or ``predict_path``, each once over all processes."""
        return self._evaluation_loader("predict")

    def probe_dataloader(self) -> DataLoader:
        """Training images whose labels may be used, as they are and in fixed order; what probes are fitted on.

        Raises:
            ValueError: If no training image has a label.
        """
        rows = self._labelled_rows()
        if not len(rows):
            raise ValueError("no training image has a label, so no probe can be fitted; take the probe callbacks out")
        return self._evaluation_loader("train", rows)

    def calibration_dataloader(self, count: int) -> DataLoader:
        """Some training images as evaluation sees them, drawn once, in fixed order, each once over all processes.

        Args:
            count: How many; all where there are fewer.
        """
        self._store("train")  # may leave unreadable images out
        rows = np.random.default_rng(self.seed).permutation(len(self._part("train").labels))[:count]
        return self._evaluation_loader("train", np.sort(rows))

    def sample_ids(self, split: str | None = None) -> list[str]:
        """Return the id of each row of a split.

        Args:
            split: ``train``, ``val`` or ``test``; None for the images of ``predict``.
        """
        return self._part(split or "predict").ids.tolist()

    def prediction_table(self, index: np.ndarray, probabilities: np.ndarray) -> "DataFrame":
        """Put predictions into the table that the data set's own evaluation reads.

        Args:
            index: (N,) rows of the predicted images, as in the batches.
            probabilities: (N, classes).

        Raises:
            ValueError: If the model knows another number of classes than the data set.
        """
        probabilities = np.asarray(probabilities)
        if probabilities.shape[1] != self.num_classes:
            raise ValueError(
                f"the model predicts {probabilities.shape[1]} classes, but the data set has {self.num_classes} "
                f"({', '.join(self.class_names)}); use the data set that the model was trained on"
            )
        ids = self._part("predict").ids[np.asarray(index)]
        return self.reader.predictions(ids.tolist(), probabilities)

    def denormalize(self, images: Tensor) -> Tensor:
        """Turn model input (B, C, H, W) back into values in [0, 1]."""
        mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    # Parts of the data set

    def _part(self, part: str) -> Samples:
        name = self._resolve(part)
        if name == "predict":
            if self._predict_samples is None:
                self._predict_samples = self._unlabelled(self.hparams.predict_path)
            return self._predict_samples
        if name not in self._found:
            have = ", ".join(self._found)
            raise ValueError(f"the data set has no part '{name}', only {have}; add it, or set --data.split grouped")
        return self._found[name]

    @property
    def _found(self) -> dict[str, Samples]:
        if self._parts is None:
            self._parts = self._split()
        return self._parts

    def _resolve(self, part: str) -> str:
        """Follow ``predict`` to the part it runs on, and ``test`` to the validation part if there is no other."""
        if part == "predict" and self.hparams.predict_path is None:
            part = self.hparams.predict_split
        if part == "test" and "test" not in self._found and "val" in self._found:
            self._warn_once("the validation part stands in for the missing test part, so test results are optimistic")
            return "val"
        return part

    def _unlabelled(self, path: str) -> Samples:
        folder, files = pictures_to_predict(path)
        names = [file.relative_to(folder) for file in files]
        if self.reader.id_column != "path":
            names = [name.with_suffix("") for name in names]
        return Samples(
            ids=np.array([name.as_posix() for name in names]),
            labels=np.full(len(files), -1, dtype=np.int64),
            paths=np.array([str(file) for file in files]),
        )

    def _split(self) -> dict[str, Samples]:
        options = self.hparams
        found = self.reader.read()
        parts = divide(found, options.split, options.split_seed, options.val_fraction, options.test_fraction)
        if options.augment != "pretrain":
            parts = labelled_only(parts)
        published = self.reader.published_split and options.split in ("auto", "given")
        check_leaks(parts, published, options.allow_leakage)
        return parts

    def _check_train_part(self) -> None:
        check_classes({part: samples.labels for part, samples in self._found.items()}, self.class_names)
        self._labelled_rows()

    def _labelled_rows(self) -> np.ndarray:
        options = self.hparams
        self._store("train")  # may leave unreadable images out
        labels = self._part("train").labels
        return labelled_rows(labels, options.label_fraction, options.labels_per_class, options.label_seed)

    # Images

    def _store(self, part: str) -> ImageStore:
        name = self._resolve(part)
        if name not in self._stores:
            samples = self._part(name)
            self._stores[name] = self._pixels(samples) if samples.paths is None else self._files(name, samples)
        return self._stores[name]

    def _pixels(self, samples: Samples) -> MemoryStore:
        have, want = samples.pixels.shape[3], self.in_channels
        if have == want:
            return MemoryStore(samples.pixels)
        self._warn_once(f"images with {have} channel(s) are converted to the {want} that the model is given")
        if want == 3:
            return MemoryStore(samples.pixels)
        return MemoryStore(_luminance(samples.pixels))

    def _files(self, part: str, samples: Samples) -> ImageStore:
        shorter_side = round(self.image_size / (self.hparams.crop_ratio or self.reader.facts.crop_ratio))
        store = FileStore(samples.paths.tolist(), self.in_channels, shorter_side, self._crops_border)
        if conversion := store.conversion():
            self._warn_once(conversion, topic="conversion")
        keep, skip = self._keeps(part, len(store), shorter_side), self.hparams.on_error == "skip"
        if not keep and not skip:
            return store
        kept, readable, messages = store.read_all(keep, skip)
        if messages:
            shown = "; ".join(messages[:3])
            rank_zero_warn(f"split '{part}': {len(messages)} of {len(samples)} images skipped: {shown}")
            samples = self._replace(part, samples.take(readable))
        return kept or FileStore(samples.paths.tolist(), store.channels, shorter_side, store.crop_border)

    @property
    def _crops_border(self) -> bool:
        chosen = self.hparams.crop_border
        return self.reader.facts.crop_border if chosen is None else chosen

    def _training_store(self) -> ImageStore:
        """Images to augment; RandAugment's recipe cuts small parts out of files at their full size."""
        store = self._store("train")
        paths = self._part("train").paths
        if self.hparams.augment != "randaugment" or paths is None:
            return store
        if "originals" not in self._stores:
            files = FileStore(paths.tolist(), self.in_channels, None, self._crops_border)
            in_memory = self.hparams.cache == "ram"
            self._stores["originals"] = files.read_all(keep=True, skip_unreadable=False)[0] if in_memory else files
        return self._stores["originals"]

    def _replace(self, part: str, samples: Samples) -> Samples:
        if not len(samples):
            raise ValueError(f"split '{part}': none of its images can be read")
        if part == "predict":
            self._predict_samples = samples
        else:
            self._parts[part] = samples
        return samples

    def _keeps(self, part: str, count: int, side: int) -> bool:
        """Whether to hold a part in memory; by itself only if it is read again and again, and small."""
        if part == "train" and self.hparams.augment == "randaugment":
            return False  # training reads the files at their full size
        if self.hparams.cache != "auto":
            return self.hparams.cache == "ram"
        return part in ("train", "val") and count * side * side * self.in_channels * 4 // 3 <= CACHE_LIMIT

    def _warn_once(self, text: str, topic: str | None = None) -> None:
        if (topic or text) not in self._said:
            self._said.add(topic or text)
            rank_zero_warn(text)

    def _training_view(self) -> Augmentation:
        facts, options = self.reader.facts, self.hparams
        recipe = Recipe(options.auto_augment, options.re_prob, options.crop_padding, self.mean, self.std)
        return augmentation(facts.subject, options.augment, self.image_size, facts.in_memory, recipe)

    # Loaders

    def _drops_last(self, length: int) -> bool:
        if self.hparams.drop_last is None and self.hparams.augment == "pretrain":
            return True
        return super()._drops_last(length)

    def _evaluation_loader(self, part: str, rows: np.ndarray | None = None) -> DataLoader:
        store = self._store(part)
        view = CentreView(self.image_size, whole=self.reader.facts.in_memory)
        dataset = ImageDataset(store, self._part(part).labels, rows, view)
        return self._repeatable_evaluation(dataset, BatchBuilder(self.mean, self.std))

    def _workers(self, dataset: ImageDataset) -> int:
        in_memory = isinstance(dataset.store, MemoryStore)
        small = in_memory and len(dataset) <= SMALL_SET and self.image_size <= SMALL_SIDE
        return 0 if small and self.hparams.num_workers is None else super()._workers(dataset)

    # Values

    def _per_channel(self, chosen: Sequence[float] | None, natural: Sequence[float]) -> list[float]:
        values = list(chosen or natural)
        if len(values) == self.in_channels:
            return values
        return values * 3 if self.in_channels == 3 else [sum(values) / len(values)]


def _check_values(options: Any) -> None:
    """Refuse values outside their range before anything is read."""
    at_least = {"image_size": 1, "batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "seed": 0}
    at_least |= {"labels_per_class": 1, "label_seed": 0, "split_seed": 0, "crop_padding": 0}
    check_at_least(options, at_least)
    if not 0 < options.label_fraction <= 1:
        raise ValueError(f"label_fraction is {options.label_fraction}, expected a share in (0, 1]")
    if options.label_fraction != 1 and options.labels_per_class is not None:
        raise ValueError("set either label_fraction or labels_per_class, not both")
    check_new_split(options.val_fraction, options.test_fraction)
    if options.channels not in (None, 1, 3):
        raise ValueError(f"channels is {options.channels}, expected 1 or 3")
    if options.views not in (1, 2):
        raise ValueError(f"views is {options.views}, expected 1 or 2")
    if options.views == 2 and options.augment != "pretrain":
        raise ValueError(f"views is 2 with augment '{options.augment}'; two views need --data.augment pretrain")
    if not 0 <= options.re_prob <= 1:
        raise ValueError(f"re_prob is {options.re_prob}, expected a probability in [0, 1]")
    if options.crop_ratio is not None and not 0 < options.crop_ratio <= 1:
        raise ValueError(f"crop_ratio is {options.crop_ratio}, expected a share in (0, 1], such as 0.875")


def _luminance(pixels: np.ndarray) -> np.ndarray:
    """RGB (N, H, W, 3) to grey (N, H, W, 1) with the weights of ITU-R BT.601."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.stack([np.rint(image @ weights).astype(np.uint8) for image in pixels])[..., None]
