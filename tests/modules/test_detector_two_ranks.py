"""Training a detector on two gloo ranks against one process that accumulates two batches."""

import torch
from torch.utils.data import DataLoader

from modules.detection import Detector
from tests.distributed import run_ranks
from tests.modules.boxes import BACKBONE, SIDE, detection_batch
from tests.modules.toy_images import quiet_trainer

TWO_RANKS = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}


class PlainDetector(Detector):
    """Plain steps, as AdamW divides what rounding leaves of a gradient by its own size."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def detector(name):
    torch.manual_seed(0)
    return PlainDetector(name, BACKBONE, num_classes=2, image_size=SIDE)


def train(module, batches, **options):
    trainer = quiet_trainer(max_epochs=1, **options)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return weights, trainer.callback_metrics["train/loss"].item()


def batches():
    """Four, with unequal numbers of matched anchors; the loss of each is divided by its own."""
    return [detection_batch(range(2 * place, 2 * place + 2)) for place in range(4)]


def train_on_a_rank(rank):
    return train(detector("ssdlite"), batches()[rank::2], **TWO_RANKS)


def test_two_ranks_equal_one_process_with_two_accumulated_batches():
    start = {name: parameter.detach().clone() for name, parameter in detector("ssdlite").named_parameters()}
    expected, loss = train(detector("ssdlite"), batches(), accumulate_grad_batches=2)
    assert max((expected[name] - start[name]).abs().max().item() for name in expected) > 1e-2
    for weights, own_loss in run_ranks(train_on_a_rank, 2):
        assert abs(own_loss - loss) < 1e-4
        for name, weight in expected.items():
            assert torch.allclose(weight, weights[name], atol=1e-5), name
