"""Few pictures with a class for each pixel and many without, for semi-supervised segmentation."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.augmentations import SeededPipeline
from datamodules.image_files import UnreadableImageError
from datamodules.label_splits import LabelSplit, check_disjoint, draw_labelled
from datamodules.readers.segmentation_samples import VOID, SegmentationSamples, read_mask_values
from datamodules.repeatable_loaders import check_at_least
from datamodules.sampling import StreamBatchSampler
from datamodules.segmentation_dataset import SegmentationDataset, scaled_size
from datamodules.semantic_segmentation import Layout, SemanticSegmentation, check_scales, pictures_without_masks

if TYPE_CHECKING:
    from albumentations import BasicTransform

MADE_LABELLED = {"shapes": 20, "mosaic": 10}
SMALLEST_CROP = 33  # pixels; the features at a quarter of the size have at least two then, after further halvings
LOOKED_AT = 16
STREAMS = ("labeled", "unlabeled")
TITLES = {"labeled": "labelled", "unlabeled": "unlabelled", "val": "validation", "test": "test"}


class SemiSupervisedSegmentation(SemanticSegmentation):
    """Labelled and unlabelled pictures side by side in training; evaluation as in ``SemanticSegmentation``.

    A training batch is a dictionary: ``labeled`` and ``unlabeled``, each a ``SegmentationBatch`` of crops. The masks of
    ``unlabeled`` are hidden labels, to measure pseudo-labels with and not to learn from; where a picture has none, they
    are 255 throughout. Both streams are endless and shuffled on their own: an epoch is ``images_per_epoch`` labelled
    pictures over all processes, so ``images_per_epoch // (batch_size * processes)`` steps, at least one, however long
    the lists are. The strong view is left to the module, which mixes it with the labels of its teacher.

    Parts are ``labeled`` (also called ``train``), ``unlabeled``, ``val`` and ``test``. Which pictures are labelled is
    drawn (``labeled``) or read (``split_path``); ``shapes`` has 20 labelled ones of 320 and
    ``mosaic`` 10 if neither is given.

    Args:
        layout: See :class:`datamodules.semantic_segmentation.SemanticSegmentation`.
        root: Folder of the data set; not needed for ``shapes`` and ``mosaic``.
        classes: Number of classes of a ``folder`` without ``classes.txt``.
        labeled: Number of labelled pictures, drawn from the training part by ``split_seed``; fewer ones of the same
            seed are among more.
        split_path: Folder of lists, see :class:`datamodules.label_splits.LabelSplit`, instead of ``labeled``.
        unlabeled_path: Folder of further pictures without labels. Those that are labelled, unlabelled, validation or
            test pictures already (the same file) are left out, and counted in a notice, so the folder may be that of
            the data set: with ``labeled``, this is how pictures without a mask, as in ``voc``, take part.
        use_unlabeled: Yield unlabelled pictures; without them, the batches have the key ``labeled`` alone.
        image_size: Side of the crops in pixels, or height and width; None for the data set's usual side.
        train_shorter_side: Length in pixels of the shorter side that the scales multiply; None for the picture's own
            size.
        labeled_scale: Smallest and largest random factor of the size for labelled pictures.
        weak_scale: The same for unlabelled ones, which are then cropped and not changed further.
        flip: Mirror half of the labelled crops left and right; None does so unless a mirrored class is another.
        photometric: Change colours and sharpness of labelled crops.
        test_shorter_side: Length in pixels of the shorter side in evaluation; None for the picture's own size.
        batch_size: Labelled pictures per step and process.
        unlabeled_batch_size: Unlabelled pictures per step and process; None for as many as labelled ones.
        images_per_epoch: Labelled pictures per epoch over all processes.
        eval_batch_size: Pictures per evaluation step and process; more than 1 is of use where all have one size.
        num_workers: Loading processes of each stream; None chooses 0 for what is made in memory, otherwise at most
            2 per process.
        seed: Seed of order and augmentation; None for that of `seed_everything`, or 0.
        split_seed: Seed of the labelled pictures, and of the parts of a ``folder`` that brings none.
        val_fraction: Share of the validation part of such a folder.
        test_fraction: Share of the test part of such a folder.
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

    def __init__(
        self,
        layout: Layout = "shapes",
        root: str | None = None,
        classes: int | None = None,
        labeled: int | None = None,
        split_path: str | None = None,
        unlabeled_path: str | None = None,
        use_unlabeled: bool = True,
        image_size: int | list[int] | None = None,
        train_shorter_side: int | None = None,
        labeled_scale: list[float] = (0.5, 1.5),
        weak_scale: list[float] = (1.0, 1.0),
        flip: bool | None = None,
        photometric: bool = True,
        test_shorter_side: int | None = None,
        batch_size: int = 16,
        unlabeled_batch_size: int | None = None,
        images_per_epoch: int = 2000,
        eval_batch_size: int = 1,
        num_workers: int | None = None,
        seed: int | None = None,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        predict_split: Literal["labeled", "unlabeled", "val", "test"] = "test",
        predict_path: str | None = None,
        main_metric: Literal["miou", "aacc", "macc"] = "miou",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()  # saves the options of this class as well

    def _check_options(self) -> None:
        options = self.hparams
        self._check_shared_options()
        check_at_least(options, {"labeled": 1, "unlabeled_batch_size": 1, "images_per_epoch": 1})
        for name in ("labeled_scale", "weak_scale"):
            check_scales(name, options[name])
        size = options.image_size
        sides = [size] if size is None or isinstance(size, int) else list(size)
        if len(sides) not in (1, 2) or any(side is not None and side < SMALLEST_CROP for side in sides):
            raise ValueError(
                f"image_size is {size}, expected a side of {SMALLEST_CROP} pixels or more, or [height, width] of such"
            )
        if options.labeled is not None and options.split_path is not None:
            raise ValueError(
                f"labeled ({options.labeled}) draws a split and split_path reads one; set either of them, not both "
                "(--data.labeled null takes away what a configuration sets)"
            )
        if options.unlabeled_path is not None and not options.use_unlabeled:
            raise ValueError("unlabeled_path is set, but use_unlabeled is false; set one of them")

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the training crops in pixels."""
        size = self.hparams.image_size or self.reader.facts.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def image_size(self) -> int:
        """Side of the training crops in pixels; the longer one where they are not square."""
        return max(self.crop_size)

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures and masks that the stage needs, and look at some headers before training.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict`` or None for all.
        """
        super().setup(stage)
        if stage in ("fit", None):
            self._look_at_headers()

    def train_dataloader(self) -> CombinedLoader:
        """Labelled and unlabelled batches; order and augmentation are functions of (seed, epoch, step, rank)."""
        datasets = {"labeled": self.train_dataset()}
        if self.hparams.use_unlabeled:
            datasets["unlabeled"] = self.unlabeled_dataset()
        loaders = {name: self._stream(name, dataset) for name, dataset in datasets.items()}
        self._announce(datasets)
        return CombinedLoader(loaders, "max_size_cycle")

    def train_dataset(self) -> SegmentationDataset:
        """The labelled pictures as they are trained on, without a loader."""
        options = self.hparams
        return self._view("labeled", options.labeled_scale, photometric=options.photometric, flip=self.flip)

    def unlabeled_dataset(self) -> SegmentationDataset:
        """The weak view of the unlabelled pictures with their hidden labels, without a loader."""
        return self._view("unlabeled", self.hparams.weak_scale, photometric=False, flip=False)

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of an epoch in each process."""
        return max(1, self.hparams.images_per_epoch // (self.hparams.batch_size * self._ranks["world_size"]))

    # Parts of the data set

    def _part(self, part: str) -> SegmentationSamples:
        return super()._part("labeled" if part == "train" else part)

    def _split(self) -> dict[str, SegmentationSamples]:
        parts = self._drawn() if self.hparams.split_path is None else self._listed(LabelSplit(self.hparams.split_path))
        if self.hparams.unlabeled_path is not None:
            parts["unlabeled"] = SegmentationSamples.join([parts["unlabeled"], self._further(parts)])
        if not len(parts["unlabeled"]):
            del parts["unlabeled"]
            if self.hparams.use_unlabeled:
                raise ValueError(
                    f"all {len(parts['labeled'])} training pictures are labelled, so none is left; set "
                    "--data.unlabeled_path, a smaller --data.labeled, or --data.use_unlabeled false"
                )
        check_disjoint({TITLES[part]: samples for part, samples in parts.items()})
        return parts

    def _further(self, parts: Mapping[str, SegmentationSamples]) -> SegmentationSamples:
        """Pictures of ``unlabeled_path`` whose file is in no part yet."""
        path = self.hparams.unlabeled_path
        found = pictures_without_masks(path, option="unlabeled_path", purpose="further unlabelled pictures")
        files = {part: [image for image in rows.images if isinstance(image, Path)] for part, rows in parts.items()}
        part_of = {file.resolve(): part for part in files for file in files[part]}
        places = [part_of.get(file.resolve()) for file in found.images]
        counts = Counter(part for part in places if part is not None)
        known = ", ".join(f"{counts[part]} {TITLES[part]}" for part in parts if counts[part])
        if counts.total() == len(found) and not len(parts["unlabeled"]):
            raise ValueError(
                f"--data.unlabeled_path '{path}': all of its {len(found)} pictures are in the data set already "
                f"({known}), so none is unlabelled; set it to a folder of others, or --data.use_unlabeled false without"
            )
        if counts:
            rank_zero_info(
                f"--data.unlabeled_path '{path}': {counts.total()} of its {len(found)} pictures are in the data set "
                f"already ({known}) and left out of the further ones"
            )
        return found.take([row for row, part in enumerate(places) if part is None])

    def _drawn(self) -> dict[str, SegmentationSamples]:
        """Parts of which a number of labelled pictures is drawn."""
        options, found = self.hparams, super()._split()
        if "train" not in found:
            raise ValueError(f"the data set has no part 'train', only {', '.join(found)}; add pictures and masks to it")
        train = found["train"]
        count = options.labeled
        if count is None:
            if options.layout in MADE_LABELLED:
                count = MADE_LABELLED[options.layout]
            elif options.unlabeled_path is not None or not options.use_unlabeled:
                count = len(train)
            else:
                raise ValueError(
                    f"which of the {len(train)} training pictures are labelled? Set --data.labeled to a number, or "
                    "--data.split_path to a folder of lists"
                )
        labelled, rest = draw_labelled(len(train), count, options.split_seed)
        evaluation = {part: found[part] for part in ("val", "test") if part in found}
        return {"labeled": train.take(labelled), "unlabeled": train.take(rest), **evaluation}

    def _listed(self, split: LabelSplit) -> dict[str, SegmentationSamples]:
        """Parts as lists name them; validation pictures are the data set's own, or the rest, if no list names them."""
        found = dict(self.reader.read())
        pool = SegmentationSamples.join([samples for part, samples in found.items() if part != "test"])
        parts = {"labeled": split.find("labeled", pool, labelled=True), "unlabeled": SegmentationSamples([], [])}
        optional = not self.hparams.use_unlabeled or self.hparams.unlabeled_path is not None
        if "unlabeled" in split.files or not optional:
            parts["unlabeled"] = split.find("unlabeled", pool, labelled=False)
        if "valid" in split.files:
            if "val" in found and split.names_none_of("valid", pool):
                rank_zero_warn(
                    f"{split.files['valid']}: none of its {len(split.names['valid'])} pictures is in the training or "
                    f"validation part of the data set, whose own {len(found['val'])} validation pictures are taken"
                )
            else:
                found["val"] = split.find("valid", pool, labelled=True)
        elif "all" in found:
            listed = {*parts["labeled"].ids, *parts["unlabeled"].ids}
            found["val"] = pool.take([row for row, name in enumerate(pool.ids) if name not in listed])
        return parts | {part: found[part] for part in ("val", "test") if part in found}

    def _look_at_headers(self) -> None:
        """Refuse crops that no labelled picture fills, and tell of pictures that are not RGB or smaller than a crop."""
        samples = self._part("labeled")
        seen = [_header(samples.images[row]) for row in _spread(len(samples))]
        other = [mode for _, mode in seen if mode != "RGB"]
        if other:
            rank_zero_warn(
                f"{len(other)} of {len(seen)} labelled pictures looked at are {', '.join(sorted(set(other)))}; such "
                "pictures are converted to RGB"
            )
        self._look_at_masks(samples)
        if not self._fills_crop(self._largest(size for size, _ in seen)):
            self._check_crop(samples)
        if self.hparams.use_unlabeled:
            self._tell_small_pictures(self._part("unlabeled"))

    def _check_crop(self, samples: SegmentationSamples) -> None:
        """Refuse crops that no labelled picture fills, which takes the headers of all of them."""
        largest = self._largest(_header(image)[0] for image in samples.images)
        for name, side, longest in zip(("height", "width"), self.crop_size, largest, strict=True):
            if side > longest:
                raise ValueError(
                    f"image_size asks for crops of {name} {side}, but the labelled pictures have at most {longest} "
                    f"pixels at the largest labeled_scale {self.hparams.labeled_scale[1]}, so each crop would be "
                    f"padded; set --data.image_size to {list(largest)} or less"
                )

    def _tell_small_pictures(self, samples: SegmentationSamples) -> None:
        """Tell of unlabelled pictures whose crops are padded at any scale."""
        rows, scale, crop = _spread(len(samples)), self.hparams.weak_scale[1], self.crop_size
        sizes = {row: _header(samples.images[row])[0] for row in rows}
        small = [row for row in rows if not self._fills_crop(self._scaled(sizes[row], scale))]
        if small:
            name, (height, width) = samples.ids[small[0]], sizes[small[0]]
            rank_zero_warn(
                f"{len(small)} of {len(rows)} unlabelled pictures looked at are smaller than the crops of "
                f"{crop[1]}x{crop[0]} pixels even at the largest weak_scale {scale}, such as '{name}' of "
                f"{width}x{height}; their crops are padded with reflections, unless --data.image_size is smaller or "
                "--data.train_shorter_side enlarges them"
            )

    def _largest(self, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Largest height and width that labelled pictures of such sizes get."""
        heights, widths = zip(*(self._scaled(size, self.hparams.labeled_scale[1]) for size in sizes), strict=True)
        return max(heights), max(widths)

    def _scaled(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        return scaled_size(size, self.hparams.train_shorter_side, scale)

    def _fills_crop(self, size: tuple[int, int]) -> bool:
        return all(have >= side for have, side in zip(size, self.crop_size, strict=True))

    def _look_at_masks(self, samples: SegmentationSamples) -> None:
        """Tell of masks in which there is nothing to tell apart, as where an object is stored as 255, which is void."""
        rows, found, void = _spread(len(samples)), set(), set()
        for mask, name in ((samples.masks[row], samples.ids[row]) for row in rows):
            values = read_mask_values(mask)
            labels = self.reader.facts.class_indices(values, str(mask) if isinstance(mask, Path) else name)
            found.update(np.unique(labels[labels != VOID]).tolist())
            void.update(np.unique(values[labels == VOID]).tolist())
        if len(found) < 2:
            shown = ", ".join(self.class_names[label] for label in sorted(found)) or "no class"
            rank_zero_warn(
                f"the {len(rows)} labelled masks looked at show {shown} "
                + (
                    f"and void (stored as {', '.join(map(str, sorted(void)))}) alone; an object that is stored so has "
                    "to be given the value of its class"
                    if void
                    else "alone; label pictures of other classes as well"
                )
            )

    # Loaders

    def _view(self, part: str, scale_range: Sequence[float], *, photometric: bool, flip: bool) -> SegmentationDataset:
        build = partial(
            _view_transforms,
            size=self.crop_size,
            shorter_side=self.hparams.train_shorter_side,
            scale_range=tuple(scale_range),
            photometric=photometric,
            flip=flip,
        )
        pipeline, view = SeededPipeline(build), STREAMS.index(part)
        return SegmentationDataset(self._part(part), self.reader.facts, pipeline, seed=self.seed, view=view)

    def _stream(self, name: str, dataset: SegmentationDataset) -> DataLoader:
        batch_size = self._stream_batch_size(name)
        processes = self._ranks["world_size"]
        if batch_size * processes > len(dataset):
            option = "batch_size" if name == "labeled" else "unlabeled_batch_size"
            fewest = 2 * processes  # pictures are mixed with others, and a BatchNorm needs two as well
            raise ValueError(
                f"the {len(dataset)} {TITLES[name]} pictures are fewer than one step takes ({batch_size} on each of "
                f"{processes} process(es)); "
                + (
                    f"set --data.{option} to at most {len(dataset) // processes}"
                    if len(dataset) >= fewest
                    else f"{fewest} is the least, so give more of them"
                )
            )
        sampler = StreamBatchSampler(
            len(dataset),
            batch_size,
            self.steps_per_epoch,
            seed=self.seed,
            stream=STREAMS.index(name),
            trainer=self.trainer if self.trainer is not None and self.trainer.training else None,
            **self._ranks,
        )
        return self._loader(dataset, sampler, self._batches)

    def _stream_batch_size(self, name: str) -> int:
        own = self.hparams.unlabeled_batch_size if name == "unlabeled" else None
        return own or self.hparams.batch_size

    def _announce(self, datasets: dict[str, SegmentationDataset]) -> None:
        counts = ", ".join(f"{len(samples)} {TITLES[part]}" for part, samples in self._parts.items())
        sizes = " + ".join(f"{self._stream_batch_size(name)} {TITLES[name]}" for name in datasets)
        rank_zero_info(
            f"Pictures: {counts}. An epoch is {self.steps_per_epoch} steps of {sizes} on each of "
            f"{self._ranks['world_size']} process(es)."
        )


def _view_transforms(**settings: Any) -> "Sequence[BasicTransform]":
    from datamodules.mask_transforms import view_transforms

    return view_transforms(**settings)


def _header(image: Path | np.ndarray) -> tuple[tuple[int, int], str]:
    """Height, width and mode of a picture, without its pixels."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return image.shape[:2], "RGB"
    try:
        with Image.open(image) as opened:
            return (opened.height, opened.width), opened.mode
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{image}: cannot be decoded ({error}); replace the file") from error


def _spread(count: int) -> list[int]:
    """Some rows of so many, evenly spread."""
    return sorted({row * count // LOOKED_AT for row in range(LOOKED_AT)})
