"""What a person may get wrong with BitAllocation: told before the first step, with what to do."""

import math

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from tests.callbacks.byol import quiet_trainer
from tests.callbacks.mixed_precision import Classifier, allocation, loader, small_network, weight_bits
from tests.modules.quantization.small_networks import images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_bits": None}, r"give a budget \(size_budget, mean_bits, bops_budget\) or a file with an allocation"),
        ({"size_budget": 1.0}, "size_budget and mean_bits are two ways to give one budget: leave one out"),
        ({"mean_bits": 0}, "mean_bits: 0 is not positive"),
        ({"bops_budget": -1.0}, "bops_budget: -1.0 is not positive"),
        ({"bits": []}, "bits: candidate bits must ascend, each once, within 2..8"),
        ({"bits": [4, 3]}, r"bits: candidate bits must ascend.*got \(4, 3\)"),
        ({"bits": [4, 9]}, "candidate bits of bits: 9 is outside 2..8"),
        ({"layer_bits": {"head": [1]}}, "candidate bits of head: 1 is outside 2..8"),
        ({"first_last_bits": 9}, "first_last_bits: 9 is outside 2..8"),
        ({"activation_bits": 1}, "activation_bits: 1 is outside 2..8"),
        ({"pictures": 1}, "pictures: 1 is below 2"),
        ({"begin_epoch": -1}, "begin_epoch: -1 is below 0"),
        ({"network": []}, "network: no name is given"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        allocation(**options)


class Unused(nn.Module):
    """Has a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.spare, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.last(self.first(x).mean((2, 3)))


class Tied(Unused):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.again.weight = self.spare.weight

    def forward(self, x):
        return self.last(self.again(self.spare(self.first(x).mean((2, 3)))))


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        # 297 of 3,809 parameters are in the first and the last layer: 4 + 4 * 297 / 3809
        (None, {"mean_bits": 4.0}, r"mean_bits: 4 is out of reach: .* it is 4\.312 to 8\.000; raise it or allow fewer"),
        (None, {"mean_bits": None, "size_budget": 1e-4}, r"size_budget: 0.0001 MiB is out of reach: .* it is 0\.00"),
        (None, {"mean_bits": None, "bops_budget": 1e-6}, "bops_budget: 1e-06 G bit operations is out of reach"),
        (None, {"exclude": ["layers.*"]}, r"exclude: 'layers.\*' matches none of the 7 layers \(conv, blocks.0.conv1"),
        (None, {"layer_bits": {"no.*": [4]}}, r"layer_bits: 'no.\*' matches none of the 7 layers \(conv, blo"),
        (None, {"network": "encoder"}, "network: Classifier has no module 'encoder'; 'encoder' is none of model"),
        (None, {"network": "model.body"}, "has no module 'model.body'; 'body' is none of conv, norm, act, bl"),
        (Unused, {}, r"1 layers are not called in a forward pass \(spare\).*name them in exclude"),
        (Tied, {}, "spare and again share their weight, which one number of bits cannot describe; name one in exclude"),
    ],
)
@pytest.mark.parametrize("begin_epoch", [0, 3])
def test_what_does_not_fit_the_network_is_told_before_the_first_step(tmp_path, network, options, message, begin_epoch):
    module = Classifier(network and network())
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[allocation(**options, begin_epoch=begin_epoch)])
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader(16))
    assert not module.losses


@pytest.mark.parametrize("begin_epoch", [0, 3])
def test_a_file_of_another_network(tmp_path, begin_epoch):
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[allocation()]).fit(Classifier(), loader(16))
    other = small_network()
    other.blocks = other.blocks[:1]
    other.head = nn.Linear(8, 5)
    module = Classifier(other)
    options = {"mean_bits": None, "begin_epoch": begin_epoch}
    callback = allocation(allocation=str(tmp_path / "bits.yaml"), **options)
    with pytest.raises(ValueError, match=r"bits.yaml: of another network: it has 7 layers, the network 4; unknown are"):
        quiet_trainer(tmp_path / "other", max_epochs=4, callbacks=[callback]).fit(module, loader(16))
    missing = allocation(allocation=str(tmp_path / "bit.yaml"), **options)
    with pytest.raises(FileNotFoundError, match=r"bit\.yaml"):
        quiet_trainer(tmp_path / "other", max_epochs=4, callbacks=[missing]).fit(Classifier(), loader(16))
    assert not module.losses


def test_a_file_with_bits_of_inputs_that_are_not_quantized(tmp_path):
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[allocation()]).fit(Classifier(), loader(16))
    callback = allocation(allocation=str(tmp_path / "bits.yaml"), mean_bits=None, activation_bits=None)
    with pytest.raises(ValueError, match="bits for the inputs of 7 layers, but activation_bits is null"):
        quiet_trainer(tmp_path / "other", max_epochs=1, callbacks=[callback]).fit(Classifier(), loader(16))


class Pictures(LightningDataModule):
    """Gives pictures for calibration of its own."""

    def __init__(self, calibration):
        super().__init__()
        self.calibration = calibration

    def calibration_dataloader(self, count):
        return DataLoader(self.calibration, batch_size=None)

    def train_dataloader(self):
        return loader(16)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no calibration pictures: the loader gives no batch to this process"),
        ([images(1)], "features need at least 2 images to be compared, got 1"),
        ([{"a": 1}], "no images in the batch: expected a tensor.*got a dictionary with a"),
        ([images(4) * torch.nan], "not finite"),
    ],
)
def test_calibration_pictures_that_are_none(tmp_path, batches, message):
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[allocation()]).fit(Classifier(), Pictures(batches))


def test_dead_channels_and_constant_features_give_numbers(tmp_path):
    network = small_network()
    with torch.no_grad():
        network.conv.weight[0] = 0
        network.blocks[0].bn1.weight.zero_()
        network.blocks[0].bn1.bias.fill_(1.0)
    module = Classifier(network)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[allocation(bits=[2, 4, 8])])
    trainer.fit(module, Pictures([images(1).expand(8, -1, -1, -1)]))
    assert all(weight_bits(module.model).values())
    assert len(module.losses) == 2
    assert all(torch.isfinite(torch.tensor(module.losses)))
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert math.isfinite(yaml.safe_load((tmp_path / "bits.yaml").read_text())["objective"])
