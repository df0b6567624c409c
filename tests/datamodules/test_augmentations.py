import pickle
import subprocess
import sys
from collections import Counter
from math import comb

import numpy as np
import pytest
from PIL import Image

from datamodules.augmentations import CentreView, augmentation, resize

SUBJECTS = {"digits": (8, 1), "photographs": (32, 3), "colour": (28, 3), "grey": (28, 1)}


def image_of(subject: str, seed: int = 0) -> np.ndarray:
    side, channels = SUBJECTS[subject]
    noise = np.random.RandomState(seed).randint(20, 236, (side, side, channels), dtype=np.uint8)
    return np.ascontiguousarray(noise)


def within_chance(count: int, trials: int, probability: float) -> bool:
    """Whether a count is no rarer than about one in a million."""
    weight = [comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(trials + 1)]
    return min(sum(weight[: count + 1]), sum(weight[count:])) > 1e-6


@pytest.mark.parametrize("strength", ["pretrain", "finetune"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_image_is_a_function_of_its_key(subject, strength):
    augment, other = (augmentation(subject, strength, 24, whole=True) for _ in range(2))
    image = image_of(subject)
    keys = [(0, epoch, 0, row, view) for epoch in range(2) for row in range(3) for view in range(2)]
    forward = [augment(image, key) for key in keys]
    backward = [other(image, key) for key in reversed(keys)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_each_part_of_the_key_matters(subject):
    augment = augmentation(subject, "pretrain", 24, whole=True)
    image = image_of(subject)
    # Digits shift by whole pixels, so that one changed number may by chance give the same image: several images.
    base = np.stack([augment(image, (0, 0, 0, row, 0)) for row in range(0, 50, 10)])
    for position in range(5):
        changed = np.stack(
            [augment(image, tuple(row * (p == 3) + (p == position) for p in range(5))) for row in range(0, 50, 10)]
        )
        assert not np.array_equal(base, changed)


@pytest.mark.parametrize("strength", ["pretrain", "finetune", "none"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_output_has_the_size_asked_for_and_the_input_stays(subject, strength):
    image = image_of(subject)
    before = image.copy()
    for size in (image.shape[0], 40):
        augment = augmentation(subject, strength, size, whole=True)
        for row in range(40):
            result = augment(image, (0, 0, 0, row, 0))
            assert result.shape == (size, size, image.shape[2])
            assert result.dtype == np.uint8
    assert np.array_equal(image, before)


def test_a_pipeline_travels_to_another_process():
    augment = augmentation("colour", "pretrain", 24, whole=True)
    image = image_of("colour")
    expected = augment(image, (1, 2, 3, 4, 5))
    assert np.array_equal(pickle.loads(pickle.dumps(augment))(image, (1, 2, 3, 4, 5)), expected)


def quadrants() -> np.ndarray:
    """A grey picture whose four quarters differ so much that no change of light alters their order."""
    image = np.empty((40, 40, 3), dtype=np.uint8)
    image[:20, :20], image[:20, 20:], image[20:, :20], image[20:, 20:] = 60, 90, 130, 180
    return image


def arrangement(image: np.ndarray) -> tuple[int, ...]:
    """Order of the corners by brightness: top left, top right, bottom left, bottom right."""
    corners = [image[y, x].astype(int).sum() for y, x in ((1, 1), (1, -2), (-2, 1), (-2, -2))]
    return tuple(int(rank) for rank in np.argsort(np.argsort(corners)))


def test_coloured_cells_take_all_eight_orientations_evenly():
    augment = augmentation("colour", "finetune", 40, whole=True)
    found = Counter(arrangement(augment(quadrants(), (0, 0, 0, row, 0))) for row in range(400))
    assert len(found) == 8
    assert all(within_chance(count, 400, 1 / 8) for count in found.values())


def test_photographs_are_flipped_left_to_right_only():
    augment = augmentation("photographs", "finetune", 40, whole=True)
    found = Counter(arrangement(augment(quadrants(), (0, 0, 0, row, 0))) for row in range(200))
    assert set(found) == {(0, 1, 2, 3), (1, 0, 3, 2)}
    assert within_chance(found[0, 1, 2, 3], 200, 0.5)


def test_grey_images_are_never_upside_down():
    augment = augmentation("grey", "finetune", 40, whole=True)
    found = Counter(arrangement(augment(quadrants()[..., :1], (0, 0, 0, row, 0))) for row in range(200))
    assert set(found) == {(0, 1, 2, 3), (1, 0, 3, 2)}


def test_flip_and_crop_are_independent():
    """Transforms that were seeded alike would always flip together with the same crop."""
    augment = augmentation("photographs", "pretrain", 40, whole=True)
    ramp = np.broadcast_to(np.linspace(10, 240, 40).astype(np.uint8)[:, None, None], (40, 40, 3)).copy()
    ramp[:, :20, 0] = 0
    flipped_high = Counter()
    for row in range(300):
        result = augment(ramp, (0, 0, 0, row, 0)).astype(int)
        flipped = result[..., 0].mean(0)[:5].mean() > result[..., 0].mean(0)[-5:].mean()
        flipped_high[bool(flipped), bool(result[..., 1].mean() > 125)] += 1
    assert all(flipped_high[a, b] > 30 for a in (True, False) for b in (True, False)), flipped_high


@pytest.mark.parametrize("strength", ["pretrain", "finetune"])
def test_digits_are_shifted_and_scaled_only(strength):
    """On a ramp from left to right, every row stays the same rising ramp: no flip, no turn, no change of light."""
    ramp = np.broadcast_to(np.arange(60, 220, 20, dtype=np.uint8)[None, :, None], (8, 8, 1)).copy()
    augment = augmentation("digits", strength, 8, whole=True)
    results = [augment(ramp, (0, 0, 0, row, 0)).astype(int)[..., 0] for row in range(200)]
    for result in results:
        inner = result[2:-2, 2:-2]
        assert (inner == inner[0]).all()
        assert (np.diff(inner[0]) > 0).all()
        assert result.max() <= 200
    assert len({result.tobytes() for result in results}) > 20


def test_digits_move_in_both_directions_independently():
    dot = np.zeros((8, 8, 1), dtype=np.uint8)
    dot[3:5, 3:5] = 255
    augment = augmentation("digits", "pretrain", 8, whole=True)
    moves = set()
    for row in range(300):
        result = augment(dot, (0, 0, 0, row, 0)).astype(float)[..., 0]
        y, x = (np.average(np.arange(8), weights=result.sum(axis)) - 3.5 for axis in (1, 0))
        moves.add((round(y), round(x)))
    assert {(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)} <= moves


def test_colour_is_kept_in_medical_images_and_sometimes_lost_in_photographs():
    image = np.empty((32, 32, 3), dtype=np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 200, 90, 150
    lost = {}
    for subject in ("colour", "photographs"):
        augment = augmentation(subject, "pretrain", 32, whole=True)
        results = [augment(image, (0, 0, 0, row, 0)) for row in range(200)]
        lost[subject] = sum(bool((np.ptp(result, axis=2) == 0).all()) for result in results)
    assert lost["colour"] == 0
    assert within_chance(lost["photographs"], 200, 0.2)


def test_pretraining_crops_more_than_fine_tuning():
    """The share of a picture that stays visible, read off a horizontal and a vertical ramp."""
    side = 100
    ramp = np.zeros((side, side, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100)[None, :], np.arange(100)[:, None]
    smallest = {}
    for strength in ("pretrain", "finetune"):
        crop = augmentation("photographs", strength, side, whole=True).build()[0]
        results = [crop(image=ramp)["image"].astype(int) for _ in range(300)]
        areas = [np.ptp(result[..., 0]) * np.ptp(result[..., 1]) / 99**2 for result in results]
        smallest[strength] = min(areas)
    assert 0.37 < smallest["pretrain"] < 0.6
    assert 0.66 < smallest["finetune"] < 0.85


def test_evaluation_cuts_the_centre_of_a_file():
    image = np.arange(9 * 12 * 3, dtype=np.uint8).reshape(9, 12, 3)
    assert np.array_equal(CentreView(6, whole=False)(image), image[1:7, 3:9])


def test_evaluation_keeps_a_finished_image_as_it_is():
    image = image_of("colour")
    assert np.array_equal(CentreView(28, whole=True)(image), image)


def test_shrinking_averages_over_areas():
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 1), dtype=np.uint8)
    expected = image.reshape(8, 4, 8, 4).mean(axis=(1, 3))
    assert np.abs(resize(image, 8)[..., 0] - expected).max() <= 0.5 + 1e-9


def test_enlarging_agrees_with_pillow():
    smooth = np.asarray(Image.fromarray(image_of("grey")[:4, :4, 0]).resize((28, 28), Image.Resampling.BICUBIC))
    enlarged = resize(smooth[..., None], 56)[..., 0]
    reference = np.asarray(Image.fromarray(smooth).resize((56, 56), Image.Resampling.BICUBIC))
    assert np.abs(enlarged.astype(int) - reference).mean() < 1.5


@pytest.mark.slow
def test_loading_processes_start_while_wandb_watches_imports(tmp_path):
    """Its hooks on first imports, such as that of albumentations, refuse to run in a forked process."""
    code = (
        "import wandb; run = wandb.init(mode='offline')\n"
        "from datamodules import SemanticSegmentation\n"
        "loader = SemanticSegmentation(num_workers=1, batch_size=2).train_dataloader()\n"
        "print(next(iter(loader)).images.shape)\n"
        "run.finish()\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "torch.Size([2, 3, 64, 64])" in result.stdout, result.stderr
