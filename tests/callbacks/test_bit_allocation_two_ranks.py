"""Bits on two gloo ranks: those of one process, with the same ranges on both, and the training of one process."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.callbacks.byol import quiet_trainer
from tests.callbacks.mixed_precision import CLASSES, Classifier, allocation, input_bits, ranges, weight_bits
from tests.distributed import run_ranks
from tests.modules.quantization.small_networks import images

TWO_RANKS = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
SETTINGS = {
    "choice": {"pictures": 32},
    "plain": {"pictures": 32, "activation_bits": None},
    "learned": {"pictures": 32, "activation_bits": None, "weight_scale": "learned"},
}


def batches(count=6):
    """Rank r trains on every second batch from the r-th on; of calibration pictures, each gives half."""
    return [(images(8, seed), (torch.arange(8) + seed) % CLASSES) for seed in range(count)]


def train(folder, options, items, **trainer_options):
    module = Classifier(lr=0.02, momentum=0.0)
    trainer = quiet_trainer(folder, callbacks=[allocation(**options)], **{"max_epochs": 1, **trainer_options})
    trainer.fit(module, DataLoader(items, batch_size=None))
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return weights, weight_bits(module.model), input_bits(module.model), ranges(module.model)


def on_a_rank(rank, folder):
    found = {name: train(folder, options, batches()[rank::2], **TWO_RANKS) for name, options in SETTINGS.items()}
    late = {"begin_epoch": 1, "weight_scale": "learned", "pictures": 16}
    return found | {"late": train(folder, late, batches(2)[rank::2], max_epochs=2, **TWO_RANKS)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(on_a_rank, 2, str(tmp_path_factory.mktemp("ranks")))


def test_bits_are_those_of_one_process_and_ranges_are_of_all_pictures(ranks, tmp_path):
    _, bits, inputs, _ = train(tmp_path, SETTINGS["choice"], batches(4))
    (weights, *first), (others, *second) = (rank["choice"] for rank in ranks)
    assert first == second
    assert first[:2] == [bits, inputs]
    assert len(set(bits.values())) > 1
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    pictures = torch.stack([pictures for pictures, _ in batches()])
    low, high = (torch.stack([getattr(pair, side)() for pair in pictures.split(2)]) for side in ("min", "max"))
    expected = [low[0], high[0]]
    for step in (1, 2):
        expected = [0.99 * old + 0.01 * new[step] for old, new in zip(expected, (low, high), strict=True)]
    assert first[2]["conv"] == pytest.approx([float(value) for value in expected], rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "learned"])
def test_two_ranks_equal_one_process_with_two_accumulated_batches(ranks, tmp_path, name):
    expected, bits, _, _ = train(tmp_path, SETTINGS[name], batches(), accumulate_grad_batches=2)
    start = {key: value.detach() for key, value in Classifier().named_parameters()}
    moved = [
        (value - start[key.replace("parametrizations.weight.original", "weight")]).abs().max().item()
        for key, value in expected.items()
        if not key.endswith("scale")
    ]
    assert max(moved) > 1e-3
    for rank in ranks:
        weights, own, _, _ = rank[name]
        assert own == bits
        for key, value in expected.items():
            assert torch.allclose(weights[key], value, atol=1e-5), key


def test_scales_that_wait_for_their_epoch_do_not_stop_two_ranks(ranks):
    (weights, *first), (others, *second) = (rank["late"] for rank in ranks)
    assert first == second
    assert all(first[0].values())
    assert all(torch.equal(weights[name], others[name]) for name in weights)
