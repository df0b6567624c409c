"""Evaluation at several scales and at the size of the masks, against loops and torchmetrics."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torchmetrics.classification import MulticlassJaccardIndex

from modules.segmentation.evaluation import EvaluationScores, logits_at_mask_size, multi_scale_logits

CLASSES, VOID = 4, 255


def segmenter(images):
    """Sees edges at the left differently from those at the right, and scale by a neighbourhood of fixed size."""
    weight = torch.randn(CLASSES, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return functional.conv2d(images, weight, padding=1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(0.5, 1.0, 1.25), (1.0,), (0.75,)])
def test_probabilities_are_averaged_over_scales_and_mirror_images(scales, flip):
    images = torch.randn(2, 3, 12, 17, generator=torch.Generator().manual_seed(1))
    found = multi_scale_logits(segmenter, images, scales, flip)
    if scales == (1.0,) and not flip:
        assert torch.equal(found, segmenter(images))
    probabilities = []
    for scale in scales:
        size = (round(12 * scale), round(17 * scale))
        scaled = functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        for mirrored in [False, True][: 1 + flip]:
            logits = segmenter(scaled.flip(3)).flip(3) if mirrored else segmenter(scaled)
            logits = functional.interpolate(logits.double(), size=(12, 17), mode="bilinear", align_corners=False)
            probabilities.append(logits.softmax(1))
    expected = sum(probabilities) / len(probabilities)
    torch.testing.assert_close(found.double().softmax(1), expected, atol=1e-5, rtol=1e-4)


def test_a_probability_that_underflows_has_a_finite_logit():
    sure = torch.tensor([300.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    logits = multi_scale_logits(lambda images: sure, torch.zeros(1, 3, 4, 4), (0.5, 1.0))
    assert logits.isfinite().all()
    assert (logits.argmax(1) == 0).all()
    assert functional.cross_entropy(logits, torch.ones(1, 4, 4, dtype=torch.int64)).isfinite()


def test_scores_add_up_over_batches_and_start_anew():
    scores = EvaluationScores(CLASSES)
    reference = MulticlassJaccardIndex(CLASSES, ignore_index=VOID, average="macro")
    losses = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, CLASSES, 6, 7, generator=generator)
        masks = torch.randint(CLASSES - 1, (2, 6, 7), generator=generator)
        masks[:, seed] = VOID
        masks[1] = VOID if seed == 2 else masks[1]
        assert torch.equal(scores.update(logits, masks), logits.argmax(1))
        reference.update(logits.argmax(1), masks)
        losses += [
            functional.cross_entropy(logits[row : row + 1], masks[row : row + 1], ignore_index=VOID).item()
            for row in range(2 if seed < 2 else 1)
        ]
    assert scores.confusion().sum() == 5 * 5 * 7
    result = scores.result()
    assert result["miou"].item() == pytest.approx(reference.compute().item())
    assert result["loss"].item() == pytest.approx(sum(losses) / 5)
    scores.update(torch.randn(1, CLASSES, 2, 2), torch.full((1, 2, 2), VOID))
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert scores.result() == {}


def test_logits_have_the_size_of_the_masks():
    images = torch.randn(2, 3, 8, 8)
    together = SimpleNamespace(images=images, masks=torch.zeros(2, 12, 10, dtype=torch.int64))
    ((logits, masks),) = logits_at_mask_size(segmenter, together)
    expected = functional.interpolate(segmenter(images), size=(12, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected)
    apart = SimpleNamespace(images=[images[0], images[1, :, :6]], masks=[masks[0], masks[1, :5]])
    pairs = list(logits_at_mask_size(segmenter, apart))
    assert [tuple(logits.shape) for logits, _ in pairs] == [(1, CLASSES, 12, 10), (1, CLASSES, 5, 10)]
    torch.testing.assert_close(pairs[0][0], expected[:1])
