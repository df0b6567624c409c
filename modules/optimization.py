"""Optimizers and learning-rate schedules, as functions of a LightningModule and its trainer."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerName = Literal["adamw", "sgd", "lars"]
ScheduleName = Literal["cosine", "constant"]

NEVER_DECAYED = ("pos_embed", "cls_token", "reg_token", "dist_token")
WARMUP_SHARE = 0.1
MAX_WARMUP_EPOCHS = 40


def parameter_groups(named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed and not decayed ones.

    Biases, normalisation weights (all that have at most one axis), position embeddings and class tokens are exempt.

    Args:
        named_parameters: as ``module.named_parameters()`` gives them; those without gradient are left out.
        weight_decay: of the decayed group.

    Returns:
        Groups for a torch optimizer; a group without parameters is left out.
    """
    decayed, plain = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NEVER_DECAYED
            (plain if exempt else decayed).append(parameter)
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


def warmup_constant(step: int, warmup_steps: int) -> float:
    """Factor of the peak learning rate: linear rise, then 1."""
    return min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0


def total_steps_of(trainer: Trainer) -> int:
    """Optimizer steps of the whole run.

    Raises:
        ValueError: if the run has no end.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise ValueError("schedule: cosine needs an end of training; set trainer.max_epochs or trainer.max_steps")
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
    loader = trainer.train_dataloader
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
    module: LightningModule, optimizer: Optimizer, schedule: ScheduleName, warmup_epochs: float | None
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: the optimizer with a schedule that steps once per optimizer step.

    Args:
        module: attached to a trainer, which knows the length of the run.
        optimizer: its learning rates are the peaks.
        schedule: after the warm-up, a cosine to zero or constant.
        warmup_epochs: see :func:`warmup_steps_of`.
    """
    if schedule == "cosine":
        total = total_steps_of(module.trainer)
        warmup = warmup_steps_of(module.trainer, warmup_epochs, total)
        scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    else:
        warmup = round(warmup_epochs * steps_per_epoch(module.trainer)) if warmup_epochs else 0
        scheduler = LambdaLR(optimizer, lambda step: warmup_constant(step, warmup))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


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
