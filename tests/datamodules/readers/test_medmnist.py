import numpy as np
import pytest

from datamodules.downloads import ChecksumError, RemoteFile
from datamodules.readers.medmnist import CATALOGUE, SIZES, MedMNISTReader
from tests.data_layouts import md5


def test_an_archive_of_ones_own_tells_its_facts(medmnist_file):
    path = medmnist_file("cells")
    reader = MedMNISTReader(str(path.parent), "cells")
    facts = reader.facts
    assert (facts.class_names, facts.image_size, facts.channels, facts.subject) == (("0", "1", "2"), 28, 3, "colour")
    parts = reader.read()
    arrays = np.load(path)
    for part, count in (("train", 30), ("val", 9), ("test", 12)):
        assert np.array_equal(parts[part].pixels, arrays[f"{part}_images"])
        assert parts[part].labels.tolist() == arrays[f"{part}_labels"][:, 0].tolist()
        assert parts[part].ids.tolist() == [f"{part}-{row}" for row in range(count)]


def test_grey_archives_get_a_channel(medmnist_file):
    path = medmnist_file("xray", channels=1)
    reader = MedMNISTReader(str(path.parent), "xray")
    assert (reader.facts.channels, reader.facts.subject, reader.facts.mean) == (1, "grey", (0.5,))
    assert reader.read()["val"].pixels.shape == (9, 28, 28, 1)


def test_class_names_can_be_given(medmnist_file):
    path = medmnist_file("cells")
    assert MedMNISTReader(str(path.parent), "cells", class_names=["a", "b", "c"]).facts.class_names == ("a", "b", "c")
    more = ["a", "b", "c", "a class without an image"]
    assert MedMNISTReader(str(path.parent), "cells", class_names=more).facts.class_names == tuple(more)
    with pytest.raises(ValueError, match=r"class_names has 2 names, but .*cells\.npz has 3 classes"):
        assert MedMNISTReader(str(path.parent), "cells", class_names=["a", "b"]).facts


def test_the_catalogue_agrees_with_the_medmnist_package():
    from medmnist import INFO

    for name, published in CATALOGUE.items():
        official = INFO[name]
        assert published.channels == official["n_channels"]
        assert len(published.class_names) == len(official["label"])
        assert published.md5 == tuple(official["MD5" if size == 28 else f"MD5_{size}"] for size in SIZES)
        reader = MedMNISTReader("somewhere", name)
        assert reader.remote.url == official["url"]
        assert MedMNISTReader("somewhere", name, 64).remote.url == official["url_64"]
        shared = {"ig", "grade 0", "grade 1", "grade 2", "grade 3", "grade 4"}
        for ours, theirs in zip(published.class_names, official["label"].values(), strict=True):
            assert ours.lower() == theirs.lower() or ours in shared


def test_facts_of_the_collection_need_no_file(tmp_path):
    facts = MedMNISTReader(str(tmp_path / "none"), "retinamnist", 64).facts
    assert (len(facts.class_names), facts.image_size, facts.channels) == (5, 64, 3)
    assert not (tmp_path / "none").exists()


def test_a_published_archive_is_checked(medmnist_file):
    path = medmnist_file("breastmnist", channels=1)
    with pytest.raises(ChecksumError) as caught:
        MedMNISTReader(str(path.parent), "breastmnist").prepare()
    assert md5(path) in str(caught.value)
    assert "750601b1f35ba3300ea97c75c52ff8f6" in str(caught.value)
    assert "--data.verify_md5 false" in str(caught.value)


def test_an_altered_archive_is_read_when_told_to(medmnist_file):
    path = medmnist_file("breastmnist", channels=1)
    reader = MedMNISTReader(str(path.parent), "breastmnist", verify_md5=False)
    reader.prepare()
    with pytest.raises(ValueError, match=r"train_labels row 2 is 2, expected 0\.\.1"):
        reader.read()


def test_a_mirror_replaces_the_official_address():
    reader = MedMNISTReader("somewhere", "bloodmnist", 128, mirror="http://127.0.0.1:1/sets/")
    assert reader.remote == RemoteFile("http://127.0.0.1:1/sets/bloodmnist_128.npz", "adace1e0ed228fccda1f39692059dd4c")


def test_a_missing_archive_without_download_says_where_to_fetch_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        MedMNISTReader(str(tmp_path), "bloodmnist", download=False)
    assert f"{tmp_path}/bloodmnist.npz does not exist and --data.download is false" in str(caught.value)
    assert "https://zenodo.org/records/10519652/files/bloodmnist.npz?download=1" in str(caught.value)


def test_a_misspelt_name_is_corrected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'bloodminst' is no data set .*did you mean 'bloodmnist'\?"):
        MedMNISTReader(str(tmp_path), "bloodminst")


def test_chestmnist_is_refused_with_its_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="ChestMNIST has several labels per image"):
        MedMNISTReader(str(tmp_path), "chestmnist")


def test_an_unpublished_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="medmnist_size is 32, expected one of 28, 64, 128, 224"):
        MedMNISTReader(str(tmp_path), "bloodmnist", 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"val_images": None, "images": np.zeros(3)},
            r"cells\.npz: keys .*images; a MedMNIST archive has .*missing: val_",
        ),
        ({"val_labels": np.zeros((9, 2), np.uint8)}, r"val_labels has 2 labels per image"),
        ({"val_labels": np.zeros((8, 1), np.uint8)}, r"9 val_images but 8 val_labels"),
        ({"val_labels": np.zeros((9, 1))}, r"val_labels must be whole numbers from 0, found float64"),
        ({"val_labels": -np.ones((9, 1), int)}, r"val_labels must be whole numbers from 0"),
        ({"val_images": np.zeros((9, 28, 28, 3))}, r"val_images is float64 \(9, 28, 28, 3\), expected uint8"),
        ({"val_images": np.zeros((9, 28, 28, 4), np.uint8)}, r"val_images is uint8 \(9, 28, 28, 4\)"),
    ],
)
def test_other_arrays_are_refused(medmnist_file, changes, message):
    path = medmnist_file("cells", **changes)
    with pytest.raises(ValueError, match=message):
        MedMNISTReader(str(path.parent), "cells").read()


def test_flat_images_are_refused_from_their_header(medmnist_file):
    path = medmnist_file("cells", train_images=np.zeros((30, 784), np.uint8))
    with pytest.raises(ValueError, match=r"cells\.npz: train_images\.npy has shape \(30, 784\), expected \(N, H, W\)"):
        assert MedMNISTReader(str(path.parent), "cells").facts


def test_a_truncated_archive_is_named(medmnist_file):
    path = medmnist_file("cells")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cells\.npz: is no complete npz archive .*fetch it again"):
        MedMNISTReader(str(path.parent), "cells").read()


def test_a_damaged_array_is_named(medmnist_file):
    path = medmnist_file("cells")
    content = bytearray(path.read_bytes())
    content[3000:3400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cells\.npz: array train_images is damaged .*fetch the file again"):
        MedMNISTReader(str(path.parent), "cells").read()


def test_pickles_are_never_loaded(medmnist_file):
    path = medmnist_file("cells", val_labels=np.array([{"a": 1}] * 9, dtype=object))
    with pytest.raises(ValueError, match="val_labels is damaged"):
        MedMNISTReader(str(path.parent), "cells").read()
