"""Optimizers and learning-rate schedules, as functions of a LightningModule and its trainer."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerName = Literal["adamw", "sgd", "lars"]
ScheduleName = Literal["cosine", "constant", "timm_cosine", "poly"]

NEVER_DECAYED = ("pos_embed", "cls_token", "reg_token", "dist_token")
WARMUP_SHARE = 0.1
POLY_POWER = 0.9
MAX_WARMUP_EPOCHS = 40
EPOCH_COSINE_WARMUP_START = 0.001
LR_NOISE_PERCENT, LR_NOISE_STD, LR_NOISE_SEED = 0.67, 1.0, 42


class CosineEnds(NamedTuple):
    """What the schedule ``timm_cosine`` needs besides peak rates and lengths.

    Args:
        lr_min: learning rate that the cosine falls to.
        warmup_lr: learning rate of the first step of the warm-up.
        lr_noise: start and end of a share of the run in which the rate is multiplied by 1 + noise; None for none.
    """

    lr_min: float = 0.0
    warmup_lr: float = 0.0
    lr_noise: Sequence[float] | None = None


def parameter_groups(named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed and not decayed ones.

    Biases, normalisation weights (all that have at most one axis), position embeddings and class tokens are exempt.

    Args:
        named_parameters: as ``module.named_parameters()`` gives them; those without gradient are left out.
        weight_decay: of the decayed group.

    Returns:
        Groups for a torch optimizer; a group without parameters is left out.
    """
    return _split_by_decay(
        named_parameters,
        weight_decay,
        lambda name, parameter: parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NEVER_DECAYED,
    )


def groups_by_name(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float, exempt: str = "norm"
) -> list[dict[str, Any]]:
    """Split trainable parameters by their names; biases and norms that are called otherwise are decayed too.

    Args:
        named_parameters: as ``module.named_parameters()`` gives them; those without gradient are left out.
        weight_decay: of the decayed group.
        exempt: parameters with this in their name are not decayed (EMO, official runs of dense prediction).

    Returns:
        Groups for a torch optimizer; a group without parameters is left out.
    """
    return _split_by_decay(named_parameters, weight_decay, lambda name, _: exempt in name)


def _split_by_decay(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float, is_exempt: Callable[[str, Tensor], bool]
) -> list[dict[str, Any]]:
    decayed, plain = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (plain if is_exempt(name, parameter) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def layer_decay_groups(network: nn.Module, weight_decay: float, lr: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups whose learning rate falls by a factor per layer, from the head down to the stem (ELECTRA, BEiT).

    Args:
        network: a timm model.
        weight_decay: of the decayed groups.
        lr: learning rate of the head.
        layer_decay: factor per layer in (0, 1].

    Returns:
        Groups for a torch optimizer, each with its own ``lr``.
    """
    from timm.optim import param_groups_layer_decay

    exempt = network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()
    groups = param_groups_layer_decay(network, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    keys = ("params", "weight_decay")
    return [{key: group[key] for key in keys} | {"lr": lr * group["lr_scale"]} for group in groups]


def build_optimizer(
    groups: list[dict[str, Any]], name: OptimizerName, lr: float, *, betas: tuple[float, float], momentum: float
) -> Optimizer:
    """AdamW, SGD with momentum, or LARS (timm's; groups without decay are not adapted either, as in BYOL).

    Args:
        groups: parameter groups.
        name: which optimizer.
        lr: peak learning rate of groups that bring none.
        betas: of AdamW.
        momentum: of SGD and LARS.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "lars":
        from timm.optim import Lars

        return Lars(groups, lr=lr, momentum=momentum)
    raise ValueError(f"optimizer: {name!r} is unknown; expected adamw, sgd or lars")


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the peak learning rate: linear rise, then half a cosine to zero.

    Args:
        step: optimizer step, counted from 0.
        warmup_steps: W; steps 0..W-1 have the factors 1/W..1.
        total_steps: K; the factor reaches 0 at step K, which is never taken.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_poly(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the peak learning rate: linear rise, then ``(1 - progress) ** 0.9`` (the schedule of DeepLab).

    Args:
        step: optimizer step, counted from 0.
        warmup_steps: W; steps 0..W-1 have the factors 1/W..1.
        total_steps: K; the factor reaches 0 at step K, which is never taken.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return (1.0 - progress) ** POLY_POWER


DECAYS = {"cosine": warmup_cosine, "poly": warmup_poly}


def warmup_constant(step: int, warmup_steps: int) -> float:
    """Factor of the peak learning rate: linear rise, then 1."""
    return min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0


def epoch_cosine(step: int, steps_per_epoch: int, epochs: int, warmup_steps: int) -> float:
    """Factor of the peak learning rate: half a cosine to zero in steps of an epoch, under a linear warm-up.

    During the warm-up the factor of the epoch is multiplied by a line from 0.001 to 1 (the schedule of detection
    recipes, EMO section 6).

    Args:
        step: optimizer step, counted from 0.
        steps_per_epoch: optimizer steps of an epoch.
        epochs: T; epoch t has the factor (1 + cos(pi t / T)) / 2.
        warmup_steps: W; step t < W has 0.001 + 0.999 t / W of that.
    """
    factor = 0.5 * (1.0 + math.cos(math.pi * min(step // steps_per_epoch / epochs, 1.0)))
    if step >= warmup_steps:
        return factor
    return factor * (EPOCH_COSINE_WARMUP_START + (1.0 - EPOCH_COSINE_WARMUP_START) * step / warmup_steps)


def timm_cosine(
    peaks: Sequence[float], warmup_steps: int, total_steps: int, ends: CosineEnds
) -> Callable[[int], list[float]]:
    """Learning rates of timm's ``CosineLRScheduler`` as a function of the step alone.

    ``warmup_lr + t (lr - warmup_lr) / W`` for ``t < W``, then ``lr_min + 1/2 (lr - lr_min) (1 + cos(pi t / T))``: the
    cosine counts from t = 0, so that the rate drops at the end of the warm-up (EMO, official recipe). The noise is a
    truncated normal whose seed is 42 + t.

    Args:
        peaks: learning rate of each parameter group.
        warmup_steps: W.
        total_steps: T.
        ends: see :class:`CosineEnds`.

    Returns:
        Function of the optimizer step, counted from 0, that gives the rate of each group.
    """
    from timm.scheduler import CosineLRScheduler

    # timm writes rates into an optimizer: one that stands for the parameter groups, so that the real one is left alone.
    stand_in = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": peak} for peak in peaks], lr=peaks[0])
    noise = None if ends.lr_noise is None else [share * total_steps for share in ends.lr_noise]
    scheduler = CosineLRScheduler(
        stand_in,
        t_initial=total_steps,
        lr_min=ends.lr_min,
        warmup_t=warmup_steps,
        warmup_lr_init=ends.warmup_lr,
        cycle_limit=1,
        t_in_epochs=False,
        noise_range_t=noise,
        noise_pct=LR_NOISE_PERCENT,
        noise_std=LR_NOISE_STD,
        noise_seed=LR_NOISE_SEED,
    )

    def rates(step: int) -> list[float]:
        scheduler.step_update(step)
        return [group["lr"] for group in stand_in.param_groups]

    return rates


def epoch_poly(epoch: int, epochs: int, floor: float = 0.0) -> float:
    """Factor of the peak learning rate: ``(1 - epoch / epochs) ** 0.9``, at least ``floor`` (PRCL section 6)."""
    return max((1.0 - min(epoch / epochs, 1.0)) ** POLY_POWER, floor)


def total_steps_of(trainer: Trainer, schedule: str) -> int:
    """Optimizer steps of the whole run.

    Args:
        trainer: knows the length of the run.
        schedule: what asks, for the message.

    Raises:
        ValueError: if the run has no end.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise ValueError(f"schedule: {schedule} needs an end of training; set trainer.max_epochs or trainer.max_steps")
    return int(steps)


def steps_per_epoch(trainer: Trainer) -> float:
    """Optimizer steps of an epoch, infinite for a stream; the last accumulation of an epoch may be shorter."""
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf


def warmup_steps_of(trainer: Trainer, warmup_epochs: float | None, total_steps: int) -> int:
    """Optimizer steps of the warm-up: the epochs asked for, otherwise a tenth of the run and at most 40 epochs."""
    per_epoch = steps_per_epoch(trainer)
    if warmup_epochs is not None:
        return round(min(warmup_epochs * per_epoch, total_steps)) if warmup_epochs else 0
    return round(min(WARMUP_SHARE * total_steps, MAX_WARMUP_EPOCHS * per_epoch))


def global_batch_size(trainer: Trainer) -> int:
    """Images per optimizer step over all processes and accumulated batches.

    Raises:
        ValueError: if the loader does not tell its batch size.
    """
    loader = CombinedLoader(trainer.train_dataloader).flattened[0]  # an epoch is counted by the first of several
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if size is None:
        raise ValueError(
            "lr_reference_batch: the loader tells no batch size; set lr_reference_batch: null and the final lr"
        )
    return size * trainer.world_size * trainer.accumulate_grad_batches


def scaled_lr(trainer: Trainer, lr: float, reference_batch: int | None) -> float:
    """Linear scaling rule: ``lr * global batch / reference_batch``; ``lr`` itself without a reference."""
    if reference_batch is None:
        return lr
    trainer.fit_loop.setup_data()
    return lr * global_batch_size(trainer) / reference_batch


def with_schedule(
    module: LightningModule,
    optimizer: Optimizer,
    schedule: ScheduleName,
    warmup_epochs: float | None,
    ends: CosineEnds | None = None,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: the optimizer with a schedule that steps once per optimizer step.

    Args:
        module: attached to a trainer, which knows the length of the run.
        optimizer: its learning rates are the peaks.
        schedule: after the warm-up, a cosine or a polynomial to zero, or constant; or timm's cosine, see
            :func:`timm_cosine`.
        warmup_epochs: see :func:`warmup_steps_of`.
        ends: of timm's cosine.
    """
    if schedule == "timm_cosine":
        scheduler = _timm_scheduler(module.trainer, optimizer, warmup_epochs, ends or CosineEnds())
    elif schedule in DECAYS:
        total = total_steps_of(module.trainer, schedule)
        warmup = warmup_steps_of(module.trainer, warmup_epochs, total)
        scheduler = LambdaLR(optimizer, lambda step: DECAYS[schedule](step, warmup, total))
    else:
        warmup = round(warmup_epochs * steps_per_epoch(module.trainer)) if warmup_epochs else 0
        scheduler = LambdaLR(optimizer, lambda step: warmup_constant(step, warmup))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def with_epoch_cosine(module: LightningModule, optimizer: Optimizer, warmup_steps: int) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: the optimizer with :func:`epoch_cosine` over the whole run.

    Args:
        module: attached to a trainer, which knows the length of the run.
        optimizer: its learning rates are the peaks.
        warmup_steps: optimizer steps of the warm-up.
    """
    total = total_steps_of(module.trainer, "cosine")
    per_epoch = int(min(steps_per_epoch(module.trainer), total))
    epochs = math.ceil(total / per_epoch)
    scheduler = LambdaLR(optimizer, lambda step: epoch_cosine(step, per_epoch, epochs, warmup_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _timm_scheduler(trainer: Trainer, optimizer: Optimizer, warmup_epochs: float | None, ends: CosineEnds) -> LambdaLR:
    total = total_steps_of(trainer, "timm_cosine")
    warmup = warmup_steps_of(trainer, warmup_epochs, total)
    peaks = [group["lr"] for group in optimizer.param_groups]
    rates = lru_cache(maxsize=1)(timm_cosine(peaks, warmup, total, ends))  # asked once for each group

    def factor(group: int) -> Callable[[int], float]:
        return lambda step: rates(step)[group] / peaks[group]

    return LambdaLR(optimizer, [factor(group) for group in range(len(peaks))])


def check_cosine_ends(schedule: ScheduleName, lr: float, ends: CosineEnds) -> None:
    """Raise a ValueError that names the field and its value where the ends do not fit the schedule."""
    for field in ("lr_min", "warmup_lr"):
        if not 0 <= getattr(ends, field) < lr:
            raise ValueError(f"{field}: {getattr(ends, field)} is outside [0, lr) = [0, {lr})")
    noise = ends.lr_noise
    if noise is not None and not (len(noise) == 2 and 0 <= noise[0] < noise[1] <= 1):
        raise ValueError(
            f"lr_noise: {noise} is not [start, end] with 0 <= start < end <= 1 (shares of the run), or null"
        )
    if schedule != "timm_cosine" and ends != CosineEnds():
        raise ValueError(f"schedule: {schedule!r} has no lr_min, warmup_lr or lr_noise; set schedule: timm_cosine")


def check_optimization(
    lr: float, weight_decay: float, warmup_epochs: float | None, lr_reference_batch: int | None
) -> None:
    """Raise a ValueError that names the field, its value and its range."""
    if not lr > 0:
        raise ValueError(f"lr: {lr} is not positive")
    if weight_decay < 0:
        raise ValueError(f"weight_decay: {weight_decay} is negative; expected >= 0")
    if warmup_epochs is not None and warmup_epochs < 0:
        raise ValueError(f"warmup_epochs: {warmup_epochs} is negative; expected >= 0, or null for a tenth of the run")
    if lr_reference_batch is not None and lr_reference_batch < 1:
        raise ValueError(f"lr_reference_batch: {lr_reference_batch} is below 1; expected a batch size, or null")
