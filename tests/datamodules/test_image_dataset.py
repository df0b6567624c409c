import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.augmentations import CentreView, augmentation
from datamodules.image_dataset import BatchBuilder, FileStore, ImageDataset, MemoryStore
from datamodules.image_files import UnreadableImageError
from datamodules.sampling import SampleKey, TrainBatchSampler
from tests.data_layouts import save_image

IMAGES = np.random.RandomState(0).randint(0, 256, (20, 12, 12, 3), dtype=np.uint8)
LABELS = np.arange(20) % 4


def files(tmp_path, count=8):
    return [str(save_image(tmp_path / f"{number}.jpg", seed=number, size=(30 + number, 24))) for number in range(count)]


def test_memory_holds_images_of_any_size():
    images = [IMAGES[0], IMAGES[1, :5], IMAGES[2, :, :7], IMAGES[3, ..., :1]]
    store = MemoryStore(images)
    assert len(store) == 4
    assert all(np.array_equal(store[row], image) for row, image in enumerate(images))


def test_memory_does_not_copy_a_block():
    store = MemoryStore(IMAGES)
    assert np.shares_memory(store[3], IMAGES)


def test_memory_equals_disk(tmp_path):
    disk = FileStore(files(tmp_path), channels=3, shorter_side=16)
    memory, readable, messages = disk.read_all(keep=True, skip_unreadable=False)
    assert readable.all()
    assert messages == []
    assert all(np.array_equal(disk[row], memory[row]) for row in range(len(disk)))


def test_unreadable_files_are_skipped_with_their_messages(tmp_path):
    paths = files(tmp_path)
    (tmp_path / "2.jpg").write_bytes(b"nothing")
    store = FileStore(paths, channels=3, shorter_side=16)
    memory, readable, messages = store.read_all(keep=True, skip_unreadable=True)
    assert np.flatnonzero(~readable).tolist() == [2]
    assert len(memory) == 7
    assert np.array_equal(memory[2], store[3])
    assert len(messages) == 1
    assert "2.jpg: cannot be decoded" in messages[0]
    assert store.read_all(keep=False, skip_unreadable=True)[0] is None


def test_an_unreadable_file_stops_the_reading_otherwise(tmp_path):
    paths = files(tmp_path)
    (tmp_path / "2.jpg").write_bytes(b"nothing")
    with pytest.raises(UnreadableImageError, match=r"2\.jpg"):
        FileStore(paths, channels=3, shorter_side=16).read_all(keep=True, skip_unreadable=False)


def test_conversion_is_noticed_from_headers(tmp_path):
    paths = [
        str(save_image(tmp_path / f"{number}.png", number, mode="L" if number < 3 else "RGB")) for number in range(8)
    ]
    three, one = (FileStore(paths, channels, 16).conversion() for channels in (3, 1))
    assert three == "3 of 8 images looked at are grey; they are converted to three channels"
    assert one == "5 of 8 images looked at are coloured; they are converted to one channel"
    assert FileStore(paths[3:], 3, 16).conversion() is None


def test_rows_select_and_keep_their_number():
    dataset = ImageDataset(MemoryStore(IMAGES), LABELS, np.array([7, 2]), CentreView(12, whole=True))
    views, label, row = dataset[SampleKey(epoch=3, pass_=0, index=0)]
    assert len(dataset) == 2
    assert (label, row) == (3, 7)
    assert np.array_equal(views[0], IMAGES[7])


def test_a_number_stands_for_the_first_epoch():
    dataset = ImageDataset(
        MemoryStore(IMAGES), LABELS, None, augmentation("colour", "pretrain", 12, True), seed=5, views=2
    )
    (a, b), _, _ = dataset[4]
    (c, d), _, _ = dataset[SampleKey(0, 0, 4)]
    assert np.array_equal(a, c)
    assert np.array_equal(b, d)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("part", ["epoch", "pass_"])
def test_augmentation_changes_with_epoch_and_pass(part):
    dataset = ImageDataset(MemoryStore(IMAGES), LABELS, None, augmentation("colour", "pretrain", 12, True))
    key = SampleKey(0, 0, 4)
    assert not np.array_equal(dataset[key][0][0], dataset[key._replace(**{part: 1})][0][0])


def test_a_subset_augments_an_image_as_the_whole_does():
    """The key holds the row of the image, not its position in a subset."""
    augment = augmentation("colour", "pretrain", 12, True)
    whole = ImageDataset(MemoryStore(IMAGES), LABELS, None, augment)
    subset = ImageDataset(MemoryStore(IMAGES), LABELS, np.array([9, 4]), augment)
    assert np.array_equal(whole[4][0][0], subset[1][0][0])


def test_workers_yield_what_the_main_process_yields():
    dataset = ImageDataset(MemoryStore(IMAGES), LABELS, None, augmentation("colour", "pretrain", 12, True), views=2)
    keys = list(TrainBatchSampler(20, 6, seed=0))
    batches = []
    for workers in (0, 2):
        loader = DataLoader(
            dataset,
            batch_sampler=keys,
            collate_fn=BatchBuilder([0.5] * 3, [0.2] * 3),
            num_workers=workers,
        )
        batches.append(list(loader))
    for alone, shared in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone.views, shared.views, strict=True))
        assert torch.equal(alone.index, shared.index)


def test_a_batch_is_typed_and_normalised():
    dataset = ImageDataset(MemoryStore(IMAGES), LABELS, None, CentreView(12, whole=True))
    batch = BatchBuilder([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])([dataset[row] for row in (3, 1)])
    assert batch.images is batch.views[0]
    assert (batch.images.dtype, batch.labels.dtype, batch.index.dtype) == (torch.float32, torch.int64, torch.int64)
    assert batch.images.is_contiguous()
    assert (batch.labels.tolist(), batch.index.tolist()) == ([3, 1], [3, 1])
    for place, row in enumerate((3, 1)):
        for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.6), (0.3, 0.7))):
            expected = (IMAGES[row, ..., channel] / 255 - mean) / std
            assert np.abs(batch.images[place, channel].numpy() - expected).max() < 1e-6


def test_grey_is_spread_over_three_channels():
    grey = IMAGES[..., :1]
    dataset = ImageDataset(MemoryStore(grey), LABELS, None, CentreView(12, whole=True))
    batch = BatchBuilder([0.0] * 3, [1.0] * 3)([dataset[0], dataset[1]])
    assert batch.images.shape == (2, 3, 12, 12)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])


def test_a_batch_moves_between_devices_and_stays_typed():
    from lightning.fabric.utilities import move_data_to_device

    dataset = ImageDataset(MemoryStore(IMAGES), LABELS, None, CentreView(12, whole=True))
    batch = move_data_to_device(BatchBuilder([0.5] * 3, [0.5] * 3)([dataset[0]]), torch.device("meta"))
    assert type(batch).__name__ == "ImageBatch"
    assert batch.images.is_meta
