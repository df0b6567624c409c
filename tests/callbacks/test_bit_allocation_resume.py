"""Checkpoints with bits: loaded as they are, and runs that go on as if they had not been interrupted."""

import pytest
import torch
from lightning.pytorch import seed_everything

from callbacks import BitAllocation, EMATarget, ExactResume
from modules.quantization.scores import Parameters
from tests.callbacks.byol import Byol, quiet_trainer
from tests.callbacks.byol import loader as vectors
from tests.callbacks.mixed_precision import Classifier, allocation, input_bits, loader, ranges, weight_bits
from tests.noisy_training import NoisyData, SaveAtStep, equal, train
from tests.test_exact_resume import differences, unfinished_places


class Counted(BitAllocation):
    """Counts how often bits are chosen."""

    runs = 0

    def run(self, trainer, pl_module):
        self.runs += 1
        return super().run(trainer, pl_module)


@pytest.fixture
def trained(tmp_path):
    """A module after an epoch with bits, and its checkpoint."""
    module = Classifier()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[allocation()])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    return module, tmp_path / "end.ckpt"


def test_a_checkpoint_of_plain_values_is_evaluated_to_the_same_logits(tmp_path, trained):
    module, checkpoint = trained
    content = torch.load(checkpoint, weights_only=True)
    chosen = content["callbacks"]["BitAllocation"]["chosen"]
    assert chosen == {"weight_bits": weight_bits(module.model), "activation_bits": input_bits(module.model)}
    module.logits.clear()
    quiet_trainer(tmp_path).validate(module, loader(), verbose=False)
    again, unquantized = Classifier(), Classifier()
    trainer = quiet_trainer(tmp_path, callbacks=[allocation()])
    trainer.validate(again, loader(), ckpt_path=checkpoint, verbose=False, weights_only=True)
    assert torch.equal(torch.cat(again.logits), torch.cat(module.logits))
    state = {
        key.replace("parametrizations.weight.original", "weight"): value for key, value in content["state_dict"].items()
    }
    unquantized.load_state_dict({key: state[key] for key in unquantized.state_dict()})
    quiet_trainer(tmp_path).validate(unquantized, loader(), verbose=False)
    assert not torch.allclose(torch.cat(again.logits), torch.cat(unquantized.logits), atol=1e-3), "bits are of effect"


def fit(folder, stop_at=None, resume=None, **options):
    """Two epochs of four equal batches, as a plain loader starts an epoch anew when it is resumed."""
    module, callback = Classifier(), Counted(**{"network": "model", "mean_bits": 5, "pictures": 8, **options})
    savers = [SaveAtStep(stop_at, folder / "middle.ckpt")] if stop_at else []
    callbacks = [ExactResume(), callback, *savers]  # Lightning alone leaves out the start of an epoch after step 4
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=callbacks, num_sanity_val_steps=0)
    trainer.fit(module, loader(8, repeat=4), loader(8), ckpt_path=resume, weights_only=True)
    return module, callback, trainer.optimizers[0].state_dict()


@pytest.mark.parametrize("stop_at", [2, 4, 7])
@pytest.mark.parametrize("options", [{}, {"weight_scale": "learned"}, {"begin_epoch": 1, "weight_scale": "fixed"}])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, options, stop_at):
    module, callback, optimizer = fit(tmp_path, stop_at, **options)
    again, resumed, optimizer_again = fit(tmp_path, resume=tmp_path / "middle.ckpt", **options)
    assert equal(dict(module.state_dict()), dict(again.state_dict()))
    assert equal(optimizer, optimizer_again)
    assert callback.runs == 1
    assert resumed.runs == ("begin_epoch" in options and stop_at <= 4), "unless it was stopped before"
    assert resumed.chosen == callback.chosen
    assert len(set(callback.chosen["weight_bits"].values())) > 1
    assert all(low < high for low, high in ranges(again.model).values())


def test_a_run_with_dropout_schedule_and_averages_goes_on_from_every_checkpoint(tmp_path):
    def run(**options):
        callback = Counted(
            "layers",
            mean_bits=4,
            bits=[2, 3, 4, 8],
            first_last_bits=None,
            begin_epoch=1,
            pictures=8,
            weight_scale="learned",
            score=Parameters(),  # features of a regression may be negative throughout
        )
        return train(tmp_path, NoisyData((20,)), callbacks=[callback], **options), callback

    full, first = run(save=True)
    assert first.runs == 1
    for place in unfinished_places(full, {}):
        resumed, callback = run(resume=tmp_path / f"{place}.ckpt")
        assert differences(full, resumed, place) == []
        assert callback.chosen == first.chosen
        assert callback.runs == (place.split("-")[1] == "0"), place


class SeededByol(Byol):
    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(1000 * self.trainer.current_epoch + batch_idx)


@pytest.mark.parametrize("stop_at", [3, 6])
@pytest.mark.parametrize("buffers", ["keep", "copy", "ema"])
def test_a_student_and_its_average_go_on_alike(tmp_path, buffers, stop_at):
    def run(**options):
        seed_everything(1)
        module = SeededByol()
        callbacks = [
            BitAllocation(["online", "target"], mean_bits=4, first_last_bits=None, pictures=8, begin_epoch=1),
            EMATarget("online", "target", 0.9, buffers=buffers),
            SaveAtStep(stop_at, tmp_path / f"middle-{len(options)}.ckpt"),
        ]
        quiet_trainer(tmp_path, max_epochs=2, callbacks=callbacks).fit(module, vectors(8, repeat=4), **options)
        return module

    module, again = run(), run(ckpt_path=tmp_path / "middle-0.ckpt", weights_only=True)
    assert equal(dict(module.state_dict()), dict(again.state_dict()))
    assert weight_bits(module.online) == weight_bits(module.target) == weight_bits(again.target)
    assert all(weight_bits(module.target).values())
    own, followed = ranges(module.target), ranges(module.online)
    assert (own == followed) == (buffers == "copy")
