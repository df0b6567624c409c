"""Pictures with masks: layouts, what a mask file means, augmentation, loaders, and what is wrong with data."""

import colorsys
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from sklearn.datasets import load_digits

from callbacks import ExactResume
from datamodules import SemanticSegmentation
from datamodules.augmentations import SeededPipeline
from datamodules.image_files import UnreadableImageError
from datamodules.mask_transforms import MixedClassCrop, PhotometricDistortion, RandomScale, training_transforms
from datamodules.readers.mask_folder import MaskFolderReader
from datamodules.readers.mosaic import MosaicReader
from datamodules.segmentation_dataset import scaled_size
from datamodules.semantic_segmentation import distinct_colours
from tests.data_layouts import (
    halves,
    save_image,
    save_mask,
    save_palette_mask,
    write_ade20k,
    write_camvid,
    write_mask_folder,
)
from tests.distributed import run_ranks
from tests.modules.toy_images import quiet_trainer
from tests.noisy_training import SaveAtStep

PLAIN = {"flip": False, "photometric": False, "scale_range": [1.0, 1.0], "max_class_ratio": 1.0}


def data(layout="shapes", root=None, **kwargs):
    return SemanticSegmentation(layout=layout, root=str(root) if root else None, num_workers=0, **kwargs)


# Layouts


def test_ade20k(tmp_path):
    module = data("ade20k", write_ade20k(tmp_path))
    assert module.num_classes == 150
    assert module.class_names[:2] == ["thing 1", "thing 2"]
    assert (module.image_size, module.in_channels, module.main_metric) == (512, 3, "miou")
    module.setup()
    assert module.sample_ids("train")[:2] == ["ADE_train_00000001", "ADE_train_00000002"]
    assert len(module.sample_ids("train")) == 6
    batches = list(module.val_dataloader())
    assert [batch.masks.shape for batch in batches] == [(1, 36, 44), (1, 36, 48), (1, 36, 52)]
    for number, batch in enumerate(batches, 1):
        mask = batch.masks[0]
        assert (mask[0] == 255).all()
        assert mask[1:, : mask.shape[1] // 2].unique().tolist() == [number - 1]
        assert mask[1:, mask.shape[1] // 2 :].unique().tolist() == [150 - number]
        assert batch.index.tolist() == [number - 1]


def test_masks_of_ade20k_go_back_into_its_own_values(tmp_path):
    module = data("ade20k", write_ade20k(tmp_path) / "ADEChallengeData2016")
    written = module.mask_to_file(np.array([[0, 149, 255]]))
    assert written.dtype == np.uint8
    assert written.tolist() == [[1, 150, 255]]


def test_ade20k_without_the_table_of_names(tmp_path):
    (write_ade20k(tmp_path) / "ADEChallengeData2016/objectInfo150.txt").unlink()
    assert data("ade20k", tmp_path).class_names[149] == "class 150"


def test_the_validation_part_stands_in_for_a_test_part(tmp_path):
    module = data("ade20k", write_ade20k(tmp_path))
    with pytest.warns(UserWarning, match="the validation part stands in"):
        assert module.sample_ids("test") == module.sample_ids("val")


def test_camvid_ignores_prefix_and_suffix_of_its_lists(tmp_path):
    module = data("camvid", write_camvid(tmp_path))
    assert module.num_classes == 11
    assert module.class_names[3] == "Road"
    assert module.palette[3] == [128, 64, 128]
    assert module.sample_ids("val") == ["0001TP_000100", "0001TP_000101", "0001TP_000102"]
    batch = next(iter(module.test_dataloader()))
    assert batch.images.shape == (1, 3, 36, 48)
    assert (batch.masks[0, 0] == 255).all(), "11 is void"
    assert batch.masks[0, 1:].unique().tolist() == [0, 3]
    assert module.mask_to_file(np.array([[3]])).tolist() == [[3]]


def test_evaluation_batches_are_normalised_pictures_in_order(tmp_path):
    module = data("camvid", write_camvid(tmp_path), eval_batch_size=2)
    batches = list(module.val_dataloader())
    assert [batch.index.tolist() for batch in batches] == [[0, 1], [2]]
    pixels = np.asarray(Image.open(tmp_path / "val/0001TP_000101.jpg").convert("RGB")) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = batches[0].images[1].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


PARTED = [f"{part}/{row}" for part, count in (("train", 4), ("val", 2), ("test", 1)) for row in range(count)]


def test_a_folder_with_sub_folders_of_parts(tmp_path):
    module = data("folder", write_mask_folder(tmp_path, PARTED))
    assert module.class_names == ["kind 0", "kind 1", "kind 2"]
    assert module.sample_ids("train") == ["train/0", "train/1", "train/2", "train/3"]
    assert module.sample_ids("val") == ["val/0", "val/1"]
    assert module.sample_ids("test") == ["test/0"]


def test_a_folder_with_lists_of_parts(tmp_path):
    write_mask_folder(tmp_path, ["a", "b", "c", "d", "deep/e"])
    for part, names in (("train", "b\nd\n"), ("val", "deep/e\n"), ("test", "a\n")):
        (tmp_path / f"{part}.txt").write_text(names)
    module = data("folder", tmp_path)
    assert {part: module.sample_ids(part) for part in ("train", "val", "test")} == {
        "train": ["b", "d"],
        "val": ["deep/e"],
        "test": ["a"],
    }


def test_a_folder_without_parts_is_split_by_a_seed(tmp_path):
    names = [f"{number:02d}" for number in range(20)]
    write_mask_folder(tmp_path, names)
    one, same, other = (data("folder", tmp_path, split_seed=seed) for seed in (0, 0, 1))
    parts = [one.sample_ids(part) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert sorted(name for part in parts for name in part) == names
    assert one.sample_ids("test") == same.sample_ids("test") != other.sample_ids("test")


def test_a_number_of_classes_instead_of_names(tmp_path):
    (write_mask_folder(tmp_path, PARTED) / "classes.txt").unlink()
    assert data("folder", tmp_path, classes=3).class_names == ["class 0", "class 1", "class 2"]


def test_palette_masks_give_their_indices(tmp_path):
    write_mask_folder(tmp_path, PARTED)
    values = np.asarray(Image.open(tmp_path / "masks/train/0.png"))
    save_palette_mask(tmp_path / "masks/train/0.png", values)
    assert Image.open(tmp_path / "masks/train/0.png").mode == "P"
    assert data("folder", tmp_path).train_dataset().read(0)[1].tolist() == values.tolist()


def test_shapes_are_always_the_same_and_need_no_file():
    one, same = data(), data()
    assert one.num_classes == 11
    assert one.class_names[:2] == ["background", "0"]
    counts = {part: len(one.sample_ids(part)) for part in ("train", "val", "test")}
    assert counts == {"train": 320, "val": 80, "test": 80}
    for first, second in zip(one.val_dataloader(), same.val_dataloader(), strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.masks, second.masks)
    labels = torch.cat([batch.masks.unique() for batch in one.test_dataloader()]).unique()
    assert labels.tolist() == list(range(11))


def test_hues_of_shapes_hint_at_the_digit_and_overlap():
    module = data()
    module.setup("fit")
    dataset = module.train_dataset()
    hues = {digit: [] for digit in range(10)}
    for row in range(len(dataset)):
        image, mask = dataset.read(row)
        for label in set(mask.flatten()) - {0}:
            colours = {tuple(colour) for colour in image[mask == label] / 255}
            hues[label - 1] += [colorsys.rgb_to_hsv(*colour)[0] for colour in colours]
    for digit, found in hues.items():
        turns = np.exp(2j * np.pi * np.array(found))
        away = np.angle(turns.mean() * np.exp(-2j * np.pi * digit / 10)) / (2 * np.pi)
        assert abs(away) < 0.02, digit
        spread = np.sqrt(-2 * np.log(abs(turns.mean()))) / (2 * np.pi)
        assert 0.03 < spread < 0.06, "some are beyond the middle between two digits, 0.05 away"


def test_regions_of_a_mosaic_are_filled_with_samples_of_their_digit():
    digits = load_digits()
    kept = set()
    for part in ("train", "val", "test"):
        samples = MosaicReader().read()[part]
        assert len(samples) == {"train": 320, "val": 80, "test": 80}[part]
        used = set()
        for image, mask in zip(samples.images[:20], samples.masks[:20], strict=True):
            tiles = mask.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
            assert (tiles == tiles[:, :1]).all(), "a tile has one class"
            grey = image.astype(np.float64).sum(2).reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
            for tile, label in zip(grey, tiles[:, 0], strict=True):
                ink = 16 * (tile - grey.min()) / (grey.max() - grey.min())
                away = np.abs(digits.data - ink).max(1)
                row = away.argmin()
                assert away[row] < 0.3
                assert digits.target[row] == label
                used.add(row)
        assert not used & kept, "no handwriting is in two parts"
        kept |= used


def test_shapes_share_no_background_between_parts():
    """No picture's upper left corner, where a digit seldom is, occurs in another part."""
    module, corners = data(), {}
    for part in ("train", "val", "test"):
        corners[part] = {image[:4, :4].tobytes() for image in module._part(part).images}
    assert not corners["train"] & (corners["val"] | corners["test"])


def test_distinct_colours():
    colours = distinct_colours(255)
    assert len(set(colours)) == 255
    assert (0, 0, 0) not in colours
    # The first ones of the colour map of PASCAL VOC, after its black background.
    assert colours[:8] == [
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
    ]


# Sizes


@pytest.mark.parametrize(
    ("size", "side", "scale", "expected"),
    [
        ((360, 480), None, 1.0, (360, 480)),
        ((360, 480), None, 0.5, (180, 240)),
        ((360, 480), 512, 1.0, (512, 683)),
        ((480, 360), 512, 2.0, (1365, 1024)),
        ((100, 500), 512, 1.0, (410, 2048)),  # the longer side is at most 2048
        ((3, 5), 1, 0.1, (1, 1)),
    ],
)
def test_sizes_keep_the_ratio(size, side, scale, expected):
    assert scaled_size(size, side, scale) == expected


def test_evaluation_resizes_the_picture_and_never_the_mask(tmp_path):
    module = data("ade20k", write_ade20k(tmp_path), test_shorter_side=72)
    batch = next(iter(module.val_dataloader()))
    assert batch.images.shape == (1, 3, 72, 88)
    assert batch.masks.shape == (1, 36, 44)


def test_pictures_of_unequal_size_in_one_batch_stay_a_list(tmp_path):
    module = data("ade20k", write_ade20k(tmp_path), eval_batch_size=3)
    (batch,) = module.val_dataloader()
    assert [tuple(image.shape) for image in batch.images] == [(3, 36, 44), (3, 36, 48), (3, 36, 52)]
    assert [tuple(mask.shape) for mask in batch.masks] == [(36, 44), (36, 48), (36, 52)]
    assert batch.index.tolist() == [0, 1, 2]


# Augmentation


def test_training_batches_have_one_size_and_are_padded(tmp_path):
    module = data("camvid", write_camvid(tmp_path), image_size=64, batch_size=3, **PLAIN)
    batch = next(iter(module.train_dataloader()))
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.masks.shape == (3, 64, 64)
    assert batch.masks.dtype == torch.int64
    assert (batch.masks[:, 36:] == 255).all()
    assert (batch.masks[:, :, 48:] == 255).all()
    assert (batch.masks[:, 1:36, :48] != 255).all()
    assert batch.images[:, :, 36:].abs().max() < 0.5 / 255 / 0.224, "the mean, up to rounding"


def augmented(module, epoch=0):
    dataset = module.train_dataset()
    return [dataset[(epoch, 0, row)] for row in range(len(dataset))]


def test_augmentation_is_a_function_of_seed_epoch_and_row(tmp_path):
    write_camvid(tmp_path)
    one, same = (augmented(data("camvid", tmp_path, image_size=24, seed=1)) for _ in range(2))
    for first, second in zip(one, reversed(list(reversed(same))), strict=True):
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.mask, second.mask)
    for other in (
        augmented(data("camvid", tmp_path, image_size=24, seed=2)),
        augmented(data("camvid", tmp_path, image_size=24, seed=1), epoch=1),
    ):
        assert any(not np.array_equal(a.image, b.image) for a, b in zip(one, other, strict=True))


def test_picture_and_mask_are_changed_alike(tmp_path):
    """Where the picture shows its mask, it still does so after scaling, cropping and mirroring."""
    random = np.random.RandomState(0)
    mask = np.kron(random.randint(0, 11, (6, 8)), np.ones((12, 12))).astype(np.uint8)
    image = np.repeat(mask[..., None] * 20, 3, axis=2)
    settings = {"shorter_side": None, "max_class_ratio": 0.75, "flip": True, "photometric": False, "mean": (0, 0, 0)}
    pipeline = SeededPipeline(lambda: training_transforms(48, scale_range=(0.5, 2.0), **settings))
    mirrored = 0
    for row in range(12):
        changed = pipeline.apply((0, 0, 0, row, 0), image=image, mask=mask)
        seen, labels = changed["image"][..., 0], changed["mask"]
        assert seen.shape == labels.shape == (48, 48)
        inside = labels != 255
        assert (np.abs(seen[inside] - 20.0 * labels[inside]) <= 10).mean() > 0.8
        assert (seen[~inside] == 0).all()
        plain = pipeline.apply((0, 0, 0, row, 0), image=image[:, ::-1].copy(), mask=mask[:, ::-1].copy())
        mirrored += not np.array_equal(plain["mask"], labels)
    assert mirrored


def drawn(transform, image, mask, count=200):
    pipeline = SeededPipeline(lambda: [transform])
    return [pipeline.apply((0, 0, 0, row, 0), image=image, mask=mask) for row in range(count)]


def test_scales_are_drawn_from_the_range():
    image, mask = np.zeros((30, 60, 3), np.uint8), np.zeros((30, 60), np.uint8)
    heights = [found["image"].shape[0] for found in drawn(RandomScale(40, (0.5, 2.0)), image, mask)]
    assert min(heights) >= 20
    assert max(heights) <= 80
    assert 46 < np.mean(heights) < 54
    assert all(
        found["mask"].shape == found["image"].shape[:2] for found in drawn(RandomScale(40, (0.5, 2)), image, mask)
    )


def test_a_crop_avoids_places_of_one_class():
    """Nine tenths of the picture are of one class; a crop with another one must be looked for."""
    mask = np.zeros((40, 200), np.uint8)
    mask[:, 180:] = 3
    mask[:5] = 255
    image = np.repeat(mask[..., None], 3, axis=2)

    def share_of_mixed(max_ratio):
        mixed = []
        for found in drawn(MixedClassCrop(40, max_ratio), image, mask):
            labels = found["mask"][found["mask"] != 255]
            assert found["mask"].shape == (40, 40)
            assert np.array_equal(found["image"][..., 0], found["mask"])
            mixed.append(np.bincount(labels).max() < 0.75 * labels.size)
        return np.mean(mixed)

    once, tries = share_of_mixed(1.0), share_of_mixed(0.75)
    # A start is good if the second class covers 11 columns or more: p = 10 / 161, and 1 - (1 - p)^10 within ten tries.
    assert once < 0.15
    assert tries == pytest.approx(1 - (1 - 10 / 161) ** 10, abs=0.12)


def test_distortion_changes_colours_in_known_bounds():
    image = np.full((4, 4, 3), (90, 120, 150), np.uint8)
    mask = np.zeros((4, 4), np.uint8)
    found = np.array([sample["image"][0, 0] for sample in drawn(PhotometricDistortion(), image, mask, 400)], float)
    unchanged = (found == (90, 120, 150)).all(1).mean()
    assert unchanged == pytest.approx(1 / 16, abs=0.04), "each of the four with probability one half"
    assert found.max() <= 255
    assert found.min() >= (90 - 32) * 0.5 - 60
    only_brightness = drawn(PhotometricDistortion(contrast=(1, 1), saturation=(1, 1), hue=0), image, mask)
    shifts = np.array([sample["image"][0, 0].astype(float) - (90, 120, 150) for sample in only_brightness])
    assert np.abs(shifts).max() <= 33
    assert np.ptp(shifts, axis=1).max() <= 2, "all channels alike"
    assert len(np.unique(shifts[:, 0])) > 20


def test_digits_are_not_mirrored_unless_asked():
    module = data(photometric=False, scale_range=[1.0, 1.0], max_class_ratio=1.0)
    dataset = module.train_dataset()
    for row in range(8):
        assert np.array_equal(dataset[(0, 0, row)].mask, dataset.read(row)[1])
    asked = data(flip=True, photometric=False, scale_range=[1.0, 1.0], max_class_ratio=1.0).train_dataset()
    same = [np.array_equal(asked[(0, 0, row)].mask, asked.read(row)[1]) for row in range(40)]
    assert 8 < sum(same) < 32


# Loaders


class Collect(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rows, self.seen = [], []

    def training_step(self, batch, batch_idx):
        self.rows.append((self.current_epoch, batch.index.tolist(), float(batch.images.sum())))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen += batch.index.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_run_resumes_with_the_very_next_pictures(tmp_path):
    write_camvid(tmp_path / "data")
    full, rest = Collect(), Collect()
    for module, path in ((full, None), (rest, tmp_path / "half.ckpt")):
        trainer = quiet_trainer(max_epochs=2, callbacks=[ExactResume(), SaveAtStep(4, tmp_path / "half.ckpt")])
        pictures = data("camvid", tmp_path / "data", image_size=24, batch_size=2)
        trainer.fit(module, datamodule=pictures, ckpt_path=path, weights_only=True)
    assert len(full.rows) == 6
    assert rest.rows == full.rows[4:]


def evaluate_on_a_rank(rank, root):
    module = Collect()
    trainer = quiet_trainer(strategy="ddp", devices=2, use_distributed_sampler=False)
    trainer.fit(module, datamodule=data("ade20k", root, image_size=32, batch_size=2))
    return module.seen, [row for _, rows, _ in module.rows for row in rows]


def test_two_ranks_see_each_picture_once_also_where_sizes_differ(tmp_path):
    results = run_ranks(evaluate_on_a_rank, 2, str(write_ade20k(tmp_path)))
    assert sorted(row for seen, _ in results for row in seen) == [0, 1, 2]
    trained = [row for _, rows in results for row in rows]
    assert len(trained) == 8, "three batches of two, and one more so that both ranks have two"
    assert set(trained) == set(range(6))


def test_workers_change_nothing(tmp_path):
    write_camvid(tmp_path)
    options = {"image_size": 24, "batch_size": 3, "layout": "camvid", "root": str(tmp_path)}
    rows = []
    for workers in (0, 2):
        module = Collect()
        quiet_trainer(max_epochs=2).fit(module, datamodule=SemanticSegmentation(num_workers=workers, **options))
        rows.append(module.rows)
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_the_seed_of_the_run_is_that_of_the_data(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert data().seed == 7
    assert data(seed=3).seed == 3


@pytest.mark.parametrize(("batch_size", "batches"), [(3, 2), (5, 1), (4, 2)])
def test_a_last_batch_of_one_picture_is_left_out(tmp_path, batch_size, batches):
    module = data("camvid", write_camvid(tmp_path), image_size=24, batch_size=batch_size)
    assert len(list(module.train_dataloader())) == batches


def test_pictures_of_a_folder_are_predicted_without_masks(tmp_path):
    for seed, name in enumerate(("b.jpg", "a/c.png")):
        save_image(tmp_path / "new" / name, seed=seed, size=(20 + seed, 16))
    module = data(predict_path=str(tmp_path / "new"))
    batches = list(module.predict_dataloader())
    assert module.sample_ids(None) == ["a/c", "b"]
    assert [tuple(batch.masks.shape) for batch in batches] == [(1, 16, 21), (1, 16, 20)]
    assert all((batch.masks == 255).all() for batch in batches)


def test_a_part_can_be_predicted(tmp_path):
    module = data("camvid", write_camvid(tmp_path), predict_split="val")
    assert module.sample_ids(None) == module.sample_ids("val")
    assert len(list(module.predict_dataloader())) == 3


# What is wrong with data


def test_a_value_that_stands_for_nothing(tmp_path):
    write_camvid(tmp_path)
    path = tmp_path / "valannot/0001TP_000101.png"
    mask = halves(1, 2, (48, 36), void=11)
    mask[5, 7] = 42
    save_mask(path, mask)
    with pytest.raises(
        ValueError,
        match=r"0001TP_000101.png: pixel \(row 5, column 7\) has the value 42, expected 0..10 for a class or 11, 255",
    ):
        list(data("camvid", tmp_path).val_dataloader())


def test_a_label_above_150(tmp_path):
    write_ade20k(tmp_path)
    path = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png"
    save_mask(path, halves(151, 1, (48, 36), void=0))
    with pytest.raises(ValueError, match=r"ADE_val_00000002.png: .* value 151, expected 1..150 for a class or 0, 255"):
        list(data("ade20k", tmp_path).val_dataloader())


def test_a_mask_of_another_size(tmp_path):
    write_camvid(tmp_path)
    save_mask(tmp_path / "valannot/0001TP_000100.png", halves(1, 2, (40, 36), void=11))
    with pytest.raises(ValueError, match=r"0001TP_000100.png: the mask is 40x36 pixels, but its picture 48x36"):
        list(data("camvid", tmp_path).val_dataloader())


def test_a_mask_of_colours(tmp_path):
    write_camvid(tmp_path)
    save_image(tmp_path / "valannot/0001TP_000100.png", seed=0, size=(48, 36))
    with pytest.raises(ValueError, match=r"0001TP_000100.png: has 3 channels, expected one with a class index"):
        list(data("camvid", tmp_path).val_dataloader())


@pytest.mark.parametrize("name", ["val/0001TP_000100.jpg", "valannot/0001TP_000100.png"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    write_camvid(tmp_path)
    (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=rf"{Path(name).name}: cannot be decoded"):
        list(data("camvid", tmp_path).val_dataloader())


def test_a_missing_mask(tmp_path):
    write_ade20k(tmp_path)
    folder = tmp_path / "ADEChallengeData2016/annotations/training"
    (folder / "ADE_train_00000003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 pictures have no mask: .*ADE_train_00000003.png is missing"):
        data("ade20k", tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("val/0001TP_000102.jpg", r"val.txt: 1 of 3 images are missing on disk: .*0001TP_000102"),
        ("valannot/0001TP_000102.png", r"1 of 3 pictures have no mask: .*0001TP_000102.png is missing"),
    ],
)
def test_a_file_that_a_list_names_and_the_disk_lacks(tmp_path, name, message):
    (write_camvid(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        data("camvid", tmp_path).setup("fit")


@pytest.mark.parametrize("line", ["one.png", "a/b.png c/d.png e/f.png", "one.png two.png"])
def test_a_broken_line_of_a_list(tmp_path, line):
    path = write_camvid(tmp_path) / "train.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"train.txt: line 7 is '{line}', expected the path of a picture and that of"):
        data("camvid", tmp_path).setup("fit")


def test_an_empty_list(tmp_path):
    (write_camvid(tmp_path) / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val.txt: the list is empty"):
        data("camvid", tmp_path).setup("fit")


def test_a_missing_list(tmp_path):
    (write_camvid(tmp_path) / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val.txt is missing; set --data.root"):
        data("camvid", tmp_path)


def test_an_empty_part_of_ade20k(tmp_path):
    folder = write_ade20k(tmp_path) / "ADEChallengeData2016/images/validation"
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"images/validation: no picture found"):
        data("ade20k", tmp_path).setup("fit")


def test_another_folder_than_ade20k(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images/training does not exist; set --data.root to the unpacked"):
        data("ade20k", tmp_path)


def test_a_part_that_is_not_there(tmp_path):
    module = data("folder", write_mask_folder(tmp_path, [f"train/{row}" for row in range(3)]))
    with pytest.raises(ValueError, match="no part 'val', only train; add its pictures and masks"):
        module.setup("fit")


def test_a_part_that_a_split_leaves_empty(tmp_path):
    module = data("folder", write_mask_folder(tmp_path, ["a", "b"]))
    with pytest.raises(ValueError, match="part 'val' of the data set is empty"):
        module.setup("fit")


def test_a_folder_without_classes(tmp_path):
    (write_mask_folder(tmp_path, PARTED) / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"write classes.txt with one class name per line, or give .*--data.classes"):
        data("folder", tmp_path)


def test_classes_given_twice(tmp_path):
    with pytest.raises(ValueError, match=r"classes.txt: names 3 classes, but --data.classes is 5"):
        data("folder", write_mask_folder(tmp_path, PARTED), classes=5)


def test_a_list_of_a_folder_that_names_no_picture(tmp_path):
    (write_mask_folder(tmp_path, ["a", "b"]) / "train.txt").write_text("a\nz.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"train.txt: 1 of 2 names have no picture in .*: z.jpg"):
        data("folder", tmp_path).setup("fit")


def repeat_lines(path, count):
    """Write the first lines of a list again at its end."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines + lines[:count]))


def test_a_list_of_a_folder_that_names_pictures_twice(tmp_path):
    (write_mask_folder(tmp_path, list("abcde")) / "train.txt").write_text("a\nb\nc\nd\n")
    repeat_lines(tmp_path / "train.txt", 4)
    with pytest.raises(
        ValueError, match=r"/train.txt: names 4 picture\(s\) twice: a, b, c, \.\.\.; keep one line each"
    ):
        data("folder", tmp_path).setup("fit")


def test_a_list_of_camvid_that_names_pictures_twice(tmp_path):
    repeat_lines(write_camvid(tmp_path) / "train.txt", 3)
    with pytest.raises(ValueError, match=r"/train.txt: names 3 picture\(s\) twice: 0001TP_000000, .*_000002; keep one"):
        data("camvid", tmp_path).setup("fit")


def test_two_pictures_of_ade20k_of_one_name(tmp_path):
    save_image(write_ade20k(tmp_path) / "ADEChallengeData2016/images/training/ADE_train_00000001.png", seed=9)
    with pytest.raises(
        ValueError, match=r"images/training: names 1 picture\(s\) twice: ADE_train_00000001; rename one"
    ):
        data("ade20k", tmp_path).setup("fit")


@pytest.mark.parametrize("suffix", [".PNG", ".Png"])
def test_the_suffix_of_a_mask_may_have_any_case(tmp_path, suffix):
    write_mask_folder(tmp_path, ["a", "b.c", "deep/d"])
    for mask in sorted(tmp_path.glob("masks/**/*.png")):
        mask.rename(mask.with_suffix(suffix))
    samples = MaskFolderReader(str(tmp_path)).read()["all"]
    assert [mask.relative_to(tmp_path / "masks").as_posix() for mask in samples.masks] == [
        f"{name}{suffix}" for name in ("a", "b.c", "deep/d")
    ]
    save_mask(tmp_path / "masks/a.png", np.zeros((24, 32)))
    assert MaskFolderReader(str(tmp_path)).read()["all"].masks[0].name == "a.png"


def test_two_pictures_for_one_mask(tmp_path):
    write_mask_folder(tmp_path, ["a", "b"])
    save_image(tmp_path / "images/a.png", seed=9, size=(32, 24))
    with pytest.raises(ValueError, match="two pictures are called 'a'"):
        data("folder", tmp_path).setup("fit")


def test_a_folder_without_masks(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"masks does not exist; layout 'folder' expects"):
        data("folder", tmp_path, classes=2)


def test_a_folder_to_predict_without_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data.predict_path '.*': no image found"):
        data(predict_path=str(tmp_path)).setup("predict")


def test_two_pictures_to_predict_of_one_name(tmp_path):
    for seed, name in enumerate(("a.jpg", "a.png")):
        save_image(tmp_path / name, seed=seed)
    with pytest.raises(ValueError, match=r"--data.predict_path '.*': two pictures are called 'a'"):
        data(predict_path=str(tmp_path)).setup("predict")


def test_a_layout_without_a_root():
    with pytest.raises(ValueError, match=r"layout 'camvid' reads a folder: set --data.root"):
        data("camvid")


WRONG = {
    "image_size is 0, expected 1 or more": {"image_size": 0},
    "image_size is -5, expected 1 or more": {"image_size": -5},
    "test_shorter_side is 0, expected 1 or more": {"test_shorter_side": 0},
    "eval_batch_size is 0, expected 1 or more": {"eval_batch_size": 0},
    r"scale_range is \[2.0, 0.5\], expected two factors": {"scale_range": [2.0, 0.5]},
    r"scale_range is \[1.0\], expected two factors": {"scale_range": [1.0]},
    r"max_class_ratio is 0, expected a share in \(0, 1\]": {"max_class_ratio": 0},
    "val_fraction is 0.5 and test_fraction 0.5": {"val_fraction": 0.5, "test_fraction": 0.5},
    "mean has 1 values, expected one per channel": {"mean": [0.5]},
    r"std is \[0.0, 1.0, 1.0\], expected values above 0": {"std": [0.0, 1.0, 1.0]},
    "layout 'coco' is unknown; expected one of shapes, mosaic, ade20k, camvid, voc, cityscapes, folder": {
        "layout": "coco"
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_value_is_told(message):
    with pytest.raises(ValueError, match=message):
        data(**WRONG[message])


# Real data


@pytest.mark.realdata
def test_camvid_on_disk(shared_data):
    module = data("camvid", shared_data / "camvid")
    module.setup()
    assert {part: len(module.sample_ids(part)) for part in ("train", "val", "test")} == {
        "train": 367,
        "val": 101,
        "test": 233,
    }
    counts = np.zeros(256, dtype=np.int64)
    dataset = module.val_dataloader().dataset
    for row in range(len(dataset)):
        counts += np.bincount(dataset.read(row)[1].reshape(-1), minlength=256)
    # As the README of the data counts them.
    expected = [1601620, 4531180, 98499, 5053176, 1521751, 2851125, 155724, 537197, 304716, 113531, 387010]
    assert counts[:11].tolist() == expected
    assert counts[255] == 297271


def test_a_picture_without_mask_is_turned_as_viewers_do(tmp_path):
    stored = np.random.RandomState(0).randint(0, 256, (24, 32, 3), dtype=np.uint8)
    (tmp_path / "new").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    Image.fromarray(stored).save(tmp_path / "new/a.png", exif=exif)
    module = SemanticSegmentation(predict_path=str(tmp_path / "new"), num_workers=0, mean=[0.0] * 3, std=[1.0] * 3)
    module.setup("predict")
    image = next(iter(module.predict_dataloader())).images[0]
    assert np.array_equal((255 * image).round().byte().permute(1, 2, 0).numpy(), np.rot90(stored, -1))

    root = write_mask_folder(tmp_path / "own", [f"p{number}" for number in range(6)])
    for path in (root / "images").iterdir():
        Image.open(path).save(path, exif=exif)
    for path in (root / "masks").iterdir():
        save_mask(path, np.asarray(Image.open(path)).T)
    module = SemanticSegmentation("folder", root=str(root), image_size=8, num_workers=0)
    module.setup("fit")
    with pytest.raises(
        ValueError, match=r"the mask is 24x32 pixels, but its picture 32x24; .* not as a viewer turns them"
    ):
        next(iter(module.train_dataloader()))
