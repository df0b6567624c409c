import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.image_files import (
    UnreadableImageError,
    is_grey_file,
    list_images,
    locate,
    read_image,
    same_content,
)
from tests.data_layouts import save_image


def test_hidden_files_hidden_folders_and_other_files_are_skipped(class_folders):
    found = list_images(class_folders)
    assert len(found) == 36
    assert found == sorted(found)
    assert not any("/." in path.relative_to(class_folders).as_posix() for path in found)


def test_suffixes_in_capitals_count(tmp_path):
    for name in ("a.JPEG", "b.Png", "c.TIF", "d.bmp", "e.txt", "f.npz"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPEG", "b.Png", "c.TIF", "d.bmp"]


def test_the_shorter_side_gets_the_length_asked_for(tmp_path):
    path = save_image(tmp_path / "a.png", seed=0, size=(90, 60))
    assert read_image(path, 3, 20).shape == (20, 30, 3)
    assert read_image(path, 3, 120).shape == (120, 180, 3)


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 3, 24), pixels)


def test_a_large_jpeg_decoded_at_reduced_scale_looks_the_same(tmp_path):
    path = save_image(tmp_path / "a.jpg", seed=1, size=(400, 320))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB").resize((50, 40), Image.Resampling.BICUBIC)).astype(int)
    found = read_image(path, 3, 40).astype(int)
    assert found.shape == (40, 50, 3)
    assert np.abs(found - expected).mean() < 1.0


def test_grey_becomes_colour_and_colour_grey(tmp_path):
    grey = np.random.RandomState(0).randint(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png", 3, 16), np.stack([grey] * 3, axis=-1))
    colour = np.zeros((16, 16, 3), dtype=np.uint8)
    colour[..., 1] = 100
    Image.fromarray(colour).save(tmp_path / "colour.png")
    assert np.abs(read_image(tmp_path / "colour.png", 1, 16).astype(float) - 58.7).max() < 1
    assert (is_grey_file(tmp_path / "grey.png"), is_grey_file(tmp_path / "colour.png")) == (True, False)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_of_pillow_becomes_rgb(tmp_path, mode):
    source = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    source.save(path)
    assert np.array_equal(read_image(path, 3, 16), np.asarray(source.convert("RGB")))


def test_sixteen_bits_are_stretched_over_their_own_range(tmp_path):
    """A 12-bit radiograph in a 16-bit file would be almost black, and cut off at 255 by a plain conversion."""
    pixels = np.linspace(100, 4000, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.rint((pixels - 100.0) * 255 / 3900)
    assert np.array_equal(read_image(tmp_path / "a.png", 1, 16)[..., 0], expected)


def test_black_borders_are_cut_away(tmp_path):
    picture = np.full((40, 60, 3), 7, dtype=np.uint8)
    picture[5:35, 10:50] = 8
    picture[10:20, 15:45] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 3, 30, crop_border=True), picture[5:35, 10:50])


def test_a_black_image_is_not_cut_to_nothing(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 3, 8, crop_border=True).shape == (8, 8, 3)


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    path = truncate(save_image(tmp_path / f"a.{suffix}", seed=0, size=(64, 64)))
    with pytest.raises(UnreadableImageError, match=rf"a\.{suffix}: cannot be decoded \(.+\); .*--data\.on_error skip"):
        read_image(path, 3, 16)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(UnreadableImageError, match=r"a\.jpg: cannot be decoded"):
        read_image(tmp_path / "a.jpg", 3, 16)
    assert not is_grey_file(tmp_path / "a.jpg")


def test_missing_images_are_counted_and_three_are_named(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.jpg", seed=0)
    with pytest.raises(FileNotFoundError) as caught:
        locate(tmp_path, ["a", "v", "w", "b", "x", "y"], "labels.csv")
    message = str(caught.value)
    assert message.startswith("labels.csv: 4 of 6 images are missing on disk: ")
    assert all(f"{tmp_path}/{name}.*" in message for name in "vwx")
    assert f"{tmp_path}/y.*" not in message
    assert f"searched {tmp_path}" in message


def test_a_missing_image_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_images does not exist; train\.csv lists 2 images"):
        locate(tmp_path / "train_images", ["a", "b"], "train.csv")


def test_images_are_found_whatever_their_suffix(tmp_path):
    save_image(tmp_path / "a.jpg", seed=0)
    save_image(tmp_path / "b.png", seed=1)
    assert locate(tmp_path, ["b", "a"], "t.csv") == [tmp_path / "b.png", tmp_path / "a.jpg"]


def test_identical_files_are_found_by_content(tmp_path):
    for name, content in {
        "a": b"same",
        "b": b"other",
        "c": b"same",
        "d": b"differs",
        "e": b"some",
        "f": b"",
        "g": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    found = same_content([tmp_path / name for name in "abcdefg"])
    assert list(found.values()) == [[0, 2]]


def test_files_that_only_begin_alike_are_not_identical(tmp_path):
    head = bytes(range(256)) * 20  # longer than what is compared first
    for name, content in {"a": head + b"1", "b": head + b"2", "c": head + b"1", "d": head + b"11"}.items():
        (tmp_path / name).write_bytes(content)
    assert list(same_content([tmp_path / name for name in "abcd"]).values()) == [[0, 2]]


def test_decoding_says_nothing(tmp_path):
    image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).convert("P")
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "a.png", 3, 8)
