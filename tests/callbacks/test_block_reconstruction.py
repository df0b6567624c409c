"""Weights rounded block by block in the first epoch with bits: better than to nearest, once, and block after block."""

import copy
import csv
from itertools import islice

import pytest
import torch
from safetensors.torch import save_file

from callbacks import BitAllocation, BlockReconstruction
from callbacks.block_reconstruction import atomic_bytes
from datamodules import ImageClassification
from modules.csmpq import QuantizedClassifier
from modules.quantization.attachment import bake, input_quantizers, weight_quantizers
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.mixed_precision import Classifier, loader, ranges, weight_bits
from tests.noisy_training import SaveAtStep, equal

SETTINGS = {
    "encoder": "resnet10t",
    "encoder_options": {"channels": [8, 8, 16, 16], "stem_width": 8},
    "num_classes": 10,
    "image_size": 32,
    "in_channels": 1,
    "drop_path": 0.0,
    "lr_reference_batch": None,
}
BLOCKS = ["conv1.0", "conv1.3", "conv1.6", "fc", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]


def digits():
    return ImageClassification(image_size=32, batch_size=32, num_workers=0, seed=0)


def classifier():
    """A network with statistics of the digits."""
    torch.manual_seed(0)
    module, data = QuantizedClassifier("ptq", **SETTINGS), digits()
    data.setup("fit")
    with torch.no_grad():
        for batch in islice(data.train_dataloader(), 20):
            module.network(batch.images)
    return module


@pytest.fixture(scope="module")
def network():
    return classifier().state_dict()


def module_of(network):
    module = QuantizedClassifier("ptq", **SETTINGS)
    module.load_state_dict(network)
    return module


def callbacks(reconstruct=True, **options):
    allocation = BitAllocation(bits=[2, 3, 4], mean_bits=3.5, pictures=64, weight_scale="fixed")
    settings = {"steps": 40, "pictures": 64, "batch_size": 32, **options}
    return [allocation, BlockReconstruction(**settings)] if reconstruct else [allocation]


def fit(folder, module, own, epochs=1, **options):
    trainer = quiet_trainer(
        folder, max_epochs=epochs, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0, callbacks=own
    )
    trainer.fit(module, digits(), weights_only=True, **options)
    return trainer


@pytest.fixture(scope="module")
def finished(network, tmp_path_factory):
    """Folder, module and trainer of a run."""
    folder, module = tmp_path_factory.mktemp("run"), module_of(network)
    return folder, module, fit(folder, module, [*callbacks(), SaveAtStep(1, folder / "middle.ckpt")], epochs=2)


def test_outputs_are_closer_to_those_in_float_than_with_nearest_rounding(finished, network, tmp_path):
    _, module, _ = finished
    nearest = module_of(network)
    fit(tmp_path, nearest, callbacks(reconstruct=False))
    assert weight_bits(nearest.network) == weight_bits(module.network)
    data = digits()
    data.setup("fit")
    images = next(iter(data.val_dataloader())).images
    reference = module_of(network).eval()
    with torch.no_grad():
        expected = reference(images)
        errors = [
            (bake(copy.deepcopy(one.network)).eval()(images) - expected).pow(2).mean().item()
            for one in (module, nearest)
        ]
    assert 0 < errors[0] < 0.8 * errors[1], "of pictures that it was not calibrated with"


def test_steps_are_counted_ranges_seen_and_files_written(finished):
    folder, module, trainer = finished
    assert trainer.global_step == 4
    assert sorted(path.stem for path in (folder / "reconstruction").glob("*.safetensors")) == BLOCKS
    with open(folder / "media/quantization/blocks/step-00000000.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["block"] for row in rows) == BLOCKS
    assert sum(float(row["error"]) < float(row["error rounded to nearest"]) for row in rows) > len(rows) // 2
    assert all(low < high for low, high in ranges(module.network).values())
    assert all(int(one.batches) == 4 for one in input_quantizers(module.network).values())


def test_ptq_trains_nothing(finished, network):
    _, module, _ = finished
    for name, value in module.network.named_parameters():
        if "parametrizations" not in name:
            assert torch.equal(value, network[f"network.{name}"]), name
    assert all(parameter.grad is None for parameter in module.parameters())
    statistics = {key: value for key, value in module.state_dict().items() if "running_" in key}
    assert all(torch.equal(value, network[key]) for key, value in statistics.items())


def test_a_checkpoint_is_resumed_without_rounding_again(finished, network, tmp_path):
    folder, module, _ = finished
    own = callbacks()
    runs = []
    own[1].run = lambda *arguments: runs.append(arguments)
    again = module_of(network)
    trainer = fit(tmp_path, again, own, epochs=2, ckpt_path=folder / "middle.ckpt")
    assert runs == []
    assert trainer.global_step == 4
    own_weights, weights = (
        {name: layer.scale for name, layer in weight_quantizers(one.network).items()} for one in (again, module)
    )
    assert equal(own_weights, weights)
    rounded = {key: value for key, value in module.state_dict().items() if key.endswith("original")}
    assert rounded
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in rounded.items())


def test_an_interrupted_run_goes_on_with_the_next_block(finished, network, tmp_path, monkeypatch):
    written = []

    def interrupted(path, content):
        if len(written) == 3:
            raise RuntimeError("power cut")
        written.append(path.stem)
        atomic_bytes(path, content)

    folder = tmp_path / "blocks"
    with monkeypatch.context() as patch:
        patch.setattr("callbacks.block_reconstruction.atomic_bytes", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(tmp_path, module_of(network), callbacks(folder=str(folder)))
    assert sorted(path.stem for path in folder.iterdir()) == sorted(written)
    own, again, found = callbacks(folder=str(folder)), module_of(network), []
    run = own[1].run
    own[1].run = lambda *arguments: found.extend(run(*arguments))
    fit(tmp_path / "again", again, own, epochs=2)
    assert {result.name for result in found} == set(BLOCKS) - set(written)
    assert equal(dict(again.state_dict()), dict(finished[1].state_dict()))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (
            None,
            {"steps": 41},
            r"reconstruction/conv1.0.safetensors: is a block of another network, other bits or",
        ),
        (None, {"pictures": 96}, r"is a block of another network, other bits or other settings; give another folder"),
        (b"half a file", {}, r"fc.safetensors: cannot be read \(.*\); delete it to reconstruct this block anew"),
        ({"other": torch.zeros(1)}, {}, r"fc.safetensors: is a block of another network"),
    ],
)
def test_files_that_do_not_fit_are_named(finished, network, tmp_path, spoil, options, message):
    folder = tmp_path / "reconstruction"
    folder.mkdir()
    source = finished[0] / "reconstruction"
    for name in ["conv1.0"] if spoil is None else ["fc"]:
        (folder / f"{name}.safetensors").write_bytes((source / f"{name}.safetensors").read_bytes())
    if isinstance(spoil, bytes):
        (folder / "fc.safetensors").write_bytes(spoil)
    elif spoil:
        save_file(spoil, folder / "fc.safetensors")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module_of(network), callbacks(**options))


def test_wrong_use_is_told_before_the_first_step(tmp_path):
    allocation = BitAllocation("model", mean_bits=5, pictures=16)
    reconstruction = BlockReconstruction("model", pictures=32)
    for own, message in (
        ([allocation, reconstruction], "7 layers take their scale from the weight: set weight_scale of the allocation"),
        ([reconstruction, allocation], "no quantizers on 'model' to fill: put a BitAllocation before this"),
        ([BlockReconstruction("body")], "network: Classifier has no module 'body'"),
    ):
        module = Classifier()
        with pytest.raises(ValueError, match=message):
            quiet_trainer(tmp_path, max_epochs=1, callbacks=own).fit(module, loader(16))
        assert not module.losses
    with pytest.raises(ValueError, match="pictures: 16 calibration pictures are fewer than batch_size: 32"):
        BlockReconstruction(pictures=16)


def test_works_in_the_training_of_a_stranger_with_learned_ranges(tmp_path):
    """Rounded weights are where training goes on from; the ranges stay as they were learned."""
    module = Classifier(lr=1e-4)
    own = [
        BitAllocation("model", mean_bits=5, pictures=16, weight_scale="fixed", begin_epoch=1),
        BlockReconstruction("model", steps=10, pictures=16, batch_size=8, activation_steps=10),
    ]
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=own)
    trainer.fit(module, loader(16))
    assert trainer.global_step == 6
    assert all(one.is_fixed for one in input_quantizers(module.model).values())
    assert all(low < high for low, high in ranges(module.model).values())
    assert all(torch.isfinite(torch.tensor(module.losses)))
    again = Classifier()
    for callback in own:
        callback.setup(trainer, again, "predict")
    again.load_state_dict(module.state_dict())
    images = loader(16).dataset.tensors[0]
    with torch.no_grad():
        assert torch.equal(again.eval().model(images), module.eval().model(images))
