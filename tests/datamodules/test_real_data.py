"""The readers and the datamodules on small real data sets in their genuine layouts."""

import numpy as np
import pytest
import torch

from datamodules import ImageClassification, MedicalImages
from datamodules.downloads import ChecksumError
from datamodules.image_files import is_grey_file
from datamodules.readers.isic2019 import LABELS, Isic2019Reader
from datamodules.splits import grouped_split

pytestmark = pytest.mark.realdata

BLOOD = ["basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet"]


def counts(data, part):
    return np.bincount(data._part(part).labels, minlength=data.num_classes).tolist()


def test_blood_cells_in_folders_with_a_split_table(shared_data):
    root = shared_data / "medical" / "PBC_dataset_normal_DIB"
    data = MedicalImages(layout="folder", root=str(root), image_size=64, augment="pretrain", views=2)
    assert data.class_names == BLOOD
    data.setup()
    assert {part: counts(data, part) for part in ("train", "val", "test")} == {
        "train": [96] * 8,
        "val": [18] * 8,
        "test": [30] * 8,
    }
    batch = next(iter(data.train_dataloader()))
    assert [view.shape for view in batch.views] == [(128, 3, 64, 64)] * 2
    names = data.sample_ids("train")
    for label, row in zip(batch.labels.tolist(), batch.index.tolist(), strict=True):
        assert names[row].split("/")[0] == BLOOD[label]


def test_blood_cells_cached_equal_blood_cells_decoded(shared_data):
    root = shared_data / "medical" / "PBC_dataset_normal_DIB"
    options = {"layout": "folder", "root": str(root), "image_size": 64, "num_workers": 0, "eval_batch_size": 144}
    cached, decoded = (MedicalImages(cache=cache, **options) for cache in ("ram", "none"))
    (first,), (second,) = (list(data.val_dataloader()) for data in (cached, decoded))
    assert torch.equal(first.images, second.images)


def test_blood_cells_split_anew_stay_balanced(shared_data):
    root = shared_data / "medical" / "PBC_dataset_normal_DIB"
    data = MedicalImages(layout="folder", root=str(root), split="grouped", image_size=28)
    assert counts(data, "test") == counts(data, "val") == [14] * 8


def test_small_blood_cells_as_an_archive(shared_data):
    data = MedicalImages(root=str(shared_data / "medical"), name="pbc28", class_names=BLOOD, labels_per_class=10)
    data.prepare_data()
    data.setup()
    assert (data.image_size, data.in_channels, data.class_names) == (28, 3, BLOOD)
    assert [len(data.sample_ids(part)) for part in ("train", "val", "test")] == [1920, 240, 400]
    labels = torch.cat([batch.labels for batch in data.probe_dataloader()])
    assert torch.bincount(labels).tolist() == [10] * 8


def test_altered_pneumonia_archive_needs_two_permissions(shared_data):
    root = str(shared_data / "medical")
    data = MedicalImages(root=root, name="pneumoniamnist")
    assert (data.class_names, data.in_channels) == (["normal", "pneumonia"], 1)
    with pytest.raises(ChecksumError, match="the published file has 28209eda62fecd6e6a2d98b1501bb15f"):
        data.prepare_data()
    with pytest.raises(
        ValueError, match=r"8 image\(s\) or group\(s\) are in more than one split, such as train: train-"
    ):
        MedicalImages(root=root, name="pneumoniamnist", verify_md5=False).setup()
    data = MedicalImages(root=root, name="pneumoniamnist", verify_md5=False, allow_leakage=True, augment="pretrain")
    data.prepare_data()
    with pytest.warns(UserWarning, match="used as they are, as allow_leakage is set"):
        data.setup()
    assert counts(data, "train") == [388, 3494]
    assert [len(data.sample_ids(part)) for part in ("val", "test")] == [524, 624]
    assert next(iter(data.train_dataloader())).images.shape == (128, 1, 28, 28)


def test_pneumonia_pooled_and_split_anew_does_not_leak(shared_data):
    data = MedicalImages(root=str(shared_data / "medical"), name="pneumoniamnist", verify_md5=False, split="grouped")
    data.setup("fit")
    parts = {part: {image.tobytes() for image in data._part(part).pixels} for part in ("train", "val", "test")}
    assert not parts["train"] & parts["val"]
    assert not (parts["train"] | parts["val"]) & parts["test"]
    sizes = [len(data.sample_ids(part)) for part in ("train", "val", "test")]
    assert sizes == [pytest.approx(share * 5030, rel=0.02) for share in (0.8, 0.1, 0.1)]


def test_the_label_table_of_isic_2019(shared_data, tmp_path):
    (tmp_path / LABELS).symlink_to(shared_data / "medical" / LABELS)
    reader = Isic2019Reader(str(tmp_path), with_lesions=False)
    ids, labels, names = reader.labels
    assert len(ids) == len(set(ids)) == 25_331
    assert dict(zip(names, np.bincount(labels).tolist(), strict=True)) == {
        "MEL": 4522,
        "NV": 12875,
        "BCC": 3323,
        "AK": 867,
        "BKL": 2624,
        "DF": 239,
        "VASC": 253,
        "SCC": 628,
    }
    assert sum(name.endswith("_downsampled") for name in ids) == 2074
    with pytest.raises(FileNotFoundError, match=r"25331 images that belong there"):
        reader.read()


def test_a_third_of_isic_2019_is_split_without_tearing_lesions_apart(shared_data, tmp_path):
    """The table has no lesion ids, so neighbours of a class are joined to lesions of one to seven images."""
    (tmp_path / LABELS).symlink_to(shared_data / "medical" / LABELS)
    labels = Isic2019Reader(str(tmp_path), with_lesions=False).labels[1][::3]
    random = np.random.RandomState(0)
    groups = np.full(len(labels), "", dtype="U16")
    for label in range(8):
        rows = np.flatnonzero(labels == label)
        start = 0
        while start < len(rows):
            size = int(random.choice([1, 2, 3, 7], p=[0.45, 0.35, 0.195, 0.005]))
            groups[rows[start : start + size]] = f"lesion {label} {start}" if size > 1 else ""
            start += size
    parts = grouped_split(labels, groups, val=0.1, test=0.1, seed=0)
    lesions = {part: set(groups[rows].tolist()) - {""} for part, rows in parts.items()}
    assert not lesions["train"] & lesions["val"]
    assert not (lesions["train"] | lesions["val"]) & lesions["test"]
    for part, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        for label in range(8):
            found = np.isin(np.flatnonzero(labels == label), parts[part]).mean()
            assert found == pytest.approx(share, abs=0.04)


def test_tiny_imagenet_in_folders(shared_data):
    root = shared_data / "images" / "tiny-imagenet-10"
    data = ImageClassification(layout="folder", root=str(root), image_size=32)
    with pytest.warns(UserWarning, match=r"images looked at are grey; they are converted to three channels"):
        data.setup("fit")
    assert (data.num_classes, counts(data, "train"), counts(data, "val")) == (10, [400] * 10, [50] * 10)
    grey = [row for row, path in enumerate(data._part("val").paths) if is_grey_file(path)]
    images = torch.cat([batch.images for batch in data.val_dataloader()])
    assert all(torch.allclose(*(data.denormalize(images[[row]])[0, [0, 2]]), atol=1e-6) for row in grey)


def test_cifar_pictures_in_folders_get_a_validation_part(shared_data):
    data = ImageClassification(layout="folder", root=str(shared_data / "images" / "cifar10"), image_size=32)
    assert [counts(data, part) for part in ("train", "val", "test")] == [[360] * 10, [40] * 10, [100] * 10]


def test_one_picture_of_each_imagenet_class_can_be_evaluated(shared_data):
    root = shared_data / "images" / "imagenet1k-samples"
    data = ImageClassification(layout="folder", root=str(root), image_size=64, eval_batch_size=250, cache="none")
    assert data.num_classes == 1000
    data.setup("validate")
    assert data._part("val").labels.tolist() == list(range(1000))
    assert next(iter(data.val_dataloader())).images.shape == (250, 3, 64, 64)
    with pytest.raises(ValueError, match="the data set has no part 'train', only val"):
        data.setup("fit")
