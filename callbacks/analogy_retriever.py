"""Looks up the analogical objects of all training triples before AnKGE trains, once for a base model and settings."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm.auto import tqdm

from callbacks.atomic_files import atomic_write

FOLDER, CHECKPOINTS = "analogies", "checkpoints"


class AnalogyRetriever(Callback):
    """Fills ``module.neighbours``, from a file where they were looked up before.

    The name of the file is a hash of the base's weights and score function, the triples and the settings, so another
    base model never gets these. Ranks share the triples.

    The module has ``tables`` (frozen embeddings), ``settings`` (:class:`modules.ankge.RetrievalSettings`) and
    ``set_neighbours``; the datamodule has ``train_triples`` (T, 3), rows in the order that batches name in ``index``.

    Args:
        cache: folder of the files; None for ``analogies`` beside the base model's checkpoint (beside the folder
            ``checkpoints`` that holds it), or in the run's folder where the module does not say which that is.
            ``false`` in YAML keeps no file. A folder that cannot be written is told, and keeps none.
        progress: whether to show a progress bar.

    Example::

        Trainer(callbacks=[AnalogyRetriever()]).fit(AnalogicalEmbedding(base="best.ckpt", ...), datamodule=data)
    """

    def __init__(self, cache: str | bool | None = None, progress: bool = True) -> None:
        if cache is True:
            raise ValueError("AnalogyRetriever: cache is a folder, null for the default one, or false for none")
        self.cache, self.progress = cache, progress

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up, or load, on every rank."""
        from modules.ankge.retriever import Neighbours, fingerprint

        # Triples that are worked out when asked for become an array here; tensors are not made of such.
        triples = torch.from_numpy(np.asarray(trainer.datamodule.train_triples))
        settings = self._clipped(pl_module)
        name = fingerprint(pl_module.tables, triples, settings)
        path = self._path(trainer, pl_module, name)
        found = _load(path, len(triples)) if path is not None else None
        if _all_ranks_have(found):
            rank_zero_info(f"AnKGE: analogical objects were looked up before: {path}")
        else:
            found = self._look_up(trainer, pl_module, triples, settings)
            if path is not None and trainer.is_global_zero:
                _save(path, found)
        pl_module.set_neighbours(Neighbours(*found))

    def _clipped(self, module: LightningModule) -> Any:
        tables, asked = module.tables, module.settings
        settings = asked.clipped(len(tables.entities), len(tables.relations))
        for name in ("candidate_entities", "candidate_relations", "entities", "relations", "pairs"):
            if getattr(settings, name) != getattr(asked, name):
                rank_zero_warn(
                    f"AnKGE: {name} is {getattr(asked, name)}, but the graph has only {getattr(settings, name)}"
                )
        return settings

    def _path(self, trainer: Trainer, module: LightningModule, name: str) -> Path | None:
        if self.cache is False:
            return None
        base = getattr(module.hparams, "base", None)
        run = Path(base).parent if base else Path(trainer.default_root_dir)
        if base and run.name == CHECKPOINTS:
            run = run.parent
        return Path(self.cache or run / FOLDER) / f"{name}.pt"

    def _look_up(self, trainer: Trainer, module: LightningModule, triples: torch.Tensor, settings: Any) -> Any:
        from modules.ankge.retriever import Neighbours, retrieve

        begin, world = time.perf_counter(), trainer.world_size
        # Triples of one (relation, tail) stay together, whose list of heads is then made only once.
        order = torch.from_numpy(_by_relation_and_tail(triples.numpy()))
        share = order.tensor_split(world)[trainer.global_rank]
        bar = tqdm(total=len(share), desc="analogical objects", disable=not (self.progress and trainer.is_global_zero))
        with bar:
            own = retrieve(module.tables, triples[share].to(module.device), settings, bar.update)
        own = Neighbours(*(part.cpu() for part in own))
        if world > 1:
            parts: list[Any] = [None] * world
            dist.all_gather_object(parts, tuple(own))
            own = Neighbours(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        seconds = time.perf_counter() - begin
        rank_zero_info(f"AnKGE: looked up the analogical objects of {len(triples)} triples in {seconds:.1f} s")
        return own.rows(inverse)


def _by_relation_and_tail(triples: np.ndarray) -> np.ndarray:
    return np.lexsort((triples[:, 2], triples[:, 1]))


def _save(path: Path, found: Any) -> None:
    try:
        with atomic_write(path) as file:
            torch.save(dict(found._asdict()), file)
    except OSError as error:  # after what may have been hours of work, which this run still can use
        rank_zero_warn(
            f"AnKGE: the analogical objects cannot be kept for other runs; set cache of AnalogyRetriever: {error}"
        )


def _load(path: Path, count: int) -> Any | None:
    from modules.ankge.retriever import Neighbours

    if not path.is_file():
        return None
    try:
        found = Neighbours(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        rank_zero_warn(f"AnKGE: {path} cannot be read and is made anew: {error}")
        return None
    return found if all(len(part) == count for part in found) else None


def _all_ranks_have(found: Any | None) -> bool:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return found is not None
    have: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(have, found is not None)
    return all(have)
