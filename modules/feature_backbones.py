"""Feature pyramids for dense prediction: any timm model by name, with weights from a file."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modules.encoders import require_timm_model
from modules.pretrained_weights import load_weights, network_weights, read_weights
from modules.quantization.attachment import float_names

FULL_STRIDE = 32
BODY = "body."


class FeatureBackbone(nn.Module):
    """A timm model that returns the maps of some of its stages.

    Args:
        name: timm model name.
        out_indices: which stages, in the numbering of timm's ``feature_info``.
        in_channels: channels of the input.
        output_stride: 32, or 8 or 16 for a model that can keep its last maps larger by dilation.
        frozen_stages: the first so many stages keep their weights (and the statistics of their norms).
        norm_eval: the running statistics of every BatchNorm stay as they are loaded.
        options: further arguments of the timm model.

    Attributes:
        channels: width of each map.
        reductions: stride of each map.

    Raises:
        ValueError: for an unknown name, an index the model does not have, or an output stride that it cannot have.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int],
        in_channels: int = 3,
        output_stride: int = FULL_STRIDE,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.out_indices = name, tuple(out_indices)
        self.in_channels, self.output_stride = in_channels, output_stride
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.options = dict(options or {})
        self.body = self._build()
        self.channels: list[int] = self.body.feature_info.channels()
        self.reductions: list[int] = self.body.feature_info.reduction()
        self._frozen = self._freeze()
        self.train()  # a trainer that finds a module in training mode does not call this

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of the chosen stages, each (B, channels[i], ceil(H / reductions[i]), ceil(W / reductions[i]))."""
        return self.body(images)

    def train(self, mode: bool = True) -> "FeatureBackbone":
        """Frozen stages, and with ``norm_eval`` all batch statistics, stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            self.body.get_submodule(name).eval()
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def load_pretrained(self, path: str | Path) -> None:
        """Take the weights of a file: a checkpoint of this suite, a timm state dictionary, a released file.

        In a checkpoint of dense prediction the backbone is a pyramid as well, without the last layers of the model.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if it does not fit, naming the first tensors that differ.
        """
        import timm
        from safetensors.torch import save_file

        pyramid = _part_of(read_weights(path)[0], float_names(self.body.state_dict()))
        if pyramid is not None:
            self.body.load_state_dict(pyramid)
            return
        full = timm.create_model(self.name, in_chans=self.in_channels, **self.options)
        load_weights(full, network_weights(path, full))
        # timm renames the parts of a model that it turns into a pyramid, and does so for weights as well.
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "weights.safetensors")
            save_file({key: value.contiguous() for key, value in full.state_dict().items()}, file)
            loaded = self._build(pretrained=True, pretrained_cfg_overlay={"file": file})
        self.body.load_state_dict(loaded.state_dict())

    def _build(self, **arguments: Any) -> nn.Module:
        import timm

        require_timm_model(self.name, "backbone")
        if self.output_stride != FULL_STRIDE:
            arguments["output_stride"] = self.output_stride
        try:
            return timm.create_model(
                self.name,
                features_only=True,
                out_indices=self.out_indices,
                in_chans=self.in_channels,
                **{"pretrained": False, **self.options, **arguments},
            )
        except (AssertionError, IndexError) as error:
            raise ValueError(
                f"backbone: {self.name} has no stages {self.out_indices} with output_stride {self.output_stride}: "
                f"{error}"
            ) from error
        except (NotImplementedError, TypeError) as error:
            raise ValueError(
                f"backbone: {self.name} cannot be built with output_stride {self.output_stride} and "
                f"{self.options or 'no options'}: {error}"
            ) from error

    def _freeze(self) -> list[str]:
        """Stop the gradients of the first stages and return the names of their modules.

        Names, since a conversion to norms with statistics over all processes puts others in the place of some modules.
        """
        if not self.frozen_stages:
            return []
        names = [info["module"] for info in self.body.feature_info.info]
        if not 0 < self.frozen_stages <= len(names):
            raise ValueError(f"frozen_stages: {self.frozen_stages}, but {self.name} has {len(names)} stages")
        frozen: list[str] = []
        if not _collect_until(self.body, names[self.frozen_stages - 1].replace("_", "."), "", frozen):
            raise ValueError(f"frozen_stages: the stages of {self.name} cannot be told apart; use frozen_stages: 0")
        for name in frozen:
            self.body.get_submodule(name).requires_grad_(False)
        return frozen


def indices_of_reductions(
    name: str, strides: Sequence[int], in_channels: int = 3, options: dict[str, Any] | None = None
) -> list[int]:
    """Stages of a timm model, in the numbering of its ``feature_info``, whose maps have the given strides.

    Of several stages with one stride the last counts.

    Args:
        name: timm model name.
        strides: of the maps, without dilation.
        in_channels: channels of the input.
        options: further arguments of the timm model.

    Raises:
        ValueError: for an unknown name or a model without such a map.
    """
    import timm

    require_timm_model(name, "backbone")
    with torch.device("meta"):
        model = timm.create_model(
            name, features_only=True, in_chans=in_channels, **{"pretrained": False, **(options or {})}
        )
    reductions = dict(zip(model.feature_info.reduction(), model.feature_info.out_indices, strict=True))
    missing = [stride for stride in strides if stride not in reductions]
    if missing:
        raise ValueError(f"backbone: {name} has no map of stride {missing[0]}, only {', '.join(map(str, reductions))}")
    return [reductions[stride] for stride in strides]


def _part_of(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors below some ``...body.`` that have all names and shapes of a pyramid; None if there are none."""
    first = next(iter(wanted))
    for prefix in (key.removesuffix(first) for key in tensors if key.endswith(f"{BODY}{first}")):
        part = {name: tensors.get(f"{prefix}{name}") for name in wanted}
        if all(value is not None and value.shape == wanted[name].shape for name, value in part.items()):
            return part
    return None


def _collect_until(parent: nn.Module, last: str, prefix: str, found: list[str]) -> bool:
    """Gather names of modules in the order they run, up to ``last``; timm flattens some ``a.b`` to ``a_b``."""
    for name, child in parent.named_children():
        path = f"{prefix}{name}"
        dotted = path.replace("_", ".")
        if last.startswith(f"{dotted}."):
            if _collect_until(child, last, f"{path}.", found):
                return True
            continue
        found.append(path)
        if dotted == last:
            return True
    return False
