import pytest
import torch
from torch import nn

from modules.auxiliary import AuxiliaryOutput, BranchPair
from modules.bolt import BOLT
from tests.modules.toy_images import TINY, batches, loader, quiet_trainer, silence


class Distance(nn.Module):
    is_objective = True

    def __init__(self, weight=1.0, dim=16):
        super().__init__()
        self.weight = weight
        self.layer = nn.Linear(dim, 1, bias=False)

    def forward(self, pairs):
        loss = sum((self.layer(pair.online) - self.layer(pair.target)).square().mean() for pair in pairs)
        return AuxiliaryOutput(loss, self.weight, {"distance": loss.sqrt()})


class Stored(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("value", torch.arange(3.0))


def tiny_bolt(**entries):
    torch.manual_seed(0)
    module = BOLT(encoder_options=TINY, projector_hidden=8, projector_dim=4)
    module.auxiliary.update(entries)
    return module


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr("modules.auxiliary.rank_zero_info", messages.append)
    return messages


def test_objectives_are_weighted_and_logged_and_others_are_only_stored():
    module = tiny_bolt(near=Distance(0.5), far=Distance(2.0), stored=Stored())
    logged = {}
    module.log_dict = lambda values, **kwargs: logged.update(values)
    pair = BranchPair(torch.randn(4, 16), torch.randn(4, 16), torch.rand(4), torch.rand(4))
    total = module.auxiliary_loss([pair])
    losses = {name: module.auxiliary[name]([pair]).loss for name in ("near", "far")}
    assert total.item() == pytest.approx((0.5 * losses["near"] + 2 * losses["far"]).item(), abs=1e-6)
    assert set(logged) == {"train/near_loss", "train/far_loss", "train/distance"}
    assert not any(value.requires_grad for value in logged.values())
    assert [name for name, _ in module.objectives()] == ["near", "far"]


def test_without_objectives_the_sum_is_zero():
    pair = BranchPair(torch.randn(4, 16), torch.randn(4, 16), torch.rand(4), torch.rand(4))
    assert silence(tiny_bolt()).auxiliary_loss([pair]).item() == 0


def checkpoint_of(module):
    return {"state_dict": {key: value.clone() for key, value in module.state_dict().items()}}


def test_unknown_entries_of_a_checkpoint_are_dropped_with_one_line(said):
    checkpoint = checkpoint_of(tiny_bolt(near=Distance(), stored=Stored()))
    module = tiny_bolt()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    assert said == ["Checkpoint: dropped 'auxiliary.near', 'auxiliary.stored', which no callback of this run uses."]


def test_missing_entries_keep_their_values_with_one_line(said):
    checkpoint = checkpoint_of(tiny_bolt())
    module = tiny_bolt(stored=Stored())
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    assert module.auxiliary["stored"].value.tolist() == [0, 1, 2]
    assert said == ["Checkpoint: 'auxiliary.stored' not in it (or of another shape), kept as initialised."]


def test_entries_of_another_shape_keep_their_values(said):
    checkpoint = checkpoint_of(tiny_bolt(near=Distance(dim=16)))
    module = tiny_bolt(near=Distance(dim=5))
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    assert said == ["Checkpoint: 'auxiliary.near' not in it (or of another shape), kept as initialised."]


def test_equal_entries_are_restored_silently(said):
    source = tiny_bolt(near=Distance())
    checkpoint = checkpoint_of(source)
    module = tiny_bolt(near=Distance())
    module.auxiliary["near"].layer.weight.data.zero_()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(module.auxiliary["near"].layer.weight, source.auxiliary["near"].layer.weight)
    assert not said


def test_training_cannot_be_resumed_with_other_trainable_entries(tmp_path):
    trainer = quiet_trainer()
    trainer.fit(tiny_bolt(near=Distance()), loader(batches(2)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"cannot resume: .* because 'auxiliary.near' differ. Resume with the callbacks"
    ):
        quiet_trainer(max_epochs=2).fit(tiny_bolt(), loader(batches(2)), ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_is_read_by_a_bare_module(tmp_path):
    trainer = quiet_trainer()
    module = tiny_bolt(near=Distance(), stored=Stored())
    trainer.fit(module, loader(batches(2)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    read = BOLT.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(read.online.encoder.cls_token, module.online.encoder.cls_token)
