"""One file of detections in COCO's format, and pictures with the boxes."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from callbacks.atomic_files import atomic_text, atomic_write


class DetectionWriter(Callback):
    """Writes what a detector's ``predict_step`` returns into one file of COCO results, each image once, in order.

    ``predict_step`` returns a mapping with ``index`` (B,), the row of each image in its split, and ``detections``: for
    each image ``boxes`` (n, 4) xyxy in pixels of the picture on disk, ``labels`` (n,) from 1 and ``scores`` (n,). Rank
    zero writes the file once all is done, complete or not at all. The datamodule has

    - ``coco_results(index, detections) -> list[dict]``: entries ``image_id``, ``category_id``, ``bbox`` (x, y, width,
      height) and ``score``;
    - for pictures ``picture(row) -> (3, H, W) uint8``, ``sample_ids(None) -> list[str]`` and ``class_names``.

    Args:
        output: file to write, ending in .json; None for ``detections.json`` in the trainer's ``default_root_dir``.
        pictures: so many of the first pictures are drawn with their boxes, as png in the folder ``detections`` beside
            the file; 0 for none.
        picture_threshold: lowest score of a box that is drawn.

    Raises:
        ValueError: for an argument out of range; in prediction, for outputs that cannot be written.

    Example::

        Trainer(callbacks=[DetectionWriter("answers.json")]).predict(module, datamodule=data, return_predictions=False)
    """

    def __init__(self, output: str | None = None, pictures: int = 20, picture_threshold: float = 0.3) -> None:
        if output is not None and Path(output).suffix != ".json":
            raise ValueError(f"DetectionWriter: output {output!r} does not end in .json")
        if pictures < 0:
            raise ValueError(f"DetectionWriter: pictures is {pictures}, expected 0 or more")
        if not 0 <= picture_threshold < 1:
            raise ValueError(f"DetectionWriter: picture_threshold is {picture_threshold}, expected a score in [0, 1)")
        self.output, self.pictures, self.picture_threshold = output, pictures, picture_threshold
        self._found: dict[int, dict[str, Tensor]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self._found = {}
        if not hasattr(_datamodule(trainer), "coco_results"):
            raise ValueError(
                f"DetectionWriter: the datamodule {type(_datamodule(trainer)).__name__} has no method coco_results; "
                "use datamodules.ObjectDetection, or predict without this callback"
            )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the detections of a batch."""
        if dataloader_idx > 0:
            raise ValueError("DetectionWriter: there are several predict dataloaders; predict one split at a time")
        if not isinstance(outputs, dict) or not {"index", "detections"} <= outputs.keys():
            given = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(
                f"DetectionWriter: predict_step returned {given}, expected a dict with 'index' and 'detections'"
            )
        for row, found in zip(outputs["index"].tolist(), outputs["detections"], strict=True):
            self._found[row] = {key: found[key].detach().cpu() for key in ("boxes", "labels", "scores")}

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the detections of all ranks together and write them."""
        gathered = _gathered(self._found)
        self._found = {}
        if gathered is None:
            return
        if not gathered:
            rank_zero_warn("DetectionWriter: there was nothing to predict, so no file is written")
            return
        rows = sorted(gathered)
        results = _datamodule(trainer).coco_results(rows, [gathered[row] for row in rows])
        path = self.path(trainer)
        atomic_text(path, json.dumps(results))
        for row in rows[: self.pictures]:
            self._draw(_datamodule(trainer), row, gathered[row], path.with_suffix(""))
        rank_zero_info(f"Wrote {len(results)} detections on {len(rows)} images to {path}")

    def path(self, trainer: Trainer) -> Path:
        """File that is written."""
        return Path(self.output) if self.output else Path(trainer.default_root_dir) / "detections.json"

    def _draw(self, data: Any, row: int, found: dict[str, Tensor], folder: Path) -> None:
        from torchvision.transforms.v2.functional import to_pil_image
        from torchvision.utils import draw_bounding_boxes

        picture, kept = data.picture(row), found["scores"] >= self.picture_threshold
        if kept.any():
            names = [data.class_names[label - 1] for label in found["labels"][kept].tolist()]
            texts = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"][kept].tolist(), strict=True)]
            picture = draw_bounding_boxes(picture, found["boxes"][kept], texts, colors="red")
        name = Path(data.sample_ids(None)[row]).stem
        with atomic_write(folder / f"{row:06d}_{name}.png") as file:
            to_pil_image(picture).save(file, format="PNG")


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _gathered(own: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]] | None:
    """What all ranks hold, on rank zero; None on the others."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return own
    ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, ranks, dst=0)
    if ranks is None:
        return None
    return {row: found for rank in ranks for row, found in rank.items()}
