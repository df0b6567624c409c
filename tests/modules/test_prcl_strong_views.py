"""Strong views: what happens to an image happens to its labels and confidence, and the draws have their statistics."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from modules.prcl.strong_views import (
    PseudoLabelled,
    StrongViews,
    class_masks,
    rectangles,
    reflect_pad,
    rescale_pad_crop,
)

VOID = 255
PLAIN = {"scale_range": (1.0, 1.0), "mix": "none", "photometric": False, "flip": False}


def coordinates(height=24, width=30):
    """An image whose channels are row, column and a constant; the label is the row, the confidence the column."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([row, column, torch.ones_like(row)]).float()
    return image, row.clone(), (column + 1) / width


def views(batch=3, height=12, width=16, seed=0, classes=5):
    """Images, labels and confidence of which each knows which image it is from."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    labels[:, :2] = VOID
    own = torch.arange(batch).view(-1, 1, 1).expand_as(labels)
    confidence = (0.5 + 0.1 * own).masked_fill(labels == VOID, 0.0)
    images = torch.stack([own, labels, torch.rand(labels.shape, generator=generator)], 1).float()
    return PseudoLabelled(images, labels, confidence)


@pytest.mark.parametrize("scale", [(0.4, 0.9), (1.0, 1.0), (1.1, 2.0)])
def test_image_label_and_confidence_stay_together(scale):
    """Where a label comes from row r, the image was sampled within half a pixel of row r; columns likewise."""
    image, label, confidence = coordinates()
    height, width = label.shape
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        moved, rows, sure = rescale_pad_crop(image, label, confidence, scale)
        assert moved.shape == image.shape
        assert rows.dtype == torch.int64
        inside = rows != VOID
        assert torch.equal(inside, sure > 0)
        columns = (sure * width - 1).round()
        # Bilinear interpolation of a ramp is exact but for the edges, where it stands still.
        assert ((moved[0] - rows).abs()[inside] <= 0.5 + 1e-4).all()
        assert ((moved[1] - columns).abs()[inside] <= 0.5 + 1e-4).all()
        torch.testing.assert_close(moved[2], torch.ones(height, width), atol=1e-5, rtol=0)
        seen.add((rows[0, 0].item(), int(columns[0, 0])))
    if scale[0] < 1:
        assert seen <= {(0, 0), (1, 1)}
    elif scale[1] > 1:
        assert len(seen) > 20


def test_a_smaller_image_is_padded_with_its_reflection_void_and_zero():
    image, label, confidence = coordinates(20, 20)
    moved, rows, sure = rescale_pad_crop(image, label, confidence, (0.6, 0.6))
    small = functional.interpolate(image[None], size=(12, 12), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(moved, torch.tensor(np.pad(small, ((0, 0), (0, 8), (0, 8)), mode="reflect")))
    assert (rows[:12, :12] != VOID).all()
    assert (rows[12:] == VOID).all()
    assert (rows[:, 12:] == VOID).all()
    assert sure[12:].max() == sure[:, 12:].max() == 0


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 4)])
@pytest.mark.parametrize("size", [(5, 4), (9, 17), (30, 30)])
def test_reflection_is_repeated(shape, size):
    image = torch.rand(2, *shape)
    pad = ((0, 0), (0, size[0] - shape[0]), (0, size[1] - shape[1]))
    assert np.array_equal(reflect_pad(image, size).numpy(), np.pad(image.numpy(), pad, mode="reflect"))


def test_an_image_far_smaller_than_the_crop():
    moved, rows, _ = rescale_pad_crop(*coordinates(16, 16), (0.1, 0.1))
    assert moved.isfinite().all()
    assert (rows != VOID).sum() == 4


def test_the_factor_is_uniform_and_crops_are_anywhere():
    image, label, confidence = coordinates(40, 40)
    sides = []
    for seed in range(200):
        torch.manual_seed(seed)
        _, rows, _ = rescale_pad_crop(image, label, confidence, (0.5, 1.0))
        sides.append((rows[:, 0] != VOID).sum().item() / 40)
    assert np.mean(sides) == pytest.approx(0.75, abs=4 * 0.5 / math.sqrt(12 * 200))
    assert np.std(sides) == pytest.approx(0.5 / math.sqrt(12), rel=0.15)
    tops = []
    for seed in range(200):
        torch.manual_seed(seed)
        _, rows, _ = rescale_pad_crop(image, label, confidence, (2.0, 2.0))
        tops.append(rows[0, 0].item())
    assert (min(tops), max(tops)) == (0, 20)
    assert np.mean(tops) == pytest.approx(10, abs=4 * 20 / math.sqrt(12 * 200))


def test_classmix_keeps_half_of_the_classes_and_takes_the_rest_from_the_next_image():
    torch.manual_seed(0)
    before = views()
    after = StrongViews(**PLAIN | {"mix": "classmix"})(before)
    for image in range(3):
        following = (image + 1) % 3
        own = after.images[image, 0] == image
        assert torch.equal(own, after.images[image, 0] != following)
        for found, parts in zip(after, before, strict=True):
            expected = torch.where(own, parts[image], parts[following])
            assert torch.equal(found[image], expected)
        classes = before.labels[image].unique().tolist()
        kept = [label for label in classes if own[before.labels[image] == label].all()]
        gone = [label for label in classes if not own[before.labels[image] == label].any()]
        assert sorted(kept + gone) == classes == [0, 1, 2, 3, 4, VOID]
        assert len(kept) == len(classes) // 2 == 3


@pytest.mark.parametrize(("labels", "kept"), [([7], 0), ([0, 9], 1), ([0, 1, 255], 1), ([3, 4, 5, 6, 255], 2)])
def test_half_of_the_classes_is_rounded_down(labels, kept):
    picture = torch.tensor(labels).repeat(4).view(1, 4, -1)
    mask = class_masks(picture)
    assert len(picture[mask].unique()) == kept
    assert mask.sum() == kept * 4


def test_every_set_of_classes_is_kept_equally_often():
    picture = torch.tensor([0, 1, 4, 255]).view(1, 1, 4).expand(3000, 1, 4)
    torch.manual_seed(0)
    drawn = class_masks(picture)[:, 0].int().tolist()
    counts = [drawn.count([int(place in pair) for place in range(4)]) for pair in itertools.combinations(range(4), 2)]
    assert sum(counts) == 3000
    deviation = math.sqrt(3000 * 1 / 6 * 5 / 6)
    assert max(abs(count - 500) for count in counts) < 4 * deviation


def test_cutmix_takes_a_rectangle_of_half_of_the_area_from_the_next_image():
    torch.manual_seed(0)
    before = views(height=20, width=30)
    after = StrongViews(**PLAIN | {"mix": "cutmix"})(before)
    for image in range(3):
        following = (image + 1) % 3
        pasted = after.images[image, 0] == following
        rows, columns = pasted.any(1).nonzero()[:, 0], pasted.any(0).nonzero()[:, 0]
        high, wide = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert pasted.sum() == high * wide
        assert abs(pasted.sum().item() - 300) <= wide / 2
        for found, parts in zip(after, before, strict=True):
            assert torch.equal(found[image], torch.where(pasted, parts[following], parts[image]))


@pytest.mark.parametrize("size", [(20, 30), (321, 321), (7, 5)])
def test_rectangles(size):
    height, width = size
    torch.manual_seed(0)
    inside = rectangles(400, size)
    wide, high = inside.any(1).sum(1), inside.any(2).sum(1)
    area = inside.flatten(1).sum(1)
    assert torch.equal(area, wide * high)
    assert ((area - height * width / 2).abs() <= wide / 2).all()
    assert (wide >= width / 2).all()
    assert (wide <= width).all()
    if min(size) >= 20:
        assert wide.double().mean().item() == pytest.approx(0.75 * width, abs=0.5 + 4 * 0.5 * width / math.sqrt(4800))
        left = inside.any(1).int().argmax(1)
        share = left.double() / (width - wide).clamp(min=1)
        assert share.mean().item() == pytest.approx(0.5, abs=0.08)
        assert area.double().mean().item() == pytest.approx(height * width / 2, rel=0.01)


def test_cutout_is_void_without_confidence():
    torch.manual_seed(0)
    before = views(height=20, width=30)
    before = PseudoLabelled(before.images + 1, before.labels, before.confidence)
    after = StrongViews(**PLAIN | {"mix": "cutout"})(before)
    gone = (after.images == 0).all(1)
    assert (gone.flatten(1).sum(1) - 300).abs().max() <= 15
    assert (after.labels[gone] == VOID).all()
    assert (after.confidence[gone] == 0).all()
    assert torch.equal(after.images[:, 0][~gone], before.images[:, 0][~gone])
    assert torch.equal(after.labels[~gone], before.labels[~gone])
    assert torch.equal(after.confidence[~gone], before.confidence[~gone])


def test_half_of_the_images_are_mirrored_with_all_their_parts():
    torch.manual_seed(0)
    before = views(batch=200, height=3, width=4)
    after = StrongViews(**PLAIN | {"flip": True})(before)
    mirrored = 0
    for image in range(200):
        flipped = torch.equal(after.images[image], before.images[image].flip(-1))
        mirrored += flipped
        for found, parts in zip(after, before, strict=True):
            assert torch.equal(found[image], parts[image].flip(-1) if flipped else parts[image])
    assert abs(mirrored - 100) < 4 * math.sqrt(200) / 2


def test_colours_change_the_image_alone():
    torch.manual_seed(0)
    before = views(batch=20)
    images = torch.rand(20, 3, 12, 16)
    after = StrongViews(**PLAIN | {"photometric": True})(PseudoLabelled(images, before.labels, before.confidence))
    assert torch.equal(after.labels, before.labels)
    assert torch.equal(after.confidence, before.confidence)
    changed = [(after.images[image] - images[image]).abs().max().item() > 1e-6 for image in range(20)]
    assert any(changed)
    assert not all(changed)


def test_shares_of_colour_and_blur():
    """A pure grey changes by colours (brightness) only; no colour and no blur leave one image of ten as it is."""
    torch.manual_seed(0)
    count = 120
    strong = StrongViews(**PLAIN | {"photometric": True})
    grey = torch.full((count, 3, 10, 10), 0.5)
    labels, confidence = torch.zeros(count, 10, 10, dtype=torch.int64), torch.ones(count, 10, 10)
    levels = strong(PseudoLabelled(grey, labels, confidence)).images[:, 0, 5, 5] / 0.5
    jittered = (levels - 1).abs() > 1e-4
    assert jittered.sum().item() == pytest.approx(0.8 * count, abs=4 * math.sqrt(0.16 * count))
    assert levels.min() > 0.74
    assert levels.max() < 1.26
    assert levels.max() - levels.min() > 0.45
    noise = torch.rand(count, 3, 10, 10)
    moved = strong(PseudoLabelled(noise, labels, confidence)).images
    same = ((moved - noise).abs().flatten(1).max(1).values < 1e-6).sum().item()
    assert same == pytest.approx(0.1 * count, abs=4 * math.sqrt(0.09 * count))


def test_colours_act_on_values_before_the_normalisation():
    """The same draws on plain and on normalised images give the same pictures."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.rand(4, 3, 12, 16)
    labels, confidence = torch.zeros(4, 12, 16, dtype=torch.int64), torch.ones(4, 12, 16)
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    torch.manual_seed(0)
    plain = StrongViews(**PLAIN | {"photometric": True})(PseudoLabelled(images, labels, confidence))
    torch.manual_seed(0)
    strong = StrongViews(**PLAIN | {"photometric": True}, mean=mean, std=std)
    normalised = strong(PseudoLabelled((images - shift) / scale, labels, confidence))
    torch.testing.assert_close(normalised.images * scale + shift, plain.images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mix", ["classmix", "cutmix", "cutout", "none"])
def test_the_same_seed_gives_the_same_views(mix):
    before = views(height=33, width=33)
    strong = StrongViews(mix=mix)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(strong(before))
    first, second, other = results
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    assert not torch.equal(first.images, other.images)
    assert [part.shape for part in first] == [part.shape for part in before]
    assert first.labels.dtype == torch.int64
    assert set(first.labels.unique().tolist()) <= {*range(5), VOID}
    assert (first.confidence[first.labels == VOID] == 0).all()


def test_a_batch_of_one_cannot_be_mixed():
    single = PseudoLabelled(*(part[:1] for part in views()))
    for mix in ("classmix", "cutmix"):
        with pytest.raises(ValueError, match=f"mix: {mix} needs a second image"):
            StrongViews(mix=mix)(single)
    for mix in ("cutout", "none"):
        assert StrongViews(mix=mix)(single).images.shape == single.images.shape


def test_values_out_of_range():
    for scale in ((0.0, 1.0), (1.5, 0.5), (1.0,), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="two factors above 0"):
            StrongViews(scale_range=scale)
    with pytest.raises(ValueError, match="expected classmix, cutmix, cutout, none"):
        StrongViews(mix="mixup")
    with pytest.raises(ValueError, match="3 and 3 values, but the images have 1 channels"):
        StrongViews()(PseudoLabelled(torch.zeros(2, 1, 12, 12), *views(2, 12, 12)[1:]))
