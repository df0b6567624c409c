import os
import pickle
import tarfile

import numpy as np
import pytest

from datamodules.downloads import ChecksumError
from datamodules.readers.cifar import CIFAR10, CIFAR100, CifarReader


def reader_of(archive_path, archive=CIFAR10, **options):
    return CifarReader(str(archive_path.parent), archive, verify_md5=False, **options)


@pytest.mark.parametrize(("classes", "archive"), [(10, CIFAR10), (100, CIFAR100)])
def test_an_archive_is_unpacked_and_read(cifar_archive, classes, archive):
    path = cifar_archive(classes)
    reader = reader_of(path, archive)
    parts = reader.read()
    assert reader.facts.class_names == tuple(f"class {label}" for label in range(classes))
    assert {part: len(samples) for part, samples in parts.items()} == (
        {"train": 100, "test": 20} if classes == 10 else {"train": 300, "test": 300}
    )
    assert not (path.parent / f"{archive.folder}.part").exists()


def test_the_planes_become_channels(cifar_archive):
    path = cifar_archive()
    samples = reader_of(path).read()["train"]
    with open(path.parent / "cifar-10-batches-py" / "data_batch_2", "rb") as stream:
        row = pickle.load(stream)["data"][3]
    for y, x, channel in ((0, 0, 0), (5, 7, 1), (31, 30, 2)):
        assert samples.pixels[23, y, x, channel] == row[channel * 1024 + y * 32 + x]


def test_pickles_of_python_2_are_read(cifar_archive, tmp_path):
    """The official files name NumPy's old modules and hold byte strings."""
    path = cifar_archive()
    reader = reader_of(path)
    reader.prepare()
    data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    old = pickle.dumps({"data": data, "labels": [3, 4]}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in old
    target = path.parent / "cifar-10-batches-py" / "test_batch"
    target.write_bytes(old)
    samples = reader.read()["test"]
    assert samples.labels.tolist() == [3, 4]
    assert np.array_equal(samples.pixels[0, :, :, 1].reshape(-1), data[0, 1024:2048])


def test_the_checksums_agree_with_torchvision():
    from torchvision import datasets

    for ours, theirs in ((CIFAR10, datasets.CIFAR10), (CIFAR100, datasets.CIFAR100)):
        assert (ours.md5, ours.folder) == (theirs.tgz_md5, theirs.base_folder)
        assert list(ours.train.items()) == [tuple(entry) for entry in theirs.train_list]
        assert list(ours.test.items()) == [tuple(entry) for entry in theirs.test_list]
        assert (ours.meta, ours.names_key) == (theirs.meta["filename"], theirs.meta["key"])
        reader = CifarReader("somewhere", ours)
        assert reader.remote.url == theirs.url


def test_code_in_a_pickle_is_never_run(cifar_archive, tmp_path):
    path = cifar_archive()
    reader = reader_of(path)
    reader.prepare()

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by a pickle"),)

    target = path.parent / "cifar-10-batches-py" / "test_batch"
    target.write_bytes(pickle.dumps({"data": Harmful()}))
    with pytest.raises(
        ValueError, match=r"test_batch: is no CIFAR file \(asks for \w+\.mkdir, which no CIFAR file needs"
    ):
        reader.read()
    assert not (tmp_path / "made by a pickle").exists()


def test_a_truncated_batch_is_named(cifar_archive):
    path = cifar_archive()
    reader = reader_of(path)
    reader.prepare()
    target = path.parent / "cifar-10-batches-py" / "data_batch_4"
    target.write_bytes(target.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"data_batch_4: is no CIFAR file"):
        reader.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((20, 3071), np.uint8)}, "'data' is no uint8 array of 3072 columns"),
        ({"labels": [0] * 19}, "'labels' does not have one label for each of 20 images"),
        ({"labels": [0] * 7 + [10] * 13}, r"image 7 has label 10, expected 0\.\.9"),
    ],
)
def test_other_content_is_refused(cifar_archive, changes, message):
    with pytest.raises(ValueError, match=rf"data_batch_1: {message}"):
        reader_of(cifar_archive(**changes)).read()


def test_altered_batches_are_refused_unless_told_otherwise(cifar_archive):
    path = cifar_archive()
    reader_of(path).prepare()
    with pytest.raises(
        ChecksumError, match=r"data_batch_1: MD5 is \w+, the published file has c99cafc1.*verify_md5 false"
    ):
        CifarReader(str(path.parent), CIFAR10).read()


def test_an_altered_archive_is_not_even_unpacked(cifar_archive):
    path = cifar_archive()
    with pytest.raises(ChecksumError, match=r"cifar-10-python\.tar\.gz: MD5 is"):
        CifarReader(str(path.parent), CIFAR10).prepare()
    assert not (path.parent / "cifar-10-batches-py").exists()


def test_a_truncated_archive_leaves_nothing_behind(cifar_archive):
    path = cifar_archive()
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz: cannot be unpacked .*fetch it again"):
        reader_of(path).prepare()
    assert [entry.name for entry in path.parent.iterdir() if entry.suffix != ".lock"] == [path.name]


def test_another_archive_is_named(cifar_archive):
    path = cifar_archive(100)
    path.rename(path.parent / "cifar-10-python.tar.gz")
    with pytest.raises(ValueError, match="holds no folder cifar-10-batches-py; it is another archive"):
        reader_of(path).prepare()


def test_an_archive_cannot_write_outside(tmp_path):
    (tmp_path / "evil").write_text("x")
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "evil", arcname="../../evil2")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        reader_of(path).prepare()


def test_a_missing_archive_without_download_says_where_to_fetch_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"download is false; fetch https://www\.cs\.toronto\.edu/~kriz/cifar-100"
    ):
        CifarReader(str(tmp_path), CIFAR100, download=False)


def test_the_unpacked_folder_is_enough(cifar_archive):
    path = cifar_archive()
    reader_of(path).prepare()
    path.unlink()
    assert len(reader_of(path, download=False).read()["train"]) == 100
