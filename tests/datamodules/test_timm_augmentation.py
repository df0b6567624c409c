import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from datamodules.augmentations import Recipe, augmentation
from datamodules.image_dataset import BatchBuilder, ImageDataset, MemoryStore
from datamodules.readers.samples import IMAGENET_MEAN, IMAGENET_STD
from datamodules.timm_augmentation import TimmAugmentation, seeded

RECIPE = "rand-m9-mstd0.5-inc1"


def picture(height=40, width=56, channels=3, seed=0):
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 7, channels), dtype=np.uint8)
    image = Image.fromarray(coarse if channels == 3 else coarse[..., 0]).resize((width, height), Image.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


def imagenet(size=32, policy=RECIPE, re_prob=0.0, **options):
    return TimmAugmentation(size, policy, re_prob, IMAGENET_MEAN, IMAGENET_STD, **options)


def test_it_is_timms_transform_with_the_recipe_of_imagenet():
    transform = create_transform(32, is_training=True, auto_augment=RECIPE, interpolation="random", re_prob=0.0)
    ours, mean, std = imagenet(), *(torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for row in range(30):
        key = (0, 1, 0, row, 0)
        with seeded(key):
            expected = transform(Image.fromarray(picture(seed=row)))
        values = torch.from_numpy(ours(picture(seed=row), key).copy()).permute(2, 0, 1) / 255
        assert torch.allclose((values - mean) / std, expected, atol=1e-5)


def test_its_parts_are_those_of_the_recipe():
    crop, flip = imagenet(224)._steps[0].transforms
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert [str(mode) for mode in crop.interpolation] == ["InterpolationMode.BILINEAR", "InterpolationMode.BICUBIC"]
    assert flip.p == 0.5
    (operations,) = imagenet(224)._steps[1].transforms  # no colour jitter beside RandAugment
    assert operations.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in operations.ops} == {(9, 0.5, 0.5)}
    assert any(op.name == "PosterizeIncreasing" for op in operations.ops)


@pytest.mark.parametrize("re_prob", [0.0, 1.0])
def test_an_image_is_a_function_of_its_key(re_prob):
    augment, again = imagenet(re_prob=re_prob), pickle.loads(pickle.dumps(imagenet(re_prob=re_prob)))
    keys = [(0, epoch, 0, row, view) for epoch in range(2) for row in range(3) for view in range(2)]
    forward = [augment(picture(), key) for key in keys]
    backward = [again(picture(), key) for key in reversed(keys)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert len({result.tobytes() for result in forward}) == len(keys)
    assert {(result.shape, result.dtype.name) for result in forward} == {((32, 32, 3), "uint8")}


def test_the_global_generators_are_put_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    imagenet(re_prob=1.0)(picture(), (0, 0, 0, 0, 0))
    assert draw() == expected


@pytest.mark.parametrize("strength", ["randaugment", "padded_crop"])
def test_workers_yield_what_the_main_process_yields(strength):
    store = MemoryStore([picture(32, 32, seed=seed) for seed in range(6)])
    augment = augmentation("photographs", strength, 32, whole=True)
    dataset = ImageDataset(store, np.zeros(6, np.int64), None, augment, seed=1)
    batches = [
        torch.cat(
            [batch.images for batch in DataLoader(dataset, 3, num_workers=n, collate_fn=BatchBuilder([0.5], [0.5]))]
        )
        for n in (0, 2)
    ]
    assert torch.equal(*batches)


def test_erased_rectangles_have_the_mean_colour():
    plain, erased = imagenet(), imagenet(re_prob=1.0)
    mean = np.rint(255 * np.array(IMAGENET_MEAN)).astype(np.uint8)
    for row in range(10):
        key = (0, 0, 0, row, 0)
        before, after = plain(picture(), key), erased(picture(), key)
        changed = (before != after).any(2)
        assert 0.01 < changed.mean() < 0.4  # the area is drawn from 2 to a third
        assert (after[changed] == mean).all()


def test_grey_images_stay_grey_and_small():
    results = [imagenet()(picture(channels=1), (0, 0, 0, row, 0)) for row in range(20)]
    assert {result.shape for result in results} == {(32, 32, 1)}
    means = TimmAugmentation(32, RECIPE, 1.0, [0.5], [0.25])(picture(channels=1), (0, 0, 0, 0, 0))
    assert (means == 128).mean() > 0.01


@pytest.mark.parametrize("policy", ["rand-m9-x3", "autoaugment"])
def test_an_unknown_policy_is_named(policy):
    with pytest.raises(
        ValueError, match=f"auto_augment is '{policy}', which timm does not know .* rand-m9-mstd0.5-inc1"
    ):
        imagenet(policy=policy)


def test_digits_are_not_flipped():
    for strength in ("randaugment", "padded_crop"):
        recipe = Recipe(auto_augment="rand-m9-n0", crop_padding=0)
        photograph, digit = (augmentation(kind, strength, 16, True, recipe) for kind in ("photographs", "digits"))
        ramp = np.broadcast_to(np.arange(0, 240, 15, dtype=np.uint8)[None, :, None], (16, 16, 3)).copy()
        falling = {
            name: sum(
                int(view[0, 0, 0]) > view[0, -1, 0] for view in (augment(ramp, (0, 0, 0, row, 0)) for row in range(60))
            )
            for name, augment in (("photograph", photograph), ("digit", digit))
        }
        assert falling["digit"] == 0
        assert 12 < falling["photograph"] < 48


def test_a_padded_crop_is_a_window_of_the_reflected_image():
    """By NumPy's reflection: every result is one of the 13 x 13 windows, flipped or not, and all shifts occur."""
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    padded = np.pad(image, ((6, 6), (6, 6), (0, 0)), mode="reflect")
    windows = {
        view.tobytes(): (top, left, flipped)
        for top in range(13)
        for left in range(13)
        for flipped, view in enumerate(
            (padded[top : top + 64, left : left + 64], padded[top : top + 64, left : left + 64][:, ::-1])
        )
    }
    augment = augmentation("photographs", "padded_crop", 64, whole=True)
    found = [windows[augment(image, (0, 0, 0, row, 0)).tobytes()] for row in range(600)]
    tops, lefts, flips = (Counter(item[k] for item in found) for k in range(3))
    assert set(tops) == set(lefts) == set(range(13))
    assert max(*tops.values(), *lefts.values()) < 85  # 46 expected
    assert 230 < flips[0] < 370


def test_the_padding_is_a_tenth_of_the_side_or_what_is_asked_for():
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    sides = {"default": Recipe(), "asked": Recipe(crop_padding=5), "none": Recipe(crop_padding=0)}
    pads = {}
    for name, recipe in sides.items():
        augment = augmentation("photographs", "padded_crop", 32, True, recipe)
        pads[name] = augment.shift.build()[0].padding
    assert pads == {"default": 3, "asked": 5, "none": 0}
    plain = augmentation("digits", "padded_crop", 32, True, sides["none"])
    assert np.array_equal(plain(image, (0, 0, 0, 0, 0)), image)
