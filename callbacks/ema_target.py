"""A target (teacher) network that follows an online (student) network as an exponential moving average."""

import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

Schedule = Literal["cosine", "constant", "warmup"]
BufferRule = Literal["keep", "copy", "ema"]


def ema_momentum(step: int, total_steps: int | None, momentum: float, schedule: Schedule) -> float:
    """Weight of the old target in the update that follows optimizer step number ``step``.

    Args:
        step: index of the optimizer step, from 0.
        total_steps: optimizer steps of the whole run (K); used by ``cosine`` only.
        momentum: tau_0 of ``cosine``; the value of ``constant``; the final value of ``warmup``.
        schedule: ``cosine``: 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2, rising from tau_0 to 1;
            ``constant``: tau_0; ``warmup``: min(1 - 1 / (k + 1), tau_0), so that update 0 copies the online network.

    Returns:
        tau_k in [0, 1].

    Source: Grill et al., "Bootstrap Your Own Latent" (2020), section 3.2 (cosine); Tarvainen and Valpola,
    "Mean teachers" (2017), reference implementation (warmup).
    """
    if schedule == "constant":
        return momentum
    if schedule == "warmup":
        return min(1.0 - 1.0 / (step + 1), momentum)
    if not total_steps:
        raise ValueError("schedule 'cosine' needs total_steps, the number of optimizer steps of the whole run")
    progress = min(step / total_steps, 1.0)
    return 1.0 - (1.0 - momentum) * (math.cos(math.pi * progress) + 1.0) / 2.0


class MovingAverage:
    """Moves the parameters of one module towards those of another, all tensors in one fused call.

    The lists of tensors are read once. Parameters in half precision are averaged in float32 copies, because a step
    of (1 - tau) of the distance is below the resolution of bfloat16 for the usual tau.

    Args:
        online: the module that is followed.
        target: the module that is moved; same parameter names and shapes as ``online``, no tensor in common.
        buffers: ``keep`` leaves the buffers of ``target`` alone (its BatchNorm layers keep their own statistics),
            ``copy`` takes over those of ``online`` at each update, ``ema`` averages the floating-point ones like
            parameters and copies the others.

    Raises:
        ValueError: if the two modules do not match or share a tensor.
    """

    def __init__(self, online: nn.Module, target: nn.Module, buffers: BufferRule = "keep") -> None:
        check_same_structure(online, target, with_buffers=buffers != "keep")
        online_tensors, target_tensors = _named(online.named_parameters()), _named(target.named_parameters())
        self._copied: list[tuple[Tensor, Tensor]] = []
        if buffers != "keep":
            online_buffers = _named(online.named_buffers())
            for name, buffer in _named(target.named_buffers()).items():
                if buffers == "ema" and buffer.is_floating_point():
                    online_tensors[name], target_tensors[name] = online_buffers[name], buffer
                else:
                    self._copied.append((buffer, online_buffers[name]))
        self._names = list(target_tensors)
        self._online = [online_tensors[name].detach() for name in self._names]
        self._target = [target_tensors[name].detach() for name in self._names]
        self._average = [_full_precision(tensor) for tensor in self._target]
        self._rounded = [i for i, tensor in enumerate(self._target) if self._average[i] is not tensor]
        self._converted = any(o.dtype != a.dtype for o, a in zip(self._online, self._average, strict=True))

    @torch.no_grad()
    def update(self, tau: float) -> None:
        """Set every target tensor to ``tau * target + (1 - tau) * online``, in place."""
        online = self._online
        if self._converted:
            online = [o.to(a.dtype) for o, a in zip(self._online, self._average, strict=True)]
        torch._foreach_lerp_(self._average, online, 1.0 - tau)
        for i in self._rounded:
            self._target[i].copy_(self._average[i])
        for buffer, source in self._copied:
            buffer.copy_(source)

    def full_precision(self) -> dict[str, Tensor]:
        """Float32 averages of the tensors that the module holds in half precision, by name; empty without such."""
        return {self._names[i]: self._average[i] for i in self._rounded}

    @torch.no_grad()
    def load_full_precision(self, averages: dict[str, Tensor]) -> None:
        """Take over the float32 averages that :meth:`full_precision` returned in an earlier run."""
        for i in self._rounded:
            if self._names[i] in averages:
                self._average[i].copy_(averages[self._names[i]])


class EMATarget(Callback):
    """Moves ``target`` towards ``online`` once per optimizer step: target <- tau_k target + (1 - tau_k) online.

    The two modules are named by attribute paths, so any LightningModule will do. The module itself only builds
    them; gradient accumulation, resuming and precision are taken care of here: the momentum is a function of
    ``trainer.global_step``, nothing is done after a batch without optimizer step, and half-precision parameters are
    averaged in float32. The target's parameters stop requiring gradients before optimizers and DDP see them.
    With several optimizers under manual optimization, the target moves once per batch in which any of them stepped.

    Args:
        online: attribute path of the followed module, for example ``student`` or ``model.online``.
        target: attribute path of the moved module; same parameter names and shapes, usually a ``copy.deepcopy``.
        momentum: tau_0 in [0, 1); the memory is about ``1 / (1 - tau_0)`` steps, which must be well below the
            length of the run: 0.99 for less than 5000 steps.
        schedule: ``cosine`` from tau_0 to 1 over the run, ``constant``, or ``warmup`` = min(1 - 1/(k+1), tau_0).
        buffers: ``keep``, ``copy`` or ``ema``, see :class:`MovingAverage`.
        initialize: start a new run (not a resumed one) with the target equal to the online network.
        log_as: name under which tau is logged at each step; None logs nothing.

    Raises:
        ValueError: for an argument out of its range, and in ``setup`` if the two modules do not match.

    Source: Grill et al., "Bootstrap Your Own Latent" (2020).

    Example::

        class Siamese(LightningModule):
            def __init__(self):
                super().__init__()
                self.student = nn.Linear(8, 4)
                self.teacher = copy.deepcopy(self.student)
            ...

        Trainer(callbacks=[EMATarget("student", "teacher", momentum=0.99)]).fit(Siamese(), loader)
    """

    def __init__(
        self,
        online: str,
        target: str,
        momentum: float = 0.996,
        schedule: Schedule = "cosine",
        buffers: BufferRule = "keep",
        initialize: bool = True,
        log_as: str | None = "train/tau",
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"EMATarget: momentum is {momentum}, expected a number in [0, 1)")
        for field, value, allowed in (("schedule", schedule, Schedule), ("buffers", buffers, BufferRule)):
            if value not in get_args(allowed):
                raise ValueError(f"EMATarget: {field} is {value!r}, expected one of {', '.join(get_args(allowed))}")
        if online == target:
            raise ValueError(f"EMATarget: online and target are both {online!r}, expected two different modules")
        self.online = online
        self.target = target
        self.momentum = momentum
        self.schedule: Schedule = schedule
        self.buffers: BufferRule = buffers
        self.initialize = initialize
        self.log_as = log_as
        self._average: MovingAverage | None = None
        self._updated_at: int | None = None
        self._total_steps: int | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Two instances for two pairs of modules keep separate states."""
        return self._generate_state_key(online=self.online, target=self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the pair of modules and exclude the target from training, before optimizers are built."""
        if stage != "fit":
            return
        online, target = self._modules(pl_module)
        try:
            check_same_structure(online, target, with_buffers=self.buffers != "keep")
        except ValueError as error:
            raise ValueError(f"EMATarget(online={self.online!r}, target={self.target!r}): {error}") from None
        target.requires_grad_(False)
        self._average = self._updated_at = self._total_steps = self._restored = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the tensors where training will find them; a new run starts with target = online."""
        online, target = self._modules(pl_module)
        if self.initialize and self._restored is None and trainer.ckpt_path is None and trainer.global_step == 0:
            self._copy_online(online, target)
        self._average = MovingAverage(online, target, self.buffers)
        if self._restored is not None:
            self._average.load_full_precision(self._restored["full_precision"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the length of the schedule; make up for an update that an interrupted run could not do."""
        if self.schedule == "cosine":
            self._total_steps = self._steps_of_run(trainer)
            before = self._restored and self._restored["total_steps"]
            if before and before != self._total_steps:
                rank_zero_warn(
                    f"EMATarget: the run now has {self._total_steps} optimizer steps, it had {before} when the "
                    f"checkpoint was written, so tau jumps to another cosine. Keep max_epochs, max_steps, "
                    f"accumulate_grad_batches and the batch size when resuming, or use schedule='constant'."
                )
        self._updated_at = trainer.global_step
        if self._restored and self._restored["updated_at"] is not None:
            self._updated_at = min(self._restored["updated_at"], trainer.global_step)
            self._follow(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the target if this batch ended with an optimizer step."""
        tau = self._follow(trainer)
        if tau is not None and self.log_as:
            pl_module.log(self.log_as, tau)

    def state_dict(self) -> dict[str, Any]:
        """Step of the last update, length of the schedule, and float32 averages of half-precision parameters."""
        return {
            "updated_at": self._updated_at,
            "total_steps": self._total_steps,
            "full_precision": self._average.full_precision() if self._average else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state of the interrupted run; it is used once the tensors are in place."""
        self._restored = dict(state_dict)

    def _follow(self, trainer: Trainer) -> float | None:
        step = trainer.global_step
        if self._average is None or step == self._updated_at:
            return None
        tau = ema_momentum(step - 1, self._total_steps, self.momentum, self.schedule)
        self._average.update(tau)
        self._updated_at = step
        return tau

    def _modules(self, pl_module: LightningModule) -> tuple[nn.Module, nn.Module]:
        found = []
        for field, path in (("online", self.online), ("target", self.target)):
            try:
                found.append(pl_module.get_submodule(path))
            except AttributeError:
                children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
                raise ValueError(
                    f"EMATarget: {field}={path!r} is no module of {type(pl_module).__name__} as it is configured. "
                    "Leave the callback out (--callbacks.<its name> null) if the method needs none, or build the "
                    f"module in __init__ and give its attribute path. Its children are: {children}"
                ) from None
        return found[0], found[1]

    def _copy_online(self, online: nn.Module, target: nn.Module) -> None:
        source = _named(online.named_parameters())
        with torch.no_grad():
            changed = [n for n, p in _named(target.named_parameters()).items() if not torch.equal(p, source[n].to(p))]
            target.load_state_dict({**target.state_dict(), **_matching_state(online, target)})
        if changed:
            rank_zero_info(
                f"EMATarget: {self.target!r} differed from {self.online!r} in {len(changed)} tensors "
                f"and now starts as its copy (initialize=False keeps it)."
            )

    def _steps_of_run(self, trainer: Trainer) -> int:
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError(
                "EMATarget: schedule='cosine' needs the length of the run, but the trainer has none; "
                "set max_steps, or max_epochs with a loader of known length, or use schedule='constant'"
            )
        return int(steps)


def check_same_structure(online: nn.Module, target: nn.Module, with_buffers: bool = False) -> None:
    """Raise unless the two modules have the same parameters (and buffers) by name and shape, and share none.

    Raises:
        ValueError: naming the first tensors that differ or are shared.
    """
    kinds = [("parameter", online.named_parameters(), target.named_parameters())]
    if with_buffers:
        kinds.append(("buffer", online.named_buffers(), target.named_buffers()))
    for kind, online_items, target_items in kinds:
        ours, theirs = _named(online_items), _named(target_items)
        if not ours and kind == "parameter":
            raise ValueError("the online module has no parameters, so there is nothing to follow")
        for where, missing in (("target", ours.keys() - theirs.keys()), ("online", theirs.keys() - ours.keys())):
            if missing:
                raise ValueError(
                    f"{len(missing)} {kind}s are missing in the {where} module, first {_first(missing)}; "
                    f"build the target with copy.deepcopy(online)"
                )
        shapes = {
            f"{n} {tuple(ours[n].shape)} vs {tuple(theirs[n].shape)}" for n in ours if ours[n].shape != theirs[n].shape
        }
        if shapes:
            raise ValueError(f"{len(shapes)} {kind}s differ in shape (online vs target), first {_first(shapes)}")
        shared = {name for name in ours if ours[name] is theirs[name]}
        if shared:
            raise ValueError(
                f"{len(shared)} {kind}s are shared by both modules, first {_first(shared)}; "
                f"build the target with copy.deepcopy(online)"
            )


def _named(items: Any) -> dict[str, Tensor]:
    # torch.compile wraps a module and puts its own name into those of the parameters
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in items}


def _matching_state(online: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    values = {name.replace("_orig_mod.", ""): value for name, value in online.state_dict().items()}
    names = {name.replace("_orig_mod.", ""): name for name in target.state_dict()}
    return {names[name]: value for name, value in values.items() if name in names}


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _first(names: set[str], count: int = 3) -> str:
    return ", ".join(sorted(names)[:count])
