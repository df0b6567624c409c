"""Labelled and unlabelled pictures side by side: parts, views, streams, and what is wrong with data."""

import logging
import shutil
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image, ImageFilter

from callbacks import ExactResume
from datamodules import SegmentationBatch, SemanticSegmentation, SemiSupervisedSegmentation
from datamodules.augmentations import SeededPipeline
from datamodules.image_files import UnreadableImageError
from datamodules.mask_transforms import ReflectPad, view_transforms
from datamodules.readers.mask_folder import MaskFolderReader
from tests.data_layouts import (
    halves,
    save_image,
    save_mask,
    write_camvid,
    write_cityscapes,
    write_label_split,
    write_mask_folder,
    write_voc,
)
from tests.distributed import run_ranks
from tests.modules.toy_images import quiet_trainer
from tests.noisy_training import SaveAtStep

CAMVID = [f"0001TP_{row:06d}" for row in range(6)]
CAMVID_VAL = [f"0001TP_{row:06d}" for row in range(100, 103)]
VOC = [f"2007_{number:06d}" for number in range(10)]
SMALL = {"image_size": [34, 40], "batch_size": 2, "labeled_scale": [0.9, 1.2]}


def data(layout="shapes", root=None, **kwargs):
    options = {"num_workers": 0, **kwargs}
    return SemiSupervisedSegmentation(layout=layout, root=str(root) if root else None, **options)


def first_batch(module):
    module.setup("fit")
    return next(iter(module.train_dataloader()))[0]


def parts(module):
    return {part: module.sample_ids(part) for part in ("labeled", "unlabeled", "val")}


# Parts


def test_shapes_have_twenty_labels_by_default():
    module = data()
    assert {part: len(ids) for part, ids in parts(module).items()} == {"labeled": 20, "unlabeled": 300, "val": 80}
    assert module.sample_ids("train") == module.sample_ids("labeled")
    assert len(module.sample_ids("test")) == 80
    everything = SemanticSegmentation().sample_ids("train")
    assert sorted(module.sample_ids("labeled") + module.sample_ids("unlabeled")) == everything


def test_fewer_labels_of_one_seed_are_among_more(tmp_path):
    write_camvid(tmp_path)
    chosen = {count: set(data("camvid", tmp_path, labeled=count).sample_ids("labeled")) for count in (1, 2, 4)}
    assert chosen[1] < chosen[2] < chosen[4] < set(CAMVID)
    others = [set(data("camvid", tmp_path, labeled=2, split_seed=seed).sample_ids("labeled")) for seed in range(1, 6)]
    assert any(other != chosen[2] for other in others)


def test_lists_in_the_official_format(tmp_path):
    write_camvid(tmp_path / "data")
    split = write_label_split(tmp_path / "2/0", [CAMVID[4], CAMVID[1]], CAMVID[2:4], CAMVID_VAL[:2])
    module = data("camvid", tmp_path / "data", split_path=str(split))
    assert parts(module) == {
        "labeled": [CAMVID[4], CAMVID[1]],
        "unlabeled": CAMVID[2:4],
        "val": CAMVID_VAL[:2],
    }
    assert len(module.sample_ids("test")) == 3


def test_without_a_list_of_validation_pictures_they_are_those_of_the_data_set(tmp_path):
    write_camvid(tmp_path / "data")
    split = write_label_split(tmp_path / "lists", CAMVID[:1], CAMVID[1:])
    assert data("camvid", tmp_path / "data", split_path=str(split)).sample_ids("val") == CAMVID_VAL


def test_the_rest_of_a_folder_without_parts_is_for_validation(tmp_path):
    write_mask_folder(tmp_path / "data", ["a", "b", "c", "d"])
    split = write_label_split(tmp_path / "lists", ["d"], ["a"])
    assert data("folder", tmp_path / "data", split_path=str(split)).sample_ids("val") == ["b", "c"]


def test_lists_of_voc_may_name_pictures_without_masks(tmp_path):
    """As the official split does with the release that lacks the masks of SBD."""
    root = write_voc(tmp_path, augmented=False)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/labeled.txt").write_text(f"JPEGImages/{VOC[0]}.jpg SegmentationClass/{VOC[0]}.png\n")
    (tmp_path / "lists/unlabeled.txt").write_text("\n".join([VOC[2], *VOC[5:]]))
    module = data("voc", root, split_path=str(tmp_path / "lists"))
    assert parts(module) == {"labeled": VOC[:1], "unlabeled": [VOC[2], *VOC[5:]], "val": VOC[3:5]}
    hidden = [module.unlabeled_dataset().read(row)[1] for row in range(6)]
    assert np.unique(hidden[0]).tolist() == [2, 18, 255]
    assert all((mask == 255).all() for mask in hidden[1:])
    lists = write_label_split(tmp_path / "2/0", [VOC[0], VOC[6]], VOC[1:3])
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 pictures have no mask: {VOC[6]} is missing"):
        data("voc", root, split_path=str(lists)).setup("fit")


def test_the_test_frames_that_the_official_list_of_cityscapes_calls_valid(tmp_path):
    write_cityscapes(tmp_path / "data")
    names = SemanticSegmentation("cityscapes", str(tmp_path / "data")).sample_ids("train")
    split = write_label_split(tmp_path / "2/3407", names[:2], names[2:], ["berlin_000000_000019_leftImg8bit"])
    module = data("cityscapes", tmp_path / "data", split_path=str(split))
    with pytest.warns(UserWarning, match=r"valid_filename.txt: none of its 1 pictures is in the .* own 2 validation"):
        assert module.sample_ids("val") == ["lindau_000006_000019_leftImg8bit", "munster_000007_000019_leftImg8bit"]


def test_a_folder_of_further_pictures_is_unlabelled(tmp_path):
    write_camvid(tmp_path / "data")
    for seed, name in enumerate(("x.jpg", "deep/y.png")):
        save_image(tmp_path / "more" / name, seed=50 + seed, size=(60, 44))
    module = data("camvid", tmp_path / "data", unlabeled_path=str(tmp_path / "more"), **SMALL)
    assert parts(module) == {"labeled": CAMVID, "unlabeled": ["deep/y", "x"], "val": CAMVID_VAL}
    batch = first_batch(module)["unlabeled"]
    assert batch.images.shape == (2, 3, 34, 40)
    assert (batch.masks == 255).all()
    some = data("camvid", tmp_path / "data", unlabeled_path=str(tmp_path / "more"), labeled=2)
    assert len(some.sample_ids("unlabeled")) == 4 + 2


@pytest.mark.parametrize(
    ("labeled", "told"),
    [
        (None, "5 of its 10 pictures are in the data set already (3 labelled, 2 validation)"),
        (3, "5 of its 10 pictures are in the data set already (3 labelled, 2 validation)"),
        (2, "5 of its 10 pictures are in the data set already (2 labelled, 1 unlabelled, 2 validation)"),
    ],
)
def test_the_folder_of_further_pictures_may_be_that_of_the_data_set(tmp_path, caplog, labeled, told):
    """As with VOC alone, most of whose pictures have no mask."""
    folder = write_voc(tmp_path, augmented=False) / "VOCdevkit/VOC2012/JPEGImages"
    with caplog.at_level(logging.INFO):
        found = parts(data("voc", tmp_path, labeled=labeled, unlabeled_path=str(folder)))
    assert sorted(found["labeled"] + found["unlabeled"]) == VOC[:3] + VOC[5:]
    assert found["val"] == VOC[3:5]
    assert caplog.messages == [f"--data.unlabeled_path '{folder}': {told} and left out of the further ones"]


def test_every_part_can_be_predicted(tmp_path):
    write_camvid(tmp_path)
    for part, count in (("labeled", 2), ("unlabeled", 4), ("val", 3), ("test", 3)):
        module = data("camvid", tmp_path, labeled=2, predict_split=part)
        assert module.sample_ids(None) == module.sample_ids(part)
        assert len(list(module.predict_dataloader())) == count


# Facts and batches


def test_facts_are_known_right_after_construction(tmp_path):
    module = data("camvid", write_camvid(tmp_path), image_size=[36, 48])
    assert (module.num_classes, module.in_channels, module.main_metric) == (11, 3, "miou")
    assert (module.crop_size, module.image_size) == ((36, 48), 48)
    assert module.class_names[3] == "Road"
    assert module.palette[3] == [128, 64, 128]
    assert module.mean == [0.485, 0.456, 0.406]
    assert data("camvid", tmp_path).crop_size == (320, 320)


def test_a_batch_has_both_streams(tmp_path):
    module = data("camvid", write_camvid(tmp_path), labeled=2, unlabeled_batch_size=3, images_per_epoch=7, **SMALL)
    module.setup("fit")
    loader = module.train_dataloader()
    batches = [batch for batch, _, _ in loader]
    assert len(batches) == len(loader) == 3, "seven pictures make three steps of two"
    for batch in batches:
        assert set(batch) == {"labeled", "unlabeled"}
        for name, count in (("labeled", 2), ("unlabeled", 3)):
            assert isinstance(batch[name], SegmentationBatch)
            assert batch[name].images.shape == (count, 3, 34, 40)
            assert batch[name].images.dtype == torch.float32
            assert batch[name].masks.shape == (count, 34, 40)
            assert batch[name].masks.dtype == torch.int64
            assert batch[name].index.shape == (count,)
    assert sorted(torch.cat([batch["labeled"].index for batch in batches]).tolist()) == [0, 0, 0, 1, 1, 1]
    assert all((batch["unlabeled"].masks != 255).any() for batch in batches), "the hidden labels"


def test_training_without_unlabelled_pictures(tmp_path):
    write_camvid(tmp_path)
    options = {"labeled": 2, "images_per_epoch": 8, **SMALL}
    both, alone = (data("camvid", tmp_path, use_unlabeled=use, **options) for use in (True, False))
    for module in (both, alone):
        module.setup("fit")
    with_unlabelled, without = ([batch for batch, _, _ in module.train_dataloader()] for module in (both, alone))
    assert len(with_unlabelled) == len(without) == 4
    for one, other in zip(with_unlabelled, without, strict=True):
        assert set(other) == {"labeled"}
        assert torch.equal(one["labeled"].images, other["labeled"].images)
        assert torch.equal(one["labeled"].masks, other["labeled"].masks)


def test_the_streams_are_ordered_and_cropped_apart(tmp_path):
    """Labelled and unlabelled pictures of one row number share neither place in the order nor crop."""
    write_camvid(tmp_path, counts=(40, 1, 1))
    module = data("camvid", tmp_path, labeled=20, batch_size=20, image_size=33, labeled_scale=[1, 1], photometric=False)
    batch = first_batch(module)
    assert batch["labeled"].index.sort().values.tolist() == batch["unlabeled"].index.sort().values.tolist()
    assert batch["labeled"].index.tolist() != batch["unlabeled"].index.tolist()
    # The first row of a mask is void: only a crop at the upper border has it.
    tops = {name: (batch[name].masks[:, 0] == 255).all(1)[batch[name].index.argsort()] for name in batch}
    assert tops["labeled"].tolist() != tops["unlabeled"].tolist()
    assert all(0 < top.sum() < 20 for top in tops.values())


def test_the_counts_are_told_at_the_start(tmp_path, caplog):
    module = data("camvid", write_camvid(tmp_path), labeled=2, images_per_epoch=9, **SMALL)
    module.setup("fit")
    with caplog.at_level(logging.INFO):
        module.train_dataloader()
    assert caplog.messages == [
        "Pictures: 2 labelled, 4 unlabelled, 3 validation, 3 test. "
        "An epoch is 4 steps of 2 labelled + 2 unlabelled on each of 1 process(es)."
    ]


def test_evaluation_is_that_of_semantic_segmentation(tmp_path):
    write_camvid(tmp_path)
    ours = data("camvid", tmp_path, labeled=2, test_shorter_side=18)
    plain = SemanticSegmentation("camvid", str(tmp_path), num_workers=0, test_shorter_side=18)
    for one, other in zip(ours.val_dataloader(), plain.val_dataloader(), strict=True):
        assert one.images.shape == (1, 3, 18, 24)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.masks, other.masks)


# Views


def through(pipeline, image, mask, rows=1):
    return [pipeline.apply((0, 0, 0, row, 0), image=image, mask=mask) for row in range(rows)]


@pytest.mark.parametrize("size", [(30, 50), (70, 20), (11, 7), (3, 2), (1, 1), (90, 90)])
def test_padding_reflects_as_often_as_needed(size):
    random = np.random.RandomState(0)
    image = random.randint(0, 256, (*size, 3), dtype=np.uint8)
    mask = random.randint(0, 5, size, dtype=np.uint8)
    (found,) = through(SeededPipeline(lambda: [ReflectPad((64, 64))]), image, mask)
    below, right = max(0, 64 - size[0]), max(0, 64 - size[1])
    assert np.array_equal(found["image"], np.pad(image, ((0, below), (0, right), (0, 0)), mode="reflect"))
    assert np.array_equal(found["mask"], np.pad(mask, ((0, below), (0, right)), constant_values=255))


def test_the_weak_view_is_a_crop_and_nothing_else(tmp_path):
    module = data("camvid", write_camvid(tmp_path), labeled=2, image_size=33)
    dataset, places = module.unlabeled_dataset(), set()
    for epoch in range(8):
        for row in range(4):
            image, mask = dataset.read(row)
            sample = dataset[(epoch, 0, row)]
            windows = np.lib.stride_tricks.sliding_window_view(image, (33, 33, 3))[:, :, 0]
            ((top, left),) = np.argwhere((windows == sample.image).all((2, 3, 4)))
            assert np.array_equal(sample.mask, mask[top : top + 33, left : left + 33])
            places.add((top, left))
    assert len(places) > 16


def test_scaling_changes_picture_and_mask_alike_and_pads_with_void():
    mask = np.kron(np.random.RandomState(0).randint(0, 11, (6, 8)), np.ones((12, 12))).astype(np.uint8)
    image = np.repeat(mask[..., None] * 20, 3, axis=2)
    pipeline = SeededPipeline(lambda: view_transforms((80, 64), None, (0.5, 1.5), photometric=False, flip=True))
    padded = []
    for found in through(pipeline, image, mask, rows=40):
        seen, labels = found["image"][..., 0], found["mask"]
        assert seen.shape == labels.shape == (80, 64)
        inside = labels != 255
        assert (np.abs(seen[inside] - 20.0 * labels[inside]) <= 10).mean() > 0.8
        padded.append(80 - inside.any(1).sum())
    # A height of 72 is scaled to 36..108 and padded to 80; up to 80 / 72 is so in 61 % of the draws.
    assert 36 <= max(padded) <= 44
    assert 0.4 < np.mean(np.array(padded) > 0) < 0.8


def test_labelled_views_are_changed_in_colour_and_sharpness():
    image = np.full((40, 40, 3), (200, 120, 60), np.uint8)
    image[::2, ::2] += 20
    mask = np.zeros((40, 40), np.uint8)
    pipeline = SeededPipeline(lambda: view_transforms((40, 40), None, (1, 1), photometric=True, flip=False))
    views = [found["image"] for found in through(pipeline, image, mask, rows=300)]
    untouched = np.mean([np.array_equal(view, image) for view in views])
    # Without jitter, and without blur or with one of a radius below 2/7 pixels, whose kernel is a single pixel.
    narrow = (2 / 7 - 0.15) / (1.15 - 0.15)
    assert untouched == pytest.approx(0.2 * (0.5 + 0.5 * narrow), abs=0.06)
    brightness = np.array([view.max(2).mean() for view in views]) / image.max(2).mean()
    assert 0.6 < brightness.min() < 0.8
    assert brightness.max() > 1.1
    red_is_largest = np.mean([view.reshape(-1, 3).mean(0).argmax() == 0 for view in views])
    assert 0.6 < red_is_largest < 0.95, "a hue of up to a quarter turn makes some pictures green or blue"


def test_the_blur_is_that_of_a_gaussian_radius_as_pillow_has_it():
    import albumentations as alb

    image = np.random.RandomState(0).randint(0, 256, (48, 48, 3), dtype=np.uint8)
    (found,) = through(
        SeededPipeline(lambda: [alb.GaussianBlur(blur_limit=0, sigma_limit=(1.0, 1.0), p=1)]), image, image[..., 0]
    )
    pillow = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.0)), float)
    inner = (slice(4, -4), slice(4, -4))
    assert np.abs(found["image"][inner] - pillow[inner]).mean() < 3
    assert np.abs(image[inner] - pillow[inner]).mean() > 40


def test_labelled_views_are_mirrored_half_of_the_time_unless_that_changes_the_class():
    options = {"photometric": False, "labeled_scale": [1, 1]}
    as_is, asked = data(**options).train_dataset(), data(flip=True, **options).train_dataset()
    assert all(np.array_equal(as_is[(0, 0, row)].mask, as_is.read(row)[1]) for row in range(20))
    same = [np.array_equal(asked[(epoch, 0, row)].mask, asked.read(row)[1]) for epoch in (0, 1) for row in range(20)]
    assert 8 < sum(same) < 32


def test_pictures_are_scaled_from_a_shorter_side(tmp_path):
    module = data("camvid", write_camvid(tmp_path), labeled=2, train_shorter_side=72, image_size=[72, 96])
    image = module.unlabeled_dataset()[(0, 0, 0)].image
    assert image.shape == (72, 96, 3), "36 x 48 doubled"


# Streams over epochs, resumption and processes


class Collect(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.steps = []

    def training_step(self, batch, batch_idx):
        seen = [(name, part.index.tolist(), float(part.images.sum())) for name, part in batch.items()]
        self.steps.append((self.current_epoch, *seen))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def collected(root, trainer, ckpt_path=None, **options):
    module = Collect()
    pictures = data("camvid", root, labeled=2, unlabeled_batch_size=3, **SMALL, **options)
    trainer.fit(module, datamodule=pictures, ckpt_path=ckpt_path, weights_only=True)
    return module.steps


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumes_with_the_very_next_batches_of_both_streams(tmp_path, workers):
    root = write_camvid(tmp_path / "data")
    options = {"images_per_epoch": 6, "num_workers": workers}

    def trainer(step):
        return quiet_trainer(max_epochs=3, callbacks=[ExactResume(), SaveAtStep(step, tmp_path / f"{step}.ckpt")])

    for step in (2, 5) if workers else (1, 2, 3, 5, 8):
        full = collected(root, trainer(step), **options)
        assert [epoch for epoch, *_ in full] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert len({repr(seen) for seen in full}) == 9
        rest = collected(root, trainer(0), tmp_path / f"{step}.ckpt", **options)
        assert rest == full[step:]


def test_loading_processes_change_nothing(tmp_path):
    root = write_camvid(tmp_path)
    alone, shared = (
        collected(root, quiet_trainer(max_epochs=2), images_per_epoch=6, num_workers=count) for count in (0, 2)
    )
    assert alone == shared


def test_both_streams_go_on_over_epochs(tmp_path):
    """Four unlabelled pictures in batches of three: each is seen as often as any other, up to one."""
    steps = collected(write_camvid(tmp_path), quiet_trainer(max_epochs=4), images_per_epoch=4)
    assert len(steps) == 8
    for place, count, size in ((1, 2, 2), (2, 4, 3)):
        rows = [row for step in steps for row in step[place][1]]
        assert len(rows) == 8 * size
        passes = [rows[start : start + count] for start in range(0, len(rows), count)]
        assert all(sorted(one) == list(range(count)) for one in passes)
        assert len({tuple(one) for one in passes}) > 1


def four_labelled(root):
    return data("camvid", root, labeled=4, images_per_epoch=8, **SMALL)


def collect_on_a_rank(rank, root):
    module = Collect()
    trainer = quiet_trainer(strategy="ddp", devices=2, use_distributed_sampler=False, max_epochs=2)
    trainer.fit(module, datamodule=four_labelled(root))
    return module.steps


def test_two_ranks_share_what_one_process_sees_in_twice_the_steps(tmp_path):
    root = str(write_camvid(tmp_path, counts=(8, 2, 2)))
    ranks = run_ranks(collect_on_a_rank, 2, root)
    module = Collect()
    quiet_trainer(max_epochs=2).fit(module, datamodule=four_labelled(root))
    assert [len(steps) for steps in ranks] == [4, 4]
    assert len(module.steps) == 8
    assert [step for turn in zip(*ranks, strict=True) for step in turn] == module.steps


# What is wrong with data


def split_data(tmp_path, labeled, unlabeled, valid=None, folder="lists", **options):
    root = tmp_path / "data"
    if not root.exists():
        write_camvid(root)
    lists = write_label_split(tmp_path / folder, labeled, unlabeled, valid)
    return data("camvid", root, split_path=str(lists), **options)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ((CAMVID[:2], CAMVID[1:]), rf"1 picture\(s\) are both labelled and unlabelled: {CAMVID[1]}"),
        ((CAMVID[:2], CAMVID[2:], CAMVID[1:3]), rf"1 picture\(s\) are both labelled and validation: {CAMVID[1]}"),
        (([*CAMVID[:2], CAMVID_VAL[0]], CAMVID[2:]), rf"1 picture.* both labelled and validation: {CAMVID_VAL[0]}"),
        ((CAMVID[:2], [*CAMVID[2:], *CAMVID_VAL]), rf"3 picture.* both unlabelled and validation: {CAMVID_VAL[0]}"),
    ],
)
def test_a_picture_in_two_lists(tmp_path, lists, message):
    with pytest.raises(ValueError, match=message):
        split_data(tmp_path, *lists).setup("fit")


def test_lists_of_another_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"labeled_filename.txt: 2 of 2 names have no picture .*: {VOC[0]}, "):
        split_data(tmp_path, VOC[:2], VOC[2:]).setup("fit")


def test_a_list_of_validation_pictures_some_of_which_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"valid_filename.txt: 1 of 2 names have no picture .*: nowhere"):
        split_data(tmp_path, CAMVID[:2], CAMVID[2:], [CAMVID_VAL[0], "nowhere"]).setup("fit")


def test_lists_that_do_not_fit_the_name_of_their_folder(tmp_path):
    with pytest.raises(ValueError, match=r"lists 2 pictures, but its folder '46' says 46"):
        split_data(tmp_path, CAMVID[:2], CAMVID[2:], folder="46/0").setup("fit")


def test_the_unlabelled_list_may_be_missing_where_it_is_not_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"unlabeled_filename.txt or unlabeled.txt is missing"):
        split_data(tmp_path, CAMVID[:2], None).setup("fit")
    module = split_data(tmp_path, CAMVID[:2], None, use_unlabeled=False)
    assert module.sample_ids("labeled") == CAMVID[:2]


def test_no_word_on_which_pictures_are_labelled(tmp_path):
    with pytest.raises(ValueError, match=r"which of the 6 training pictures are labelled\? Set --data.labeled to a"):
        data("camvid", write_camvid(tmp_path)).setup("fit")


def test_all_pictures_are_labelled(tmp_path):
    with pytest.raises(ValueError, match=r"all 6 training pictures are labelled, so none is left; set --data.un"):
        data("camvid", write_camvid(tmp_path), labeled=6).setup("fit")
    assert len(data("camvid", tmp_path, labeled=6, use_unlabeled=False).sample_ids("labeled")) == 6


@pytest.mark.parametrize(("folder", "known"), [("train", "6 labelled"), ("val", "3 validation")])
def test_further_pictures_that_are_all_in_the_data_set(tmp_path, folder, known):
    write_camvid(tmp_path)
    with pytest.raises(ValueError, match=rf"all of its \d+ pictures are in the data set already \({known}\), so none"):
        data("camvid", tmp_path, unlabeled_path=str(tmp_path / folder)).setup("fit")


def test_a_folder_of_further_pictures_that_holds_none(tmp_path):
    write_camvid(tmp_path / "data")
    (tmp_path / "more").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--data.unlabeled_path '.*more': no image found"):
        data("camvid", tmp_path / "data", unlabeled_path=str(tmp_path / "more")).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 3},
            r"the 2 labelled pictures are fewer than one step takes \(3 on each of 1 .*batch_size to at",
        ),
        (
            {"unlabeled_batch_size": 5},
            r"the 4 unlabelled pictures are fewer .*--data.unlabeled_batch_size to at most",
        ),
    ],
)
def test_a_batch_that_is_larger_than_its_list(tmp_path, options, message):
    module = data("camvid", write_camvid(tmp_path), labeled=2, **{**SMALL, **options})
    module.setup("fit")
    with pytest.raises(ValueError, match=message):
        module.train_dataloader()


def fail_on_a_rank(rank, root):
    trainer = quiet_trainer(strategy="ddp", devices=2, use_distributed_sampler=False)
    with pytest.raises(ValueError, match=r"the 2 labelled pictures are fewer than one step takes \(2 on each of 2 pro"):
        collected(root, trainer)
    return True


def test_processes_that_together_take_more_than_the_list(tmp_path):
    assert run_ranks(fail_on_a_rank, 2, str(write_camvid(tmp_path))) == [True, True]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (60, r"crops of height 60, but the labelled pictures have at most 36 pixels .*--data.image_size to \[36, 48\]"),
        ([36, 50], r"crops of width 50, but the labelled pictures have at most 48 pixels at the largest labeled_scale"),
    ],
)
def test_a_crop_that_no_picture_fills(tmp_path, size, message):
    module = data("camvid", write_camvid(tmp_path), labeled=2, image_size=size, labeled_scale=[0.5, 1.0])
    with pytest.raises(ValueError, match=message):
        module.setup("fit")
    data("camvid", tmp_path, labeled=2, image_size=[36, 48], labeled_scale=[0.5, 1.0]).setup("fit")
    data("camvid", tmp_path, labeled=2, image_size=60, labeled_scale=[0.5, 2.0]).setup("fit")


def write_sizes(root, part, sizes):
    """CamVid with the training or validation pictures of the given (width, height), in the order of their names."""
    for row, size in enumerate(sizes):
        (path,) = root.glob(f"{part}/*_{row:06d}.jpg")
        save_image(path, seed=row, size=size)
        save_mask(root / f"{part}annot/{path.stem}.png", halves(1, 2, size, void=11))


def test_a_crop_that_only_pictures_not_looked_at_first_fill(tmp_path):
    write_camvid(tmp_path, counts=(32, 1, 1))
    options = {"labeled": 32, "use_unlabeled": False, "labeled_scale": [1, 1]}
    write_sizes(tmp_path, "train", [(40, 36), (200, 180)] * 16)
    data("camvid", tmp_path, image_size=128, **options).setup("fit")
    with pytest.raises(ValueError, match=r"crops of width 201, but .* at most 200 .* to \[180, 200\] or less"):
        data("camvid", tmp_path, image_size=[128, 201], **options).setup("fit")


def test_unlabelled_pictures_smaller_than_the_crop_are_told(tmp_path):
    write_camvid(tmp_path, counts=(12, 1, 1))
    module = data("camvid", tmp_path, labeled=2, image_size=128, labeled_scale=[1, 1])
    small = set(module.sample_ids("unlabeled"))
    names = sorted(path.stem for path in (tmp_path / "train").iterdir())
    write_sizes(tmp_path, "train", [(40, 36) if name in small else (200, 180) for name in names])
    message = rf"10 of 10 unlabelled .* crops of 128x128 pixels .* weak_scale 1.0, such as '{min(small)}' of 40x36; "
    with pytest.warns(UserWarning, match=message):
        module.setup("fit")
    enough = {"labeled": 2, "image_size": 128, "weak_scale": [1.0, 4.0], "labeled_scale": [1, 1]}
    for options in (enough, enough | {"weak_scale": [1.0, 1.0], "use_unlabeled": False}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data("camvid", tmp_path, **options).setup("fit")


def test_the_default_crop_of_a_data_set_whose_pictures_are_made_smaller(tmp_path):
    with pytest.raises(ValueError, match=r"crops of height 320, but .* at most 54 .*--data.image_size to \[54, 72\]"):
        data("camvid", write_camvid(tmp_path), labeled=2, train_shorter_side=36).setup("fit")


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_pictures_of_another_kind_are_converted_and_told(tmp_path, mode):
    write_camvid(tmp_path)
    for name in CAMVID:
        path = tmp_path / f"train/{name}.jpg"
        picture = Image.open(path).convert(mode)
        if mode in ("RGBA", "P"):  # no such jpg; the reader takes any suffix
            path.unlink()
            path = path.with_suffix(".png")
        picture.save(path)
    module = data("camvid", tmp_path, labeled=6, use_unlabeled=False, **SMALL)
    with pytest.warns(UserWarning, match=rf"6 of 6 labelled pictures looked at are {mode}; .* converted to RGB"):
        module.setup("fit")
    image, _ = module.train_dataset().read(0)
    expected = np.asarray(Image.open(module._part("labeled").images[0]).convert("RGB"))
    assert image.shape == (36, 48, 3)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_stretched(tmp_path, mode):
    write_camvid(tmp_path)
    ramp = np.linspace(3000, 63000, 36 * 48).reshape(36, 48)
    (tmp_path / f"train/{CAMVID[0]}.jpg").unlink()
    picture = Image.fromarray(ramp.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    picture.save(tmp_path / f"train/{CAMVID[0]}.tif")
    module = data("camvid", tmp_path, labeled=6, use_unlabeled=False, **SMALL)
    module.setup("fit")
    image, _ = module.train_dataset().read(module.sample_ids("labeled").index(CAMVID[0]))
    expected = 255 * (ramp - ramp.min()) / (ramp.max() - ramp.min())
    np.testing.assert_allclose(image, np.repeat(expected[..., None], 3, axis=2), atol=1)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (
            0,
            255,
            r"show kind 0 and void \(stored as 255\) alone; an object that is stored so has to be given",
        ),
        (255, 255, r"show no class and void \(stored as 255\) alone; an object that is stored so"),
        (1, 1, r"show kind 1 alone; label pictures of other classes as well"),
    ],
)
def test_masks_in_which_there_is_nothing_to_tell_apart(tmp_path, left, right, message):
    names = [f"p{number}" for number in range(8)]
    write_mask_folder(tmp_path, names, classes=2)
    for name in names:
        save_mask(tmp_path / f"masks/{name}.png", halves(left, right, (32, 24), void=left))
    module = data("folder", tmp_path, labeled=4, image_size=33, labeled_scale=[2.0, 2.0])
    with pytest.warns(UserWarning, match=rf"4 labelled masks looked at {message}"):
        module.setup("fit")


def test_void_of_the_data_set_itself_is_named_by_its_value(tmp_path):
    write_camvid(tmp_path)
    for path in (tmp_path / "trainannot").iterdir():
        save_mask(path, halves(3, 3, (48, 36), void=11))
    with pytest.warns(UserWarning, match=r"show Road and void \(stored as 11\) alone"):
        data("camvid", tmp_path, labeled=2, **SMALL).setup("fit")


def test_masks_are_looked_at_without_their_pictures(tmp_path):
    """A picture that breaks off after its header shows whether it is decoded."""
    write_camvid(tmp_path)
    module = data("camvid", tmp_path, labeled=2, **SMALL)
    for name in module.sample_ids("labeled"):
        path = tmp_path / f"train/{name}.jpg"
        path.write_bytes(path.read_bytes()[:-200])
    module.setup("fit")
    with pytest.raises(UnreadableImageError, match=r"cannot be decoded"):
        module.train_dataset().read(0)


def test_masks_without_a_picture_are_told(tmp_path):
    names = [f"p{number}" for number in range(9)]
    write_mask_folder(tmp_path, names)
    for name in names[:4]:
        (tmp_path / f"images/{name}.jpg").unlink()
    with pytest.warns(UserWarning, match=r"masks: 4 of 9 masks have no picture .* left out: p0, p1, p2, \.\.\."):
        assert len(MaskFolderReader(str(tmp_path)).read()["all"]) == 5


def test_one_labelled_picture_is_too_few(tmp_path):
    module = data("folder", write_mask_folder(tmp_path, [f"p{n}" for n in range(8)]), labeled=1, image_size=33)
    with pytest.raises(ValueError, match=r"the 1 labelled pictures are fewer .*; 2 is the least, so"):
        module.train_dataloader()


def test_lists_as_an_editor_on_windows_saves_them(tmp_path):
    write_camvid(tmp_path)
    split = write_label_split(tmp_path / "lists", CAMVID[:2], CAMVID[2:])
    for path in split.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    module = data("camvid", tmp_path, split_path=str(split), **SMALL)
    assert module.sample_ids("labeled") == CAMVID[:2]
    file = split / "labeled_filename.txt"
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=rf"{file}: is no UTF-8 text \(byte 3\); save it as UTF-8"):
        data("camvid", tmp_path, split_path=str(split), **SMALL).sample_ids("labeled")


@pytest.mark.parametrize("name", ["train/{}.jpg", "trainannot/{}.png"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    write_camvid(tmp_path)
    module = data("camvid", tmp_path, labeled=2, **SMALL)
    broken = module.sample_ids("labeled")[1]
    (tmp_path / name.format(broken)).write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=rf"{broken}.*: cannot be decoded"):
        first_batch(module)


@pytest.mark.parametrize("part", ["labeled", "unlabeled"])
def test_a_mask_with_a_value_outside_the_classes(tmp_path, part):
    write_camvid(tmp_path)
    module = data("camvid", tmp_path, labeled=2, **SMALL)
    for name in module.sample_ids(part):
        save_mask(tmp_path / f"trainannot/{name}.png", halves(42, 1, (48, 36), void=11))
    with pytest.raises(ValueError, match=r"0001TP_\d+.png: pixel \(row 1, column 0\) has the value 42, expected 0..10"):
        first_batch(module)


def test_a_mask_of_another_size(tmp_path):
    write_camvid(tmp_path)
    module = data("camvid", tmp_path, labeled=2, **SMALL)
    for name in module.sample_ids("labeled"):
        save_mask(tmp_path / f"trainannot/{name}.png", halves(1, 2, (40, 36), void=11))
    with pytest.raises(ValueError, match=r"0001TP_\d+.png: the mask is 40x36 pixels, but its picture 48x36"):
        first_batch(module)


WRONG = {
    "image_size is 32, expected a side of 33 pixels or more": {"image_size": 32},
    r"image_size is \[64, 16\], expected a side of 33": {"image_size": [64, 16]},
    r"image_size is \[64, 64, 64\], expected": {"image_size": [64, 64, 64]},
    r"image_size is \[\], expected": {"image_size": []},
    "labeled is 0, expected 1 or more": {"labeled": 0},
    "labeled is 321, but the training part has 320 pictures": {"labeled": 321},
    "unlabeled_batch_size is 0, expected 1 or more": {"unlabeled_batch_size": 0},
    "batch_size is 0, expected 1 or more": {"batch_size": 0},
    "images_per_epoch is 0, expected 1 or more": {"images_per_epoch": 0},
    r"labeled_scale is \[1.5, 0.5\], expected two factors above 0": {"labeled_scale": [1.5, 0.5]},
    r"weak_scale is \[0.0, 1.0\], expected two factors above 0": {"weak_scale": [0.0, 1.0]},
    r"labeled \(3\) draws a split and split_path reads one": {"labeled": 3, "split_path": "x"},
    "unlabeled_path is set, but use_unlabeled is false": {"unlabeled_path": "x", "use_unlabeled": False},
    r"std is \[0.0, 1.0, 1.0\], expected values above 0": {"std": [0.0, 1.0, 1.0]},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_value_is_told(message):
    with pytest.raises(ValueError, match=message):
        data(**WRONG[message]).setup("fit")


# Real data


@pytest.mark.realdata
@pytest.mark.parametrize("labelled", [23, 46, 92, 183])
def test_splits_of_camvid(shared_data, labelled):
    root = shared_data / "camvid"
    module = data("camvid", root, split_path=str(root / "splits" / str(labelled) / "3407"))
    counts = {part: len(ids) for part, ids in parts(module).items()}
    assert counts == {"labeled": labelled, "unlabeled": 367 - labelled, "val": 101}
    assert sorted(module.sample_ids("labeled") + module.sample_ids("unlabeled")) == sorted(
        SemanticSegmentation("camvid", str(root)).sample_ids("train")
    )


@pytest.mark.realdata
def test_batches_of_camvid(shared_data):
    root = shared_data / "camvid"
    module = data(
        "camvid",
        root,
        split_path=str(root / "splits/46/0"),
        train_shorter_side=180,
        test_shorter_side=180,
        image_size=[180, 240],
        labeled_scale=[1, 1],
        flip=False,
        photometric=False,
        batch_size=4,
    )
    batch = first_batch(module)
    names = module.sample_ids("labeled")
    for image, mask, row in zip(*batch["labeled"], strict=True):
        with Image.open(root / f"train/{names[row]}.jpg") as picture:
            small = np.asarray(picture.reduce(2), dtype=np.float32) / 255
        with Image.open(root / f"trainannot/{names[row]}.png") as labels:
            values = np.asarray(labels)[::2, ::2]
        pixels = image.permute(1, 2, 0).numpy() * module.std + module.mean
        assert np.abs(pixels - small).mean() < 0.01, "half of the size, by bilinear interpolation or by averages"
        assert np.array_equal(mask.numpy(), np.where(values == 11, 255, values))
    assert batch["unlabeled"].images.shape == (4, 3, 180, 240)
    assert next(iter(module.val_dataloader())).masks.shape == (1, 360, 480)


@pytest.mark.realdata
def test_frames_of_camvid_in_the_layout_of_voc(shared_data, tmp_path):
    """Real pictures with grey and palette masks, since VOC itself is not at hand."""
    source = shared_data / "camvid"
    names = sorted(path.stem for path in (source / "train").iterdir())[:6]
    folder = tmp_path / "VOC2012"
    for kind in ("JPEGImages", "SegmentationClassAug", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / kind).mkdir(parents=True)
    truth = {}
    for number, name in enumerate(names):
        shutil.copy(source / f"train/{name}.jpg", folder / "JPEGImages")
        values = np.asarray(Image.open(source / f"trainannot/{name}.png"))
        truth[name] = np.where(values == 11, 255, values).astype(np.uint8)
        mask = Image.fromarray(truth[name])
        if number == 5:
            mask = mask.convert("P")
            mask.putpalette(list(range(256)) * 3)
        mask.save(folder / ("SegmentationClass" if number == 5 else "SegmentationClassAug") / f"{name}.png")
    (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(names[4:]))
    module = data("voc", tmp_path, labeled=2, batch_size=2)
    module.setup("fit")
    assert [len(ids) for ids in parts(module).values()] == [2, 2, 2]
    for name, batch in zip(names[4:], module.val_dataloader(), strict=True):
        assert np.array_equal(batch.masks[0].numpy(), truth[name])
    batch = next(iter(module.train_dataloader()))[0]
    assert batch["labeled"].images.shape == batch["unlabeled"].images.shape == (2, 3, 321, 321)
