"""Makes sure that what is frozen stays as it was."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class FrozenParameters(Callback):
    """Compares parts of a module bit for bit before and after training, and keeps them out of the optimizers.

    Args:
        parts: attribute paths of submodules.

    Raises:
        RuntimeError: as soon as a frozen parameter is found in an optimizer, or after training has changed one.

    Example::

        Trainer(callbacks=[FrozenParameters(["tables"])]).fit(module, datamodule=data)
    """

    def __init__(self, parts: list[str] = ("tables",)) -> None:
        self.parts = list(parts)
        self._before: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the values, and look for them in the optimizers."""
        optimized = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        for name, tensor in self._tensors(pl_module).items():
            if id(tensor) in optimized or tensor.requires_grad:
                raise RuntimeError(f"FrozenParameters: {name} is trained; freeze it, or leave it out of 'parts'")
        self._before = {name: tensor.detach().clone() for name, tensor in self._tensors(pl_module).items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare."""
        for name, tensor in self._tensors(pl_module).items():
            if not torch.equal(tensor.detach().to(self._before[name].device), self._before[name]):
                raise RuntimeError(f"FrozenParameters: {name} changed in training")
        self._before = {}

    def _tensors(self, module: LightningModule) -> dict[str, torch.Tensor]:
        return {
            f"{part}.{name}": tensor
            for part in self.parts
            for name, tensor in [
                *module.get_submodule(part).named_parameters(),
                *module.get_submodule(part).named_buffers(),
            ]
        }
