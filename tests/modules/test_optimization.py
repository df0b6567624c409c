import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modules.optimization import (
    CosineEnds,
    build_optimizer,
    check_cosine_ends,
    check_optimization,
    epoch_poly,
    layer_decay_groups,
    parameter_groups,
    scaled_lr,
    timm_cosine,
    warmup_constant,
    warmup_cosine,
    with_schedule,
)
from tests.modules.toy_images import quiet_trainer


class Regression(LightningModule):
    def __init__(self, schedule="cosine", warmup_epochs=None, reference=None, ends=None):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.schedule, self.warmup_epochs, self.reference, self.ends = schedule, warmup_epochs, reference, ends

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        lr = scaled_lr(self.trainer, 0.1, self.reference)
        groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": lr / 4}]
        return with_schedule(self, torch.optim.SGD(groups, lr=lr), self.schedule, self.warmup_epochs, self.ends)


class RatesUsed(Callback):
    def __init__(self, group=0):
        self.group, self.rates = group, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[self.group]["lr"])


def loader(samples=24, batch_size=2):
    return DataLoader(TensorDataset(torch.randn(samples, 2)), batch_size=batch_size)


def rates_of(module, samples=24, batch_size=2, **kwargs):
    rates = RatesUsed()
    quiet_trainer(callbacks=[rates], **kwargs).fit(module, loader(samples, batch_size))
    return rates.rates


def test_factor_at_known_steps():
    assert [warmup_cosine(k, 4, 12) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [warmup_cosine(k, 4, 12) for k in (4, 8, 12, 99)] == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-12)
    assert warmup_cosine(6, 4, 12) == pytest.approx(0.5 + math.sqrt(2) / 4, abs=1e-12)
    assert warmup_cosine(0, 0, 10) == 1.0
    assert [warmup_constant(k, 2) for k in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert warmup_constant(0, 0) == 1.0


def test_rates_follow_the_optimizer_steps():
    used = rates_of(Regression(), max_epochs=2)
    assert used == pytest.approx([0.1 * warmup_cosine(k, 2, 24) for k in range(24)], rel=1e-9)


def test_accumulated_batches_are_one_step():
    used = rates_of(Regression(), max_epochs=2, accumulate_grad_batches=5)
    assert used == pytest.approx([0.1 * warmup_cosine(k, 1, 6) for k in range(6)], rel=1e-9)


def test_warmup_in_epochs_and_constant_rate():
    assert rates_of(Regression("constant", 0.5), max_epochs=1)[:7] == pytest.approx(
        [0.1 * k / 6 for k in range(1, 7)] + [0.1]
    )
    assert rates_of(Regression("cosine", 1), max_epochs=2)[11] == pytest.approx(0.1)


def test_max_steps_ends_the_cosine():
    assert rates_of(Regression(), max_epochs=-1, max_steps=5)[-1] == pytest.approx(0.1 * warmup_cosine(4, 0, 5))


def test_warmup_is_at_most_forty_epochs():
    used = rates_of(Regression(), samples=2, max_epochs=600)
    assert used.index(max(used)) in (39, 40)


# The recipe of EMO: 300 epochs of 625 steps, 20 of them warm-up.
TOTAL, WARMUP, PEAK = 187_500, 12_500, 6e-3
ENDS = CosineEnds(lr_min=1e-6, warmup_lr=1e-6)
STEPS = [*range(0, TOTAL, 2_500), *range(12_490, 12_510), *range(78_740, 78_760), *range(168_740, 168_760), TOTAL - 1]


def closed_form(step, peak):
    if step < WARMUP:
        return 1e-6 + step * (peak - 1e-6) / WARMUP
    return 1e-6 + 0.5 * (peak - 1e-6) * (1 + math.cos(math.pi * step / TOTAL))


def test_timm_cosine_is_its_closed_form():
    rates = timm_cosine([PEAK, PEAK / 4], WARMUP, TOTAL, ENDS)
    for step in STEPS:
        assert rates(step) == pytest.approx([closed_form(step, PEAK), closed_form(step, PEAK / 4)], rel=1e-12)
    assert [round(rates(step)[0], 6) for step in (0, 12_499, 12_500)] == [1e-6, 6e-3, 5.934e-3]
    assert rates(TOTAL) == [1e-6, 1e-6]


@pytest.mark.parametrize("noise", [None, [0.42, 0.9]])
def test_timm_cosine_is_what_timm_writes_into_an_optimizer(noise):
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": PEAK}, {"params": [torch.ones(1)], "lr": 1e-3}])
    noise_t = noise and [78_750, 168_750]
    reference = CosineLRScheduler(
        optimizer, TOTAL, 1e-6, cycle_limit=1, warmup_t=WARMUP, warmup_lr_init=1e-6, t_in_epochs=False,
        noise_range_t=noise_t, noise_pct=0.67, noise_std=1.0, noise_seed=42,
    )  # fmt: skip
    rates = timm_cosine([PEAK, 1e-3], WARMUP, TOTAL, ENDS._replace(lr_noise=noise))
    for step in STEPS:
        reference.step_update(step)
        assert rates(step) == [group["lr"] for group in optimizer.param_groups]
    noisy = [step for step in STEPS if abs(rates(step)[0] / closed_form(step, PEAK) - 1) > 1e-9]
    assert noisy == ([step for step in STEPS if 78_750 <= step < 168_750] if noise else [])


def test_noise_is_the_normal_number_of_its_step():
    rates = timm_cosine([PEAK], WARMUP, TOTAL, ENDS._replace(lr_noise=[0.42, 0.9]))
    for step in range(100_000, 100_040):
        generator, noise = torch.Generator().manual_seed(42 + step), 1.0
        while abs(noise) >= 0.67:
            noise = torch.randn(1, generator=generator).item()
        assert rates(step)[0] == pytest.approx(closed_form(step, PEAK) * (1 + noise), rel=1e-12)


@pytest.mark.parametrize("group", [0, 1])
def test_a_run_uses_the_rates_of_timm_cosine_also_when_resumed(tmp_path, group):
    ends = CosineEnds(0.001, 0.002, [0.3, 0.8])
    expected = timm_cosine([0.1, 0.025], 12, 48, ends)
    rates = RatesUsed(group)
    trainer = quiet_trainer(callbacks=[rates], max_epochs=4)
    trainer.fit(Regression("timm_cosine", 1, ends=ends), loader())
    assert rates.rates == pytest.approx([expected(step)[group] for step in range(48)], rel=1e-12)
    half = quiet_trainer(max_epochs=4, limit_train_batches=12, callbacks=[StopAfter(2)])
    half.fit(Regression("timm_cosine", 1, ends=ends), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = RatesUsed(group)
    quiet_trainer(callbacks=[again], max_epochs=4).fit(
        Regression("timm_cosine", 1, ends=ends), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert again.rates == rates.rates[24:]


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


@pytest.mark.parametrize(
    ("schedule", "ends", "message"),
    [
        ("timm_cosine", CosineEnds(lr_min=0.1), r"lr_min: 0.1 is outside \[0, lr\) = \[0, 0.1\)"),
        ("timm_cosine", CosineEnds(warmup_lr=-1.0), "warmup_lr: -1.0 is outside"),
        (
            "timm_cosine",
            CosineEnds(lr_noise=[0.9, 0.4]),
            r"lr_noise: \[0.9, 0.4\] is not \[start, end\] with 0 <= start",
        ),
        ("timm_cosine", CosineEnds(lr_noise=[0.5]), r"lr_noise: \[0.5\] is not"),
        (
            "cosine",
            CosineEnds(lr_min=0.01),
            "schedule: 'cosine' has no lr_min, warmup_lr or lr_noise; set schedule: timm",
        ),
    ],
)
def test_ends_of_the_cosine_that_make_no_sense_are_named(schedule, ends, message):
    with pytest.raises(ValueError, match=message):
        check_cosine_ends(schedule, 0.1, ends)


def test_a_run_without_end_has_no_cosine():
    with pytest.raises(
        ValueError, match=r"cosine needs an end of training; set trainer.max_epochs or trainer.max_steps"
    ):
        rates_of(Regression(), max_epochs=-1)


def test_linear_scaling_to_the_global_batch():
    assert rates_of(Regression("constant", 0, 256), batch_size=8)[0] == pytest.approx(0.1 * 8 / 256)
    used = rates_of(Regression("constant", 0, 256), batch_size=8, accumulate_grad_batches=3)
    assert used[0] == pytest.approx(0.1 * 24 / 256)


def test_scaling_goes_by_the_first_of_several_streams():
    class TwoStreams(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["labeled"], batch_idx)

    streams = CombinedLoader({"labeled": loader(24, 6), "unlabeled": loader(24, 2)}, "max_size_cycle")
    rates = RatesUsed()
    quiet_trainer(callbacks=[rates], accumulate_grad_batches=2).fit(TwoStreams("constant", 0, 256), streams)
    assert rates.rates[0] == pytest.approx(0.1 * 6 * 2 / 256)


def test_epoch_poly_is_its_formula():
    """PRCL section 6: max(lr (1 - e / 200) ** 0.9, 1e-6)."""
    lr = 3.2e-3
    for epoch in (0, 1, 57, 100, 199):
        expected = max(lr * math.exp(0.9 * math.log(1 - epoch / 200)), 1e-6)
        assert lr * epoch_poly(epoch, 200, 1e-6 / lr) == pytest.approx(expected, rel=1e-9)
    assert lr * epoch_poly(100, 200) == pytest.approx(1.7148e-3, rel=1e-4)
    assert [epoch_poly(epoch, 200, 0.25) for epoch in (195, 200, 300)] == [0.25, 0.25, 0.25]
    assert [epoch_poly(epoch, 200) for epoch in (200, 300)] == [0.0, 0.0]
    assert epoch_poly(7, math.inf) == 1.0, "a run without end keeps its rate"


def test_scaling_needs_a_batch_size():
    module = Regression("constant", 0, 256)
    with pytest.raises(ValueError, match="the loader tells no batch size; set lr_reference_batch: null"):
        quiet_trainer().fit(module, DataLoader([(torch.randn(2, 2),)], batch_size=None))


def test_what_is_not_decayed():
    import timm

    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, reg_tokens=1)
    network.blocks[0].mlp.fc1.requires_grad_(False)
    decayed, plain = parameter_groups(network.named_parameters(), 0.3)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    }
    exempt = {names[id(parameter)] for parameter in plain["params"]}
    assert {"pos_embed", "cls_token", "reg_token", "norm.weight", "head.bias", "blocks.0.norm1.weight"} <= exempt
    assert not exempt & {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"}


def test_rate_per_layer():
    import timm

    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2)
    groups = layer_decay_groups(network, 0.05, 1e-3, 0.5)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    rates = {name: rate[id(parameter)] for name, parameter in network.named_parameters()}
    assert rates["head.weight"] == pytest.approx(1e-3)
    assert rates["blocks.1.attn.qkv.weight"] == rates["norm.weight"] == pytest.approx(0.5e-3)
    assert rates["blocks.0.mlp.fc1.bias"] == pytest.approx(0.25e-3)
    assert rates["patch_embed.proj.weight"] == rates["cls_token"] == pytest.approx(0.125e-3)
    assert decay[id(network.cls_token)] == decay[id(network.pos_embed)] == decay[id(network.norm.weight)] == 0
    assert decay[id(network.head.weight)] == 0.05


def test_optimizers_by_name():
    groups = parameter_groups(nn.Linear(3, 2).named_parameters(), 0.1)
    adamw = build_optimizer(groups, "adamw", 1e-3, betas=(0.8, 0.95), momentum=0.9)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.95)
    assert build_optimizer(groups, "sgd", 1e-3, betas=(0.9, 0.999), momentum=0.7).defaults["momentum"] == 0.7
    with pytest.raises(ValueError, match="optimizer: 'adam' is unknown; expected adamw, sgd or lars"):
        build_optimizer(groups, "adam", 1e-3, betas=(0.9, 0.999), momentum=0.9)


def test_lars_adapts_weights_and_not_biases():
    layer = nn.Linear(3, 2, dtype=torch.float64)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    groups = parameter_groups(layer.named_parameters(), 0.1)
    optimizer = build_optimizer(groups, "lars", 0.5, betas=(0.9, 0.999), momentum=0.9)
    gradient = torch.randn(2, 3, dtype=torch.float64)
    layer.weight.grad, layer.bias.grad = gradient.clone(), torch.ones(2, dtype=torch.float64)
    optimizer.step()
    trust = 0.001 * weight.norm() / (gradient.norm() + 0.1 * weight.norm() + 1e-8)
    assert torch.allclose(layer.weight, weight - 0.5 * trust * (gradient + 0.1 * weight), atol=1e-12)
    assert torch.allclose(layer.bias, bias - 0.5, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.1, None, None), "lr: 0.0 is not positive"),
        ((1.0, -0.1, None, None), "weight_decay: -0.1 is negative; expected >= 0"),
        ((1.0, 0.1, -1, None), "warmup_epochs: -1 is negative"),
        ((1.0, 0.1, None, 0), "lr_reference_batch: 0 is below 1"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        check_optimization(*values)
