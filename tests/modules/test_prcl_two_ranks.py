"""PRCL on two gloo ranks: metrics, teacher and global prototypes alike, and the steps of one process."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from callbacks import EMATarget
from modules.prcl import ProbabilisticSegmenter
from tests.distributed import run_ranks
from tests.modules.street_scenes import join
from tests.modules.test_prcl_module import PLAIN_VIEWS, SMALL, both, of_epoch_ends, run_on_shapes
from tests.modules.test_segmenter_two_ranks import TWO_RANKS, evaluation, without_batch_statistics
from tests.modules.toy_images import quiet_trainer

# Images count in full, as the largest of four probabilities is above this.
MEAN_TEACHER = {"method": "mean_teacher", "unsupervised_threshold": 0.2}


def segmenter(**settings):
    torch.manual_seed(0)
    module = ProbabilisticSegmenter(**{**SMALL, **PLAIN_VIEWS, "lr": 0.02, "weak_threshold": 0.0, **settings})
    return without_batch_statistics(module)


def loader(batches):
    return DataLoader(batches, batch_size=None)


def train(module, batches, **options):
    callback = EMATarget("student", "teacher", momentum=0.99, schedule="warmup", log_as=None)
    quiet_trainer(max_epochs=1, callbacks=[callback], **options).fit(module, loader(batches))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def mean_teacher_batches():
    return [both(seed=seed) for seed in range(4)]


def one_class_on_rank_one(rank):
    """Rank 0 sees two classes, rank 1 a single one."""
    batches = [both(seed=seed) for seed in range(2)]
    if rank == 1:
        for batch in batches:
            for part in batch.values():
                part.masks.fill_(2)
    return batches


def contrast_batches():
    """Two batches, the second one with labels of a single class: for two ranks, or joined for one process."""
    batches = [both(seed=seed) for seed in range(2)]
    batches[1]["labeled"].masks.fill_(2)
    return batches


def one_contrast_step(batch, **options):
    """The prototypes of all training so far, and what is logged of representations, after one step."""
    module = segmenter(global_prototypes=True)
    callback = EMATarget("student", "teacher", momentum=0.99, schedule="warmup", log_as=None)
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback], **options)
    trainer.fit(module, loader([batch]))
    names = ("variance/", "precision/", "train/pseudo_", "train/trusted_share")
    logged = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith(names)}
    return dict(module.contrast.memory.state_dict()), logged


def on_a_rank(rank):
    (metrics,) = quiet_trainer(**TWO_RANKS).validate(segmenter(), evaluation(rank, 2), verbose=False)
    steps = train(segmenter(**MEAN_TEACHER), mean_teacher_batches()[rank::2], **TWO_RANKS)
    # Labels come from the masks alone: no unlabelled pixel is trusted.
    lonely = segmenter(global_prototypes=True, weak_threshold=1.0)
    contrast = one_contrast_step(contrast_batches()[rank], **TWO_RANKS)
    return metrics, steps, contrast, train(lonely, one_class_on_rank_one(rank), **TWO_RANKS)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(on_a_rank, 2, timeout=180.0)


def resumed_on_a_rank(rank, folder):
    """What a whole run of two epochs of three steps logs, and what it logs that goes on from its fifth step."""
    whole, resumed = Path(folder) / "whole", Path(folder) / "resumed"
    *_, logged = run_on_shapes(whole, images=12, **TWO_RANKS)
    *_, relogged = run_on_shapes(resumed, whole / "step-4.ckpt", images=12, **TWO_RANKS)
    return of_epoch_ends(logged, 5), of_epoch_ends(relogged)


def test_metrics_of_an_epoch_that_two_ranks_resume_are_those_of_all_of_it(tmp_path):
    """Each rank has seen other pictures before the checkpoint, which rank 0 writes."""
    first, _ = run_ranks(resumed_on_a_rank, 2, str(tmp_path), timeout=180.0)
    logged, relogged = first
    assert {name.partition("/")[0] for name, _ in logged} >= {"train", "variance", "precision", "anchors"}
    assert relogged.keys() == logged.keys()
    for key, value in logged.items():
        assert relogged[key] == pytest.approx(value, rel=1e-5), key


def test_metrics_of_the_same_weights_are_those_of_one_process(ranks):
    (expected,) = quiet_trainer().validate(segmenter(), evaluation(), verbose=False)
    assert {"val/miou_teacher", "val/miou_student", "val/main"} <= expected.keys()
    for metrics, *_ in ranks:
        assert metrics == pytest.approx(expected, abs=1e-6)


def test_two_ranks_equal_one_process_with_two_accumulated_batches(ranks):
    expected = train(segmenter(**MEAN_TEACHER), mean_teacher_batches(), accumulate_grad_batches=2)
    start = segmenter(**MEAN_TEACHER).state_dict()
    moved = {name: (value - start[name]).abs().max().item() for name, value in expected.items()}
    assert max(value for name, value in moved.items() if name.startswith("student.")) > 1e-3
    assert max(value for name, value in moved.items() if name.startswith("teacher.")) > 1e-3
    for _, steps, *_ in ranks:
        for name, value in expected.items():
            assert torch.allclose(value, steps[name], atol=1e-5), name


def test_prototypes_and_metrics_of_two_ranks_are_those_of_one_process_with_all_images(ranks):
    first, second = contrast_batches()
    joined = {name: join([first[name], second[name]]) for name in first}
    memory, logged = one_contrast_step(joined)
    assert {name.partition("/")[0] for name in logged} == {"variance", "precision", "train"}
    for _, _, (found, values), _ in ranks:
        for name, expected in memory.items():
            assert (expected != 1).all(1).any(), "some class was fused"
            torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-5)
        assert values == pytest.approx(logged, rel=1e-5)


def test_ranks_agree_where_one_sees_a_single_class(ranks):
    first, second = (state for *_, state in ranks)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["contrast.memory.precision"][2], torch.ones(SMALL["dimensions"]))
