import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from callbacks import EMATarget
from callbacks.ema_target import MovingAverage, ema_momentum
from tests.callbacks.byol import Byol, loader, quiet_trainer
from tests.distributed import run_ranks


class Reference(Callback):
    """Keeps its own copy of the target by the formula, one scalar loop per optimizer step; comes after EMATarget."""

    def __init__(self, momentum, total_steps):
        self.momentum, self.total_steps, self.expected, self.errors, self.taus = momentum, total_steps, None, [], []

    def on_train_start(self, trainer, pl_module):
        self.expected = [p.detach().clone().double() for p in pl_module.online.parameters()]
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != self.step:
            k = trainer.global_step - 1
            tau = 1 - (1 - self.momentum) * (math.cos(math.pi * k / self.total_steps) + 1) / 2
            self.taus.append((tau, float(trainer.callback_metrics["train/tau"])))
            for i, p in enumerate(pl_module.online.parameters()):
                self.expected[i] = tau * self.expected[i] + (1 - tau) * p.detach().double()
            self.step = trainer.global_step
        pairs = zip(self.expected, pl_module.target.parameters(), strict=True)
        self.errors.append(max((e - p.double()).abs().max().item() for e, p in pairs))


class Weights(Callback):
    """Notes the target's weights after each batch."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append((trainer.global_step, pl_module.target[0].weight.detach().clone()))


def test_momentum_closed_forms():
    assert ema_momentum(0, 10, 0.996, "cosine") == pytest.approx(0.996, abs=1e-12)
    assert ema_momentum(5, 10, 0.996, "cosine") == pytest.approx(0.998, abs=1e-12)
    assert ema_momentum(10, 10, 0.996, "cosine") == pytest.approx(1.0, abs=1e-12)
    assert ema_momentum(25, 100, 0.9, "cosine") == pytest.approx(1 - 0.1 * (math.sqrt(0.5) + 1) / 2, abs=1e-12)
    assert ema_momentum(99, 10, 0.996, "cosine") == 1.0
    assert ema_momentum(7, None, 0.9, "constant") == 0.9
    assert [ema_momentum(k, None, 0.99, "warmup") for k in (0, 1, 2)] == pytest.approx([0, 1 / 2, 2 / 3])
    assert ema_momentum(98, None, 0.99, "warmup") < 0.99 + 1e-12
    assert ema_momentum(5000, None, 0.99, "warmup") == 0.99
    with pytest.raises(ValueError, match="needs total_steps"):
        ema_momentum(0, None, 0.9, "cosine")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_follows_the_formula_once_per_optimizer_step(tmp_path, accumulate):
    seed_everything(0)
    steps = 2 * math.ceil(8 / accumulate)
    reference = Reference(0.9, steps)
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        callbacks=[EMATarget("online", "target", 0.9), reference],
    )
    trainer.fit(Byol(), loader(64))
    assert trainer.global_step == steps == len(reference.taus)
    assert max(reference.errors) < 1e-6
    for expected, logged in reference.taus:
        assert logged == pytest.approx(expected, abs=1e-6)


def test_nothing_moves_on_a_batch_without_optimizer_step(tmp_path):
    weights = Weights()
    callbacks = [EMATarget("online", "target", 0.5, schedule="constant"), weights]
    quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=callbacks).fit(Byol(), loader())
    for (step, before), (next_step, after) in zip(weights.after, weights.after[1:], strict=False):
        assert torch.equal(before, after) == (step == next_step)
    assert [step for step, _ in weights.after] == [0, 1, 1, 2]


def test_target_gets_no_gradient_and_keeps_its_own_statistics(tmp_path):
    model = Byol()
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[EMATarget("online", "target")]).fit(model, loader())
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    assert model.target[1].num_batches_tracked == 8
    assert not torch.equal(model.target[1].running_mean, model.online[1].running_mean)


def with_counter() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_buffer("mean", torch.zeros(2))
    module.register_buffer("count", torch.tensor(0))
    return module


@pytest.mark.parametrize(("rule", "mean", "count"), [("keep", 0.0, 0), ("copy", 8.0, 5), ("ema", 2.0, 5)])
def test_buffer_rules(rule, mean, count):
    online, target = with_counter(), with_counter()
    online.mean.fill_(8.0)
    online.count.fill_(5)
    MovingAverage(online, target, rule).update(0.75)
    assert target.mean.tolist() == [mean, mean]
    assert target.count.item() == count


def test_a_new_run_starts_from_the_online_weights(tmp_path):
    class TwoRandom(Byol):
        def __init__(self):
            super().__init__()
            for layer in (self.target[0], self.target[3]):
                layer.reset_parameters()

        def on_train_start(self):
            self.equal = torch.equal(self.online[0].weight, self.target[0].weight)

    for initialize in (True, False):
        model = TwoRandom()
        callback = EMATarget("online", "target", initialize=initialize)
        quiet_trainer(tmp_path, max_steps=1, callbacks=[callback]).fit(model, loader())
        assert model.equal is initialize


def fit_and_resume(folder, precision, stop_at):
    """Weights of an uninterrupted run and of one that stopped after some batches and was resumed."""

    class Seeded(Byol):
        def on_train_batch_start(self, batch, batch_idx):
            torch.manual_seed(1000 * self.trainer.current_epoch + batch_idx)

    options = {"max_epochs": 2, "precision": precision}
    data = loader(8, repeat=4)  # equal batches: within an epoch a plain DataLoader starts anew
    seed_everything(1)
    model = Seeded()
    ema = EMATarget("online", "target", 0.9)
    quiet_trainer(folder, callbacks=[ema], **options).fit(model, data)

    seed_everything(1)
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet_trainer(folder, callbacks=[EMATarget("online", "target", 0.9), checkpoint], **options).fit(Seeded(), data)
    seed_everything(2)
    resumed, callback = Seeded(), EMATarget("online", "target", 0.9)
    trainer = quiet_trainer(folder, callbacks=[callback], **options)
    trainer.fit(resumed, data, ckpt_path=f"{folder}/step={stop_at}.ckpt", weights_only=True)
    return model, ema, resumed, callback


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, precision, stop_at):
    model, ema, resumed, callback = fit_and_resume(tmp_path, precision, stop_at)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    before, after = ema.state_dict(), callback.state_dict()
    assert (before["updated_at"], before["total_steps"]) == (after["updated_at"], after["total_steps"]) == (8, 8)
    assert before["full_precision"].keys() == after["full_precision"].keys()
    assert bool(before["full_precision"]) is (precision == "bf16-true")
    for name, value in before["full_precision"].items():
        assert torch.equal(value, after["full_precision"][name])


def test_half_precision_parameters_are_averaged_in_float32():
    torch.manual_seed(0)
    online, target = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).bfloat16()
    expected = target.weight.detach().double().clone()
    naive = target.weight.detach().clone()
    average = MovingAverage(online, target)
    for _ in range(1000):
        average.update(0.999)
        expected = 0.999 * expected + 0.001 * online.weight.detach().double()
        naive.lerp_(online.weight.detach(), 0.001)
    assert (target.weight.double() - expected).abs().max() < 2**-8
    assert (average.full_precision()["weight"].double() - expected).abs().max() < 1e-5
    assert (naive.double() - expected).abs().max() > 0.05  # what happens without


def test_bf16_mixed_keeps_float32_weights(tmp_path):
    seed_everything(0)
    reference = Reference(0.9, 8)
    options = {"precision": "bf16-mixed", "callbacks": [EMATarget("online", "target", 0.9), reference]}
    quiet_trainer(tmp_path, max_epochs=2, **options).fit(Byol(), loader())
    assert max(reference.errors) < 1e-6


def test_an_update_that_an_interruption_prevented_is_made_up_for(tmp_path):
    class Interrupt(Callback):
        """Fails after the optimizer step and before the target moved."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                raise RuntimeError("power cut")

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen = pl_module.target[0].weight.detach().clone()
            trainer.should_stop = True

    model = Byol()
    saver = OnExceptionCheckpoint(tmp_path)
    callbacks = [Interrupt(), EMATarget("online", "target", 0.5, "constant"), saver]
    with pytest.raises(RuntimeError, match="power cut"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(model, loader())
    expected = 0.5 * model.target[0].weight + 0.5 * model.online[0].weight

    look = Look()
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[EMATarget("online", "target", 0.5, "constant"), look])
    trainer.fit(Byol(), loader(), ckpt_path=saver.ckpt_path)
    assert torch.allclose(look.seen, expected, atol=1e-7)


def test_a_run_of_another_length_warns(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="end", every_n_epochs=1)
    callbacks = [EMATarget("online", "target"), checkpoint]
    quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(Byol(), loader())
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[EMATarget("online", "target")])
    with pytest.warns(UserWarning, match="now has 12 optimizer steps, it had 4 when the checkpoint"):
        trainer.fit(Byol(), loader(), ckpt_path=f"{tmp_path}/end.ckpt")


def fit_rank(rank, folder):
    seed_everything(rank)  # DDP makes the weights equal; the batches stay different
    model = Byol()
    callback = EMATarget("online", "target", 0.9)
    trainer = quiet_trainer(folder, devices=2, strategy="ddp", max_steps=5, callbacks=[callback])
    trainer.fit(model, loader(80))
    return [p.detach() for p in model.target.parameters()], model.losses, callback.state_dict()["updated_at"]


def test_two_ranks_hold_the_same_target(tmp_path):
    (first, losses_0, step_0), (second, losses_1, step_1) = run_ranks(fit_rank, 2, str(tmp_path))
    assert step_0 == step_1 == 5
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert losses_0 != losses_1


def test_pairs_by_path_of_nested_and_compiled_modules():
    online = nn.Sequential(nn.Linear(2, 2))
    compiled = nn.Sequential(torch.compile(copy.deepcopy(online[0])))
    average = MovingAverage(online, compiled)
    online[0].weight.data.fill_(1.0)
    average.update(0.0)
    assert torch.equal(online[0].weight, compiled[0]._orig_mod.weight)


def test_two_callbacks_keep_separate_states():
    assert EMATarget("a", "b").state_key != EMATarget("a", "c").state_key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum is 1\.0, expected a number in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum is -0\.1"),
        ({"schedule": "linear"}, "schedule is 'linear', expected one of cosine, constant, warmup"),
        ({"buffers": "average"}, "buffers is 'average', expected one of keep, copy, ema"),
        ({"target": "online"}, "online and target are both 'online'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMATarget(**({"online": "online", "target": "target"} | arguments))


def test_modules_that_do_not_match_are_named(tmp_path):
    def fit(change, **arguments):
        model = Byol()
        change(model)
        callback = EMATarget(**({"online": "online", "target": "target"} | arguments))
        quiet_trainer(tmp_path, max_steps=1, callbacks=[callback]).fit(model, loader())

    with pytest.raises(ValueError, match=r"online='student' is no module of Byol.*children are: online, target"):
        fit(lambda m: None, online="student")
    with pytest.raises(ValueError, match=r"2 parameters are missing in the target module, first 3.bias, 3.weight"):
        fit(lambda m: setattr(m, "target", m.target[:3]))
    with pytest.raises(ValueError, match=r"2 parameters are missing in the online module"):
        fit(lambda m: setattr(m, "online", m.online[:3]))
    with pytest.raises(ValueError, match=r"1 parameters differ in shape.*0.weight \(16, 8\) vs \(16, 4\)"):
        fit(lambda m: m.target.__setitem__(0, nn.Linear(4, 16)))
    with pytest.raises(ValueError, match=r"6 parameters are shared by both modules.*copy.deepcopy"):
        fit(lambda m: setattr(m, "target", m.online))
    with pytest.raises(ValueError, match=r"1 buffers are missing in the target module, first extra"):
        fit(lambda m: m.online.register_buffer("extra", torch.zeros(1)), buffers="copy")
    with pytest.raises(ValueError, match="no parameters"):
        fit(lambda m: (setattr(m, "online", nn.ReLU()), setattr(m, "target", nn.ReLU())))


def test_cosine_needs_a_finite_run(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=-1, callbacks=[EMATarget("online", "target")])
    with pytest.raises(ValueError, match=r"schedule='cosine' needs the length of the run.*max_steps"):
        trainer.fit(Byol(), loader())


def test_other_stages_are_left_alone(tmp_path):
    class Validated(Byol):
        def validation_step(self, batch, batch_idx):
            return None

    model = Validated()
    quiet_trainer(tmp_path, callbacks=[EMATarget("online", "target")]).validate(model, loader())
    assert all(p.requires_grad for p in model.target.parameters())
