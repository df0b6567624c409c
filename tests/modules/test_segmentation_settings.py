"""Settings that all segmenters share, and what a schedule says of a run without end."""

import math
from types import SimpleNamespace

import pytest
import torch

from modules.optimization import total_steps_of, with_schedule
from modules.prcl import ProbabilisticSegmenter
from modules.segmentation import DenseSegmenter
from tests.modules.street_scenes import TINY_BACKBONE

SEGMENTERS = [ProbabilisticSegmenter, DenseSegmenter]


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@pytest.mark.parametrize("stride", [7, 0, 64])
def test_an_output_stride_that_no_backbone_has(segmenter, stride):
    with pytest.raises(ValueError, match=f"^output_stride: {stride} is none of 8, 16 and 32$"):
        segmenter(TINY_BACKBONE if segmenter is DenseSegmenter else "prcl", output_stride=stride)


@pytest.mark.parametrize("schedule", ["cosine", "poly", "timm_cosine"])
def test_a_run_without_end_is_told_of_the_schedule_in_use(schedule):
    trainer = SimpleNamespace(estimated_stepping_batches=math.inf)
    message = f"^schedule: {schedule} needs an end of training; set trainer.max_epochs or trainer.max_steps$"
    with pytest.raises(ValueError, match=message):
        total_steps_of(trainer, schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=message):
        with_schedule(SimpleNamespace(trainer=trainer), optimizer, schedule, None)
