"""Two gloo ranks against one process: the metrics of a checkpoint, and the parameters after plain steps."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from datamodules.sampling import EvaluationBatchSampler
from modules.segmentation import DenseSegmenter
from tests.distributed import run_ranks
from tests.modules.street_scenes import CLASSES, TINY_BACKBONE, Scenes, join
from tests.modules.toy_images import quiet_trainer

TWO_RANKS = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
SETTINGS = {
    "backbone": TINY_BACKBONE,
    "num_classes": CLASSES,
    "head": "pspnet",
    "dropout": 0.0,
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "lr": 0.02,
    "schedule": "constant",
}


def segmenter():
    torch.manual_seed(0)
    return DenseSegmenter(**SETTINGS)


def evaluation(rank=0, world_size=1):
    sampler = EvaluationBatchSampler(5, 1, rank=rank, world_size=world_size)
    return DataLoader(Scenes(5, mask_side=80), batch_sampler=sampler, collate_fn=join)


def evaluate_on_a_rank(rank):
    (metrics,) = quiet_trainer(**TWO_RANKS).validate(segmenter(), evaluation(rank, 2), verbose=False)
    return metrics


def test_metrics_of_the_same_weights_are_those_of_one_process():
    (expected,) = quiet_trainer().validate(segmenter(), evaluation(), verbose=False)
    assert {"val/miou", "val/aacc", "val/macc", "val/loss", "val/main"} == expected.keys()
    for metrics in run_ranks(evaluate_on_a_rank, 2):
        assert metrics == pytest.approx(expected, abs=1e-6)


def without_batch_statistics(module):
    """Norms use their running statistics, as batches are halved; all else is trained."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.train = lambda mode=True, part=part: part
            part.training = False
    return module


def train(module, batches, **options):
    loader = DataLoader(batches, batch_size=None)
    quiet_trainer(max_epochs=1, **options).fit(without_batch_statistics(module), loader)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def batches(count=4):
    """Each batch has as many labelled pixels as any other, so that the mean over two is that over both."""
    scenes = Scenes(2 * count)
    return [join([scenes[row], scenes[row + count]]) for row in range(count)]


def train_on_a_rank(rank):
    return train(segmenter(), batches()[rank::2], **TWO_RANKS)


def test_two_ranks_equal_one_process_with_two_accumulated_batches():
    start = {name: parameter.detach().clone() for name, parameter in segmenter().named_parameters()}
    expected = train(segmenter(), batches(), accumulate_grad_batches=2)
    moved = max((expected[name] - start[name]).abs().max().item() for name in expected)
    assert moved > 1e-3
    for parameters in run_ranks(train_on_a_rank, 2):
        for name, parameter in expected.items():
            assert torch.allclose(parameter, parameters[name], atol=1e-5), name
