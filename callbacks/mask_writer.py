"""One picture of class indices per predicted image."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.atomic_files import atomic_bytes


class MaskWriter(Callback):
    """Writes predicted masks as pictures, as soon as a batch is predicted; each process writes those of its own images.

    ``predict_step`` returns a mapping with ``index`` (B,), the row of each sample in its split, and ``masks``, a
    sequence of B class-index masks (H, W). Two files are written for each: ``<id>.png`` with one value per pixel, and
    ``<id>_colour.png`` to look at. Ids come from ``sample_ids(None)`` of the datamodule, else they are the index; an id
    with ``/`` lies in a sub-folder. A datamodule with ``mask_to_file(mask) -> uint8`` says which value stands for a
    class in the files that its own evaluation reads; otherwise it is the index. Colours are ``palette`` of the
    datamodule, else of the module: one (red, green, blue) of 0..255 per class. What is complete stays when prediction
    is interrupted.

    Where the outputs have ``uncertainty``, a map (H, W) in [0, 1] per mask, it becomes ``<id>_uncertainty.png`` (16-bit
    grey, 65535 for 1) and, with ``colour``, ``<id>_uncertainty_colour.png``, stretched from its least to its largest
    value.

    Args:
        output: folder to write to; None for ``masks`` in the trainer's ``default_root_dir``.
        colour: write the pictures to look at as well.

    Raises:
        ValueError: in prediction, for outputs that are no masks, with ``colour`` if there is no palette, and if a file
            would be that of two pictures.

    Example::

        Trainer(callbacks=[MaskWriter("masks")]).predict(module, datamodule=data, return_predictions=False)
    """

    def __init__(self, output: str | None = None, colour: bool = True) -> None:
        self.output = output
        self.colour = colour
        self._ids: Sequence[str] | None = None

    def folder(self, trainer: Trainer) -> Path:
        """Where the files go."""
        return Path(self.output) if self.output else Path(trainer.default_root_dir) / "masks"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the names."""
        sample_ids = getattr(getattr(trainer, "datamodule", None), "sample_ids", None)
        self._ids = sample_ids(None) if sample_ids else None
        if self.colour:
            self._check_names("_colour")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the masks of a batch."""
        if not isinstance(outputs, dict) or not {"index", "masks"} <= outputs.keys():
            given = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(f"MaskWriter: predict_step returned {given}, expected a dict with 'index' and 'masks'")
        if "uncertainty" in outputs and batch_idx == 0:
            self._check_names("_uncertainty", *(["_uncertainty_colour"] if self.colour else []))
        data = getattr(trainer, "datamodule", None)
        to_file = getattr(data, "mask_to_file", _as_bytes)
        palette = self._palette(data, pl_module) if self.colour else None
        for row, mask in zip(outputs["index"].tolist(), outputs["masks"], strict=True):
            classes = mask.cpu().numpy()
            path = self._path(trainer, row)
            atomic_bytes(path, _png(to_file(classes)))
            if palette is not None:
                atomic_bytes(path.with_name(f"{path.stem}_colour.png"), _png(palette[classes]))
        for row, values in zip(outputs["index"].tolist(), outputs.get("uncertainty", ()), strict=False):
            self._write_uncertainty(self._path(trainer, row), values.cpu().numpy())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the files are."""
        rank_zero_info(f"Wrote masks to {self.folder(trainer)}")

    def _check_names(self, *kinds: str) -> None:
        """Refuse two ids of which one's file of these kinds would overwrite the other's mask."""
        known = set(self._ids or ())
        for name in sorted(known):
            for kind in kinds:
                if name + kind in known:
                    raise ValueError(
                        f"MaskWriter: the file {name}{kind}.png would be that of '{name}' and that of '{name}{kind}'; "
                        "rename one of the two pictures"
                    )

    def _path(self, trainer: Trainer, row: int) -> Path:
        name = self._ids[row] if self._ids is not None else str(row)
        return self.folder(trainer) / f"{name}.png"

    def _write_uncertainty(self, path: Path, values: np.ndarray) -> None:
        depth = np.rint(np.clip(values, 0, 1) * np.iinfo(np.uint16).max).astype(np.uint16)
        atomic_bytes(path.with_name(f"{path.stem}_uncertainty.png"), _png(depth))
        if self.colour:
            from matplotlib import colormaps

            spread = max(float(values.max() - values.min()), 1e-12)
            painted = colormaps["inferno"]((values - values.min()) / spread, bytes=True)[..., :3]
            atomic_bytes(path.with_name(f"{path.stem}_uncertainty_colour.png"), _png(np.ascontiguousarray(painted)))

    def _palette(self, data: Any, pl_module: LightningModule) -> np.ndarray:
        colours = getattr(data, "palette", None) or getattr(pl_module, "palette", None)
        if not colours:
            raise ValueError("MaskWriter: neither the data nor the module has a palette; set colour to false")
        return np.asarray(colours, dtype=np.uint8)


def _as_bytes(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
