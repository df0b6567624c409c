import gc
import multiprocessing
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import datamodules.image_dataset
from datamodules import ImageBatch, ImageClassification, MedicalImages
from datamodules.downloads import DownloadError
from datamodules.image_files import UnreadableImageError
from tests.data_layouts import save_image, write_csv
from tests.datamodules.test_downloads import server  # noqa: F401

SMALL = {"image_size": 16, "batch_size": 4, "num_workers": 0}


def folder_of(root, **options):
    return MedicalImages(layout="folder", root=str(root), **{**SMALL, **options})


def on_rank(data, rank, world_size):
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, training=False)
    return data


def gathered(loader):
    batches = list(loader)
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.index for batch in batches]),
    )


@pytest.fixture(autouse=True)
def no_worker_is_left():
    """Loaders hold reference cycles: end their workers here and not in the middle of another test."""
    yield
    if multiprocessing.active_children():
        gc.collect()


# Facts


def test_digits_need_nothing_but_a_name():
    data = ImageClassification()
    assert data.class_names == list("0123456789")
    assert (data.num_classes, data.image_size, data.in_channels, data.main_metric) == (10, 8, 1, "acc")
    data.prepare_data()
    data.setup()
    sizes = [len(data.sample_ids(part)) for part in ("train", "val", "test")]
    assert sum(sizes) == 1797
    assert sizes == [1439, 179, 179]


def test_digits_are_split_alike_for_every_training_seed():
    first, second = (ImageClassification(seed=seed) for seed in (0, 7))
    assert first.sample_ids("test") == second.sample_ids("test")
    assert first.sample_ids("test")[:3] == ["digit-0013", "digit-0019", "digit-0043"]
    assert ImageClassification(split_seed=1).sample_ids("test") != first.sample_ids("test")


def test_facts_are_known_before_any_pixel_is_read(class_folders, isic_folder, aptos_folder, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("a pixel was read")

    monkeypatch.setattr(Image, "open", never)
    cells, skin, eyes = (
        folder_of(class_folders),
        MedicalImages(layout="isic2019", root=str(isic_folder)),
        MedicalImages(layout="aptos2019", root=str(aptos_folder)),
    )
    assert (cells.num_classes, cells.image_size, cells.main_metric) == (3, 16, "acc")
    assert (skin.num_classes, skin.image_size, skin.main_metric) == (8, 224, "balanced_acc")
    assert (eyes.num_classes, eyes.in_channels, eyes.main_metric) == (5, 3, "kappa")


def test_facts_can_be_overruled(class_folders):
    data = folder_of(class_folders, channels=1, main_metric="kappa", mean=[0.2], std=[0.1])
    assert (data.in_channels, data.main_metric, data.mean, data.std) == (1, "kappa", [0.2], [0.1])


def test_hyper_parameters_are_plain_and_load_with_weights_only(tmp_path):
    data = ImageClassification(label_fraction=0.5, mean=[0.5])
    assert data.hparams["layout"] == "digits"
    assert data.hparams["label_fraction"] == 0.5
    torch.save(dict(data.hparams), tmp_path / "h.pt")
    again = ImageClassification(**torch.load(tmp_path / "h.pt", weights_only=True))
    assert dict(again.hparams) == dict(data.hparams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0, expected 1 or more"),
        ({"image_size": 0}, "image_size is 0, expected 1 or more"),
        ({"num_workers": -1}, "num_workers is -1, expected 0 or more"),
        ({"crop_padding": -1}, "crop_padding is -1, expected 0 or more"),
        ({"crop_ratio": 1.5}, r"crop_ratio is 1.5, expected a share in \(0, 1\]"),
        ({"re_prob": 2.0}, r"re_prob is 2.0, expected a probability in \[0, 1\]"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"labels_per_class": 0}, "labels_per_class is 0, expected 1 or more"),
        ({"label_fraction": 0.0}, r"label_fraction is 0\.0, expected a share in \(0, 1\]"),
        ({"label_fraction": 1.5}, r"label_fraction is 1\.5, expected a share in \(0, 1\]"),
        ({"label_fraction": 0.5, "labels_per_class": 3}, "set either label_fraction or labels_per_class, not both"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, r"val_fraction is 0\.6 and test_fraction 0\.5"),
        ({"val_fraction": 0.0}, r"val_fraction is 0\.0"),
        ({"channels": 2}, "channels is 2, expected 1 or 3"),
        ({"views": 3}, "views is 3, expected 1 or 2"),
        ({"views": 2}, "views is 2 with augment 'finetune'; two views need --data.augment pretrain"),
        ({"std": [0.0]}, r"std is \[0\.0\], expected values above 0"),
        ({"mean": [0.1, 0.2]}, r"mean has 2 values, expected one per channel \(1\)"),
        ({"layout": "imagenet"}, "layout 'imagenet' is unknown; expected digits, folder, cifar10 or cifar100"),
    ],
)
def test_values_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ImageClassification(**options)


def test_an_unknown_medical_layout_is_refused():
    with pytest.raises(ValueError, match="layout 'xray' is unknown; expected folder, medmnist, isic2019 or aptos2019"):
        MedicalImages(layout="xray")


def test_importing_the_package_loads_nothing_heavy_by_itself():
    """Lightning and torchmetrics load some of these themselves; what counts is what comes on top."""
    heavy = ("albumentations", "cv2", "sklearn", "pandas", "PIL", "timm", "matplotlib", "wandb")
    code = (
        "import sys, lightning.pytorch, torchmetrics; before = set(sys.modules); import datamodules; "
        f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Training batches


def test_training_batches_hold_every_row_once_and_change_with_the_epoch():
    data = ImageClassification(augment="pretrain", views=2, batch_size=64)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == 1439 // 64
    rows = torch.cat([batch.index for batch in batches]).tolist()
    assert len(rows) == len(set(rows)) == 1439 // 64 * 64
    assert isinstance(batches[0], ImageBatch)
    assert [view.shape for view in batches[0].views] == [(64, 1, 8, 8)] * 2
    assert not torch.equal(*batches[0].views)
    loader.batch_sampler.set_epoch(1)
    later = list(loader)
    assert torch.cat([batch.index for batch in later]).tolist() != rows


def test_the_same_seed_gives_the_same_batches_and_another_does_not():
    first, again, other = (
        next(iter(ImageClassification(augment="pretrain", seed=seed).train_dataloader())) for seed in (0, 0, 1)
    )
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.index, other.index)


def test_loading_leaves_the_global_generators_alone():
    data = ImageClassification(augment="pretrain")
    loader = data.train_dataloader()
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    list(loader)
    assert (torch.rand(1), np.random.rand()) == expected


def test_two_ranks_share_the_batches_of_one_process(class_folders):
    single = [batch.index.tolist() for batch in folder_of(class_folders, split="random").train_dataloader()]
    pair = [
        [batch.index.tolist() for batch in on_rank(folder_of(class_folders, split="random"), r, 2).train_dataloader()]
        for r in (0, 1)
    ]
    assert [rows for both in zip(*pair, strict=True) for rows in both] == single[: 2 * len(pair[0])]


def test_pretraining_uses_all_images_and_hides_labels_that_may_not_be_used():
    data = ImageClassification(augment="pretrain", labels_per_class=5)
    dataset = data.train_dataset()
    assert len(dataset) == 1439
    labels = np.array([dataset[row][1] for row in range(len(dataset))])
    assert np.bincount(labels + 1).tolist() == [1439 - 50] + [5] * 10
    probe_rows = gathered(data.probe_dataloader())[2].tolist()
    assert probe_rows == np.flatnonzero(labels >= 0).tolist()


@pytest.mark.parametrize("augment", ["finetune", "none"])
def test_training_with_labels_uses_the_labelled_images_alone(augment):
    data = ImageClassification(augment=augment, labels_per_class=5, batch_size=32)
    _, labels, rows = gathered(data.train_dataloader())
    assert torch.bincount(labels).tolist() == [5] * 10
    _, probe_labels, probe_rows = gathered(data.probe_dataloader())
    assert sorted(rows.tolist()) == probe_rows.tolist()
    assert torch.equal(labels[rows.argsort()], probe_labels)


def test_a_label_fraction_is_the_same_for_every_training_seed():
    first, second, third = (
        gathered(ImageClassification(label_fraction=0.05, seed=seed, label_seed=label).probe_dataloader())[2]
        for seed, label in ((0, 0), (3, 0), (0, 1))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_the_last_small_batch_is_kept_except_in_pretraining_or_when_single():
    sizes = {
        (augment, batch): [len(rows.index) for rows in ImageClassification(
            augment=augment, batch_size=batch, labels_per_class=None if augment == "pretrain" else 5
        ).train_dataloader()]
        for augment, batch in (("pretrain", 1000), ("finetune", 32), ("finetune", 49), ("finetune", 64))
    }  # fmt: skip
    assert sizes == {
        ("pretrain", 1000): [1000],
        ("finetune", 32): [32, 18],
        ("finetune", 49): [49],
        ("finetune", 64): [50],
    }


def test_a_batch_larger_than_the_data_names_the_remedy():
    with pytest.raises(ValueError, match=r"1439 training samples make no batch of batch_size 2000 .* at most 1439"):
        ImageClassification(augment="pretrain", batch_size=2000).train_dataloader()


# Evaluation batches


def test_evaluation_images_are_the_pixels_themselves():
    data = ImageClassification(batch_size=50)
    images, labels, rows = gathered(data.val_dataloader())
    assert rows.tolist() == list(range(179))
    samples = data.reader.read()["all"]
    number = {name: row for row, name in enumerate(samples.ids.tolist())}
    expected = np.stack([samples.pixels[number[name]] for name in data.sample_ids("val")])
    assert np.abs(data.denormalize(images).numpy()[:, 0] - expected[..., 0] / 255).max() < 1e-6
    assert labels.tolist() == [samples.labels[number[name]] for name in data.sample_ids("val")]


def test_evaluation_cuts_the_centre_out_of_the_resized_file(tmp_path):
    """As in the recipe of ImageNet: shorter side 16 / 0.875 = 18, bicubic, then the middle."""
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            save_image(tmp_path / part / name / "0.png", seed=number + 10 * (part == "val"), size=(54, 36))
    data = ImageClassification(layout="folder", root=str(tmp_path), cache="none", **SMALL)
    image = Image.open(tmp_path / "val" / "cat" / "0.png").resize((27, 18), Image.Resampling.BICUBIC)
    expected = np.asarray(image)[1:17, 5:21]
    images = gathered(data.val_dataloader())[0]
    assert np.array_equal(np.rint(255 * data.denormalize(images)[0].permute(1, 2, 0).numpy()), expected)


def test_images_in_their_final_size_are_taken_as_they_are(tmp_path):
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            save_image(tmp_path / part / name / "0.png", seed=number + 10 * (part == "val"), size=(16, 16))
    data = ImageClassification(layout="folder", root=str(tmp_path), crop_ratio=1.0, augment="none", **SMALL)
    for part, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        images, labels, _ = gathered(loader)
        for image, label in zip(images, labels.tolist(), strict=True):
            expected = np.asarray(Image.open(tmp_path / part / ("cat", "dog")[label] / "0.png"))
            assert np.array_equal(np.rint(255 * data.denormalize(image[None])[0].permute(1, 2, 0).numpy()), expected)


@pytest.mark.parametrize("cache", ["auto", "ram"])
def test_randaugment_cuts_its_crops_out_of_whole_files(part_folders, cache):
    data = ImageClassification(layout="folder", root=str(part_folders), augment="randaugment", cache=cache, **SMALL)
    data.setup("fit")
    dataset = data.train_dataset()
    path = data._part("train").paths[3]
    assert np.array_equal(dataset.store[3], np.asarray(Image.open(path).convert("RGB")))  # 20 x 16, not resized
    assert isinstance(dataset.store, datamodules.image_dataset.MemoryStore) == (cache == "ram")
    assert gathered(data.train_dataloader())[0].shape == (12, 3, 16, 16)
    assert gathered(data.probe_dataloader())[0].shape == (12, 3, 16, 16)


def test_the_policy_of_randaugment_is_checked_and_its_colour_is_that_of_the_data(part_folders):
    options = {"layout": "folder", "root": str(part_folders), "augment": "randaugment", **SMALL}
    with pytest.raises(ValueError, match="auto_augment is 'rand-m9-x3', which timm does not know"):
        ImageClassification(auto_augment="rand-m9-x3", **options).train_dataset()
    augment = (
        ImageClassification(mean=[0.1, 0.2, 0.3], std=[1.0] * 3, re_prob=0.25, **options).train_dataset().augmentation
    )
    assert augment.re_prob == 0.25
    assert augment.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_padded_crops_keep_the_labelled_subset(part_folders):
    data = ImageClassification(
        layout="folder", root=str(part_folders), augment="padded_crop", crop_padding=2, labels_per_class=2, **SMALL
    )
    images, labels, _ = gathered(data.train_dataloader())
    assert images.shape == (4, 3, 16, 16)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_evaluate_each_image_once_in_equally_many_batches(world_size):
    loaders = [
        on_rank(ImageClassification(eval_batch_size=16), rank, world_size).test_dataloader()
        for rank in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    assert sorted(row for loader in loaders for row in gathered(loader)[2].tolist()) == list(range(179))


def test_workers_yield_the_same_evaluation_batches(class_folders):
    alone, shared = (
        gathered(folder_of(class_folders, num_workers=workers, cache="none").val_dataloader()) for workers in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_workers_stay_alive_between_epochs(class_folders):
    loader = folder_of(class_folders, num_workers=1).train_dataloader()
    assert loader.persistent_workers
    iterator = iter(loader)
    first = [worker.pid for worker in iterator._workers]
    assert len(list(iterator)) == len(loader)
    assert [worker.pid for worker in iter(loader)._workers] == first


def test_small_sets_in_memory_need_no_workers(class_folders, monkeypatch):
    monkeypatch.setattr("datamodules.repeatable_loaders.usable_cores", lambda: 8)
    options = {**SMALL, "num_workers": None}
    assert folder_of(class_folders, **options).val_dataloader().num_workers == 0
    assert folder_of(class_folders, **{**options, "cache": "none"}).val_dataloader().num_workers == 2
    assert folder_of(class_folders, **{**options, "image_size": 224}).val_dataloader().num_workers == 2


# Files, cache, unreadable images


def test_the_cache_changes_nothing(class_folders):
    for augment in ("pretrain", "finetune", "none"):
        cached, decoded = (folder_of(class_folders, augment=augment, cache=cache) for cache in ("ram", "none"))
        assert torch.equal(gathered(cached.train_dataloader())[0], gathered(decoded.train_dataloader())[0])
        assert torch.equal(gathered(cached.val_dataloader())[0], gathered(decoded.val_dataloader())[0])


@pytest.mark.parametrize(("cache", "expected"), [("ram", 1), ("auto", 1), ("none", 3)])
def test_the_cache_decodes_each_file_once(class_folders, monkeypatch, cache, expected):
    counts: dict[str, int] = {}
    read = datamodules.image_dataset.read_image

    def counting(path: str, *arguments: object) -> np.ndarray:
        counts[path] = counts.get(path, 0) + 1
        return read(path, *arguments)

    monkeypatch.setattr(datamodules.image_dataset, "read_image", counting)
    data = folder_of(class_folders, augment="none", batch_size=3, cache=cache, drop_last=False)
    data.setup("fit")
    for _ in range(3):
        list(data.train_dataloader())
    assert {counts[str(class_folders / name)] for name in data.sample_ids("train")} == {expected}


def test_large_sets_are_not_cached_by_themselves(class_folders, monkeypatch):
    monkeypatch.setattr("datamodules.images.CACHE_LIMIT", 1000)
    data = folder_of(class_folders)
    assert type(data.train_dataset().store).__name__ == "FileStore"
    assert type(folder_of(class_folders, cache="ram").train_dataset().store).__name__ == "MemoryStore"


def test_a_truncated_jpeg_is_named(class_folders):
    path = class_folders / "platelet" / "PL_3.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UnreadableImageError, match=r"platelet/PL_3\.jpg: cannot be decoded .* --data\.on_error skip"):
        folder_of(class_folders).setup()


def test_a_truncated_jpeg_is_named_by_a_worker_too(class_folders):
    path = class_folders / "platelet" / "PL_3.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    data = folder_of(class_folders, cache="none", num_workers=1, drop_last=False)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    with pytest.raises(UnreadableImageError, match=r"platelet/PL_3\.jpg: cannot be decoded"):
        [list(loader) for loader in loaders]


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_unreadable_images_are_skipped_and_counted_when_told_to(class_folders, cache):
    names = folder_of(class_folders).sample_ids("train")
    for name in (names[2], names[7]):
        (class_folders / name).write_bytes(b"broken " + name.encode())
    data = folder_of(class_folders, cache=cache, on_error="skip", augment="none", drop_last=False)
    with pytest.warns(UserWarning, match=rf"split 'train': 2 of {len(names)} images skipped: .*{names[2]}.*{names[7]}"):
        data.setup("fit")
    assert data.sample_ids("train") == [name for name in names if name not in (names[2], names[7])]
    _, labels, rows = gathered(data.train_dataloader())
    assert sorted(rows.tolist()) == list(range(len(names) - 2))
    for label, row in zip(labels.tolist(), rows.tolist(), strict=True):
        assert data.sample_ids("train")[row].startswith(data.class_names[label])


def test_nothing_readable_is_an_error(class_folders):
    for path in class_folders.glob("*/*_*.jpg"):
        path.write_bytes(path.name.encode())
    with pytest.raises(ValueError, match=r"split '\w+': none of its images can be read"):
        folder_of(class_folders, on_error="skip").setup()


def test_grey_files_are_converted_and_it_is_said_once(tmp_path):
    for number in range(40):
        save_image(tmp_path / f"class {number % 2}" / f"{number}.png", seed=number, mode="L" if number % 4 else "RGB")
    data = folder_of(tmp_path)
    with pytest.warns(UserWarning, match="images looked at are grey; they are converted to three channels") as caught:
        data.setup()
    assert sum("looked at" in str(warning.message) for warning in caught) == 1
    assert next(iter(data.val_dataloader())).images.shape[1] == 3


def test_grey_archives_become_three_equal_channels(medmnist_file):
    path = medmnist_file("xray", channels=1)
    data = MedicalImages(root=str(path.parent), name="xray", channels=3, batch_size=4)
    with pytest.warns(UserWarning, match=r"images with 1 channel\(s\) are converted to the 3 that the model is given"):
        images = next(iter(data.train_dataloader())).images
    assert (data.in_channels, data.mean) == (3, [0.5] * 3)
    assert torch.equal(images[:, 0], images[:, 2])


def test_coloured_archives_become_grey_by_luminance(medmnist_file):
    path = medmnist_file("cells")
    data = MedicalImages(root=str(path.parent), name="cells", channels=1, batch_size=9)
    with pytest.warns(UserWarning, match=r"images with 3 channel\(s\) are converted to the 1"):
        images = next(iter(data.val_dataloader())).images
    for row, picture in enumerate(np.load(path)["val_images"]):
        expected = np.asarray(Image.fromarray(picture).convert("L"))
        assert np.abs(data.denormalize(images)[row, 0].numpy() * 255 - expected).max() <= 1.01


def test_archives_are_resized_to_the_size_asked_for(medmnist_file):
    path = medmnist_file("cells")
    data = MedicalImages(root=str(path.parent), name="cells", image_size=14, batch_size=9)
    images = data.denormalize(next(iter(data.val_dataloader())).images)
    expected = np.load(path)["val_images"].reshape(9, 14, 2, 14, 2, 3).mean(axis=(2, 4)) / 255
    assert np.abs(images.permute(0, 2, 3, 1).numpy() - expected).max() < 0.51 / 255
    assert next(iter(data.train_dataloader())).images.shape[2:] == (14, 14)


def test_fundus_images_lose_their_border(aptos_folder):
    cropped = MedicalImages(layout="aptos2019", root=str(aptos_folder), **SMALL)
    whole = MedicalImages(layout="aptos2019", root=str(aptos_folder), crop_border=False, **SMALL)
    dark = {
        name: float((data.denormalize(next(iter(data.val_dataloader())).images).sum(1) < 0.1).float().mean())
        for name, data in (("cropped", cropped), ("whole", whole))
    }
    assert dark["cropped"] < 0.5 * dark["whole"]


# Splits


def test_a_new_split_keeps_identical_files_together(class_folders):
    for number in range(12):
        source = class_folders / "platelet" / f"PL_{number}.jpg"
        (class_folders / "platelet" / f"copy_{number}.jpg").write_bytes(source.read_bytes())
    data = folder_of(class_folders, val_fraction=0.25, test_fraction=0.25)
    data.setup()
    for part in ("train", "val", "test"):
        names = set(data.sample_ids(part))
        for number in range(12):
            assert (f"platelet/PL_{number}.jpg" in names) == (f"platelet/copy_{number}.jpg" in names)


def test_a_random_split_that_tears_copies_apart_is_refused(class_folders):
    for number in range(12):
        source = class_folders / "platelet" / f"PL_{number}.jpg"
        (class_folders / "platelet" / f"copy_{number}.jpg").write_bytes(source.read_bytes())
    with pytest.raises(
        ValueError, match=r"\d+ image\(s\) or group\(s\) are in more than one split, such as .*platelet/"
    ) as caught:
        folder_of(class_folders, split="random").setup()
    assert "set --data.split grouped to split anew, or --data.allow_leakage true to go on" in str(caught.value)
    with pytest.warns(UserWarning, match=r"image\(s\) or group\(s\) are in more than one split"):
        folder_of(class_folders, split="random", allow_leakage=True).setup()


def test_a_given_split_with_the_same_file_twice_is_refused(part_folders):
    copy = part_folders / "test" / "dog" / "9.JPEG"
    copy.write_bytes((part_folders / "train" / "cat" / "1.JPEG").read_bytes())
    with pytest.raises(
        ValueError, match=r"1 image\(s\) or group\(s\) .* test: test/dog/9\.JPEG = train: train/cat/1\.JPEG"
    ):
        ImageClassification(layout="folder", root=str(part_folders), **SMALL).setup()


def test_lesions_stay_in_one_part(isic_folder):
    data = MedicalImages(layout="isic2019", root=str(isic_folder), val_fraction=0.2, test_fraction=0.2, **SMALL)
    data.setup()
    lesion_of = dict(zip(*(data.reader.read()["all"].ids, data.reader.read()["all"].groups), strict=True))
    lesions = {part: {lesion_of[name] for name in data.sample_ids(part)} - {""} for part in ("train", "val", "test")}
    assert all(lesions.values())
    assert not lesions["train"] & lesions["val"]
    assert not (lesions["train"] | lesions["val"]) & lesions["test"]


def test_lesions_are_ignored_when_told_to(isic_folder):
    (isic_folder / "ISIC_2019_Training_Metadata.csv").unlink()
    data = MedicalImages(layout="isic2019", root=str(isic_folder), split="random", **SMALL)
    data.setup()
    assert len(data.sample_ids("train")) + len(data.sample_ids("val")) + len(data.sample_ids("test")) == 60


def test_a_part_folder_is_left_as_it_is(part_folders):
    data = ImageClassification(layout="folder", root=str(part_folders), **SMALL)
    assert [len(data.sample_ids(part)) for part in ("train", "val", "test")] == [12, 6, 4]


@pytest.mark.parametrize("split", ["grouped", "random"])
def test_given_parts_can_be_pooled_and_split_anew(part_folders, split):
    options = {"val_fraction": 0.25, "test_fraction": 0.25, "split": split, **SMALL}
    data = ImageClassification(layout="folder", root=str(part_folders), **options)
    parts = {part: data.sample_ids(part) for part in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 22
    assert any(name.startswith("train/") for name in parts["test"])


def test_a_given_split_that_is_not_there_is_an_error(class_folders):
    with pytest.raises(ValueError, match=r"--data\.split given: this data set comes without a split"):
        folder_of(class_folders, split="given").setup()


def test_a_missing_validation_part_is_cut_from_training(part_folders):
    (part_folders / "val").rename(part_folders.parent / "val")
    data = ImageClassification(layout="folder", root=str(part_folders), val_fraction=0.2, **SMALL)
    data.setup()
    assert [len(data.sample_ids(part)) for part in ("train", "val", "test")] == [10, 2, 4]
    assert all(name.startswith("train/") for name in data.sample_ids("val"))
    assert all(name.startswith("test/") for name in data.sample_ids("test"))


def test_validation_stands_in_for_a_missing_test_part(part_folders):
    (part_folders / "test").rename(part_folders.parent / "test")
    data = ImageClassification(layout="folder", root=str(part_folders), **SMALL)
    with pytest.warns(UserWarning, match="the validation part stands in for the missing test part"):
        data.setup("test")
    assert data.sample_ids("test") == data.sample_ids("val")


def test_training_without_a_training_part_is_an_error(part_folders):
    (part_folders / "train").rename(part_folders.parent / "train")
    data = ImageClassification(layout="folder", root=str(part_folders), **SMALL)
    data.setup("validate")
    with pytest.raises(ValueError, match="the data set has no part 'train', only test, val; add it"):
        data.setup("fit")


def test_a_class_that_training_lacks_is_named(part_folders):
    save_image(part_folders / "val" / "bird" / "1.png", seed=77)
    with pytest.raises(ValueError, match=r"split 'val' has images of 1 class\(es\) without any training image: bird"):
        ImageClassification(layout="folder", root=str(part_folders), **SMALL).setup("fit")


# Unlabelled images


def test_a_heap_of_images_can_be_pretrained_on(tmp_path):
    for number in range(20):
        save_image(tmp_path / f"{number}.png", seed=number)
    data = ImageClassification(layout="folder", root=str(tmp_path), augment="pretrain", **SMALL)
    data.setup()
    assert data.num_classes == 0
    assert next(iter(data.train_dataloader())).labels.tolist() == [-1] * 4
    with pytest.raises(ValueError, match="no training image has a label, so no probe can be fitted"):
        data.probe_dataloader()
    with pytest.raises(ValueError, match=r"no labelled image; only --data\.augment pretrain works without labels"):
        ImageClassification(layout="folder", root=str(tmp_path), **SMALL).setup()


def test_unlabelled_rows_are_for_pretraining_only(class_folders):
    rows = [["path", "class", "label", "split"]]
    for label, name in enumerate(("basophil", "eosinophil", "platelet")):
        for number in range(12):
            known = number % 3 == 0 or number >= 8
            part = "train" if number < 8 else "val" if number < 10 else "test"
            rows.append([f"{name}/{name[:2].upper()}_{number}.jpg", *((name, label) if known else ("", "")), part])
    write_csv(class_folders / "split.csv", rows)
    assert len(folder_of(class_folders, augment="pretrain").train_dataset()) == 24
    assert len(folder_of(class_folders, augment="finetune").train_dataset()) == 9


# Predictions


def test_predictions_follow_the_rows_that_were_predicted(class_folders):
    data = folder_of(class_folders)
    table = data.prediction_table(np.array([2, 0]), np.array([[1.0, 0, 0], [0, 0.5, 0.5]]))
    names = data.sample_ids("test")
    assert data.sample_ids() == names
    assert table.columns.tolist() == ["path", "basophil", "eosinophil", "platelet"]
    assert table["path"].tolist() == [names[2], names[0]]
    assert table["platelet"].tolist() == [0, 0.5]


def test_predictions_of_another_number_of_classes_are_refused(class_folders):
    with pytest.raises(
        ValueError, match=r"the model predicts 8 classes, but the data set has 3 \(basophil, eosinophil, "
    ):
        folder_of(class_folders).prediction_table(np.array([0]), np.ones((1, 8)))


@pytest.mark.parametrize("part", ["train", "val"])
def test_any_part_can_be_predicted(class_folders, part):
    data = folder_of(class_folders, predict_split=part)
    assert data.sample_ids() == data.sample_ids(part)
    assert gathered(data.predict_dataloader())[2].tolist() == list(range(len(data.sample_ids(part))))


@pytest.mark.parametrize(
    ("layout", "names"), [("aptos2019", ["0a", "0b"]), ("folder", ["0a.png", "0b.png"]), ("isic2019", ["0a", "0b"])]
)
def test_a_folder_of_new_images_can_be_predicted(request, tmp_path, layout, names):
    fixture = {"aptos2019": "aptos_folder", "folder": "class_folders", "isic2019": "isic_folder"}[layout]
    root = request.getfixturevalue(fixture)
    for name in ("0b", "0a"):
        save_image(tmp_path / "new" / f"{name}.png", seed=3)
    data = MedicalImages(layout=layout, root=str(root), predict_path=str(tmp_path / "new"), **SMALL)
    data.setup("predict")
    assert data.sample_ids() == names
    images, labels, rows = gathered(data.predict_dataloader())
    assert images.shape == (2, 3, 16, 16)
    assert (labels.tolist(), rows.tolist()) == ([-1, -1], [0, 1])


def test_new_images_for_an_archive_are_resized_whole(medmnist_file, tmp_path):
    path = medmnist_file("cells")
    save_image(tmp_path / "new" / "a.png", seed=3, size=(80, 56))
    data = MedicalImages(root=str(path.parent), name="cells", predict_path=str(tmp_path / "new"), batch_size=2)
    assert gathered(data.predict_dataloader())[0].shape == (1, 3, 28, 28)


def test_an_empty_or_missing_folder_to_predict_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data\.predict_path '.*' does not exist"):
        ImageClassification(predict_path=str(tmp_path / "none")).setup("predict")
    with pytest.raises(FileNotFoundError, match=r"--data\.predict_path '.*': no image found"):
        ImageClassification(predict_path=str(tmp_path)).setup("predict")


# Downloads and archives through the datamodule


def test_an_archive_is_downloaded_by_prepare_data(server, medmnist_file, tmp_path):  # noqa: F811
    source = medmnist_file("bloodmnist")
    server.content = source.read_bytes()
    mirror = server.url.rpartition("/")[0]
    data = MedicalImages(root=str(tmp_path / "new"), mirror=mirror, verify_md5=False, batch_size=4)
    assert (data.num_classes, data.image_size) == (8, 28)
    assert server.requests == []
    data.prepare_data()
    data.setup("fit")
    assert len(server.requests) == 1
    assert next(iter(data.train_dataloader())).images.shape == (4, 3, 28, 28)


def test_without_a_connection_prepare_data_says_what_to_fetch_where(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.downloads.time.sleep", lambda _: None)
    data = MedicalImages(root=str(tmp_path), mirror="http://127.0.0.1:9")
    with pytest.raises(
        DownloadError, match=r"fetch http://127\.0\.0\.1:9/bloodmnist\.npz .* put it at .*/bloodmnist\.npz"
    ):
        data.prepare_data()


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_gets_a_validation_part_from_its_training_part(cifar_archive, classes):
    path = cifar_archive(classes)
    data = ImageClassification(
        layout=f"cifar{classes}", root=str(path.parent), verify_md5=False, val_fraction=0.2, batch_size=8
    )
    data.prepare_data()
    data.setup()
    expected = [80, 20, 20] if classes == 10 else [200, 100, 300]
    assert [len(data.sample_ids(part)) for part in ("train", "val", "test")] == expected
    assert next(iter(data.train_dataloader())).images.shape == (8, 3, 32, 32)


def test_leaks_of_a_published_split_are_said_and_left(medmnist_file, monkeypatch):
    random = np.random.RandomState(0)
    train = random.randint(0, 256, (30, 28, 28, 3), dtype=np.uint8)
    val = np.concatenate([train[:2], random.randint(0, 256, (7, 28, 28, 3), dtype=np.uint8)])
    path = medmnist_file("bloodmnist", train_images=train, val_images=val)
    with pytest.raises(
        ValueError, match=r"2 image\(s\) or group\(s\) are in more than one split, such as train: train-0 = val: val-0"
    ):
        MedicalImages(root=str(path.parent), verify_md5=False).setup()
    monkeypatch.setattr("datamodules.downloads.md5_of", lambda _: "7053d0359d879ad8a5505303e11de1dc")
    data = MedicalImages(root=str(path.parent))
    data.prepare_data()
    with pytest.warns(UserWarning, match=r"2 image\(s\) or group\(s\) .* this is so in the published data set"):
        data.setup()


# With a trainer


class Recorder(LightningModule):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.index.tolist(), batch.images.sum().item()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        assert isinstance(batch, ImageBatch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(tmp_path, data, **options):
    module = Recorder()
    resume = options.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=1)],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_a_resumed_run_continues_with_the_next_batch(class_folders, tmp_path, steps):
    def data():
        return folder_of(class_folders, augment="pretrain", batch_size=6)

    whole = run(tmp_path, data(), max_epochs=3)
    resumed = run(tmp_path, data(), max_epochs=3, ckpt_path=tmp_path / "kept" / f"step={steps}.ckpt")
    assert resumed == whole[steps:]
    assert [epoch for epoch, _, _ in whole] == sorted([0, 1, 2] * (len(whole) // 3))


def test_the_command_line_knows_every_option():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(MedicalImages, "data", fail_untyped=False)
    arguments = ["--data=MedicalImages", "--data.layout=medmnist", "--data.name=breastmnist", "--data.views=2"]
    configuration = parser.parse_args([*arguments, "--data.augment=pretrain", "--data.label_fraction=0.1"])
    data = parser.instantiate(configuration).data
    assert (data.num_classes, data.hparams.views, data.hparams.label_fraction) == (2, 2, 0.1)


@pytest.mark.parametrize(("given", "everything", "used"), [(None, "7", 7), (3, "7", 3), (None, None, 0)])
def test_the_seed_is_that_of_seed_everything_unless_given(monkeypatch, given, everything, used):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if everything is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", everything)
    data = ImageClassification(layout="digits", seed=given, augment="pretrain")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    expected = ImageClassification(layout="digits", seed=used, augment="pretrain")
    expected.setup("fit")
    same = next(iter(expected.train_dataloader()))
    assert torch.equal(batch.index, same.index)
    assert torch.equal(batch.images, same.images)
