"""Looks up the analogical objects of all training triples before AnKGE trains, once for a base model and settings."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
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
BLOCKS, SMALLEST, LARGEST = 32, 256, 8192  # blocks of triples that are looked up in turn, and triples of one
SECONDS_BETWEEN_FILES = 30.0
PATIENCE = timedelta(days=30)


class AnalogyRetriever(Callback):
    """Fills ``module.neighbours``, from a file where they were looked up before.

    The name of the file is a hash of the base's weights and score function, the triples and the settings, so another
    base model never gets these. Ranks share the triples. What a look-up that was killed had done until half a minute
    before is in files beside that one (``<hash>-<triples of a block>-<block>.part``), and the next one goes on from
    there, with any number of ranks. They are deleted once the whole is on the disk. Where the folder is not shared,
    each node keeps its own file.

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
            parts = _Parts(path, _block_size(len(triples)))
            found = self._look_up(trainer, pl_module, triples, settings, parts)
            if path is not None and trainer.local_rank == 0 and _save(path, found):
                parts.remove()
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

    def _look_up(
        self, trainer: Trainer, module: LightningModule, triples: torch.Tensor, settings: Any, parts: "_Parts"
    ) -> Any:
        from modules.ankge.retriever import Neighbours

        begin, rank = time.perf_counter(), trainer.global_rank
        # Triples of one (relation, tail) stay together, whose list of heads is then made only once.
        order = torch.from_numpy(_by_relation_and_tail(triples.numpy()))
        # The same blocks on any number of ranks, so that parts fit and each triple has the same result to the last bit.
        blocks = order.split(parts.size)
        with _patient_group(trainer.world_size) as group:
            own = parts.load([len(block) for block in blocks])
            there = _from_all(set(own), group)
            own = {block: found for block, found in own.items() if not any(block in some for some in there[:rank])}
            missing = np.setdiff1d(np.arange(len(blocks)), list(set().union(*there)))
            if len(missing) < len(blocks):
                rank_zero_info(f"AnKGE: {len(blocks) - len(missing)} of {len(blocks)} blocks were looked up before")
            mine = np.array_split(missing, trainer.world_size)[rank].tolist()
            shares = {block: triples[blocks[block]] for block in mine}
            own |= self._look_up_blocks(trainer, module, shares, settings, parts)
            every = {
                block: Neighbours(*found)
                for some in _from_all({block: tuple(found) for block, found in own.items()}, group)
                for block, found in some.items()
            }
        whole = Neighbours(
            *(torch.cat(columns) for columns in zip(*(every[block] for block in range(len(blocks))), strict=True))
        )
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        seconds = time.perf_counter() - begin
        rank_zero_info(f"AnKGE: looked up the analogical objects of {len(triples)} triples in {seconds:.1f} s")
        return whole.rows(inverse)

    def _look_up_blocks(
        self, trainer: Trainer, module: LightningModule, shares: dict[int, torch.Tensor], settings: Any, parts: "_Parts"
    ) -> dict[int, Any]:
        from modules.ankge.retriever import Neighbours, retrieve

        found, total = {}, sum(map(len, shares.values()))
        bar = tqdm(total=total, desc="analogical objects", disable=not (self.progress and trainer.is_global_zero))
        with bar, parts.kept_at_the_latest_when_interrupted():
            for block, share in shares.items():
                own = retrieve(module.tables, share.to(module.device), settings, bar.update)
                found[block] = Neighbours(*(part.cpu() for part in own))
                parts.add(block, found[block])
        return found


class _Parts:
    """Files of finished blocks beside the file of all, so that a look-up that is cut off is not lost.

    Args:
        path: the file of all; None keeps nothing.
        size: triples of a block, in the files' names: blocks of another size hold other triples.
    """

    def __init__(self, path: Path | None, size: int) -> None:
        self.path, self.size = path, size
        self._waiting: dict[int, dict[str, torch.Tensor]] = {}
        self._last = time.monotonic()

    def load(self, sizes: Sequence[int]) -> dict[int, Any]:
        """Blocks in the files, as far as they have the sizes of all blocks."""
        from modules.ankge.retriever import Neighbours

        found: dict[int, Any] = {}
        for path in self._files(f"{self.size}-*"):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                blocks = {block: Neighbours(**fields) for block, fields in content.items()}
            except Exception as error:
                rank_zero_warn(f"AnKGE: {path} cannot be read and is made anew: {error}")
                continue
            found |= {
                block: own
                for block, own in blocks.items()
                if block < len(sizes) and all(len(part) == sizes[block] for part in own)
            }
        return found

    def add(self, block: int, found: Any) -> None:
        """Take a block, and write those that wait once the last file is old enough."""
        self._waiting[block] = dict(found._asdict())
        if time.monotonic() - self._last >= SECONDS_BETWEEN_FILES:
            self._write()

    @contextmanager
    def kept_at_the_latest_when_interrupted(self) -> Iterator[None]:
        """Write what waits when the body is interrupted."""
        try:
            yield
        except BaseException:
            self._write()
            raise

    def remove(self) -> None:
        """Delete the files, those of other sizes too."""
        for path in self._files("*"):
            with suppress(OSError):
                path.unlink()

    def _files(self, blocks: str) -> list[Path]:
        return [] if self.path is None else sorted(self.path.parent.glob(f"{self.path.stem}-{blocks}.part"))

    def _write(self) -> None:
        if self.path is None or not self._waiting:
            return
        path = self.path.with_name(f"{self.path.stem}-{self.size}-{min(self._waiting)}.part")
        try:
            with atomic_write(path) as file:
                torch.save(self._waiting, file)
        except OSError as error:
            rank_zero_warn(f"AnKGE: a part of the look-up cannot be kept: {error}")
            self.path = None  # told once
        self._waiting, self._last = {}, time.monotonic()


@contextmanager
def _patient_group(world_size: int) -> Iterator[Any]:
    """Processes that wait for each other as long as a look-up takes, which is more than the half hour of others."""
    if world_size == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _from_all(value: Any, group: Any) -> list[Any]:
    """The value of each rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def _by_relation_and_tail(triples: np.ndarray) -> np.ndarray:
    return np.lexsort((triples[:, 2], triples[:, 1]))


def _block_size(count: int) -> int:
    return min(max(count // BLOCKS, SMALLEST), LARGEST)


def _save(path: Path, found: Any) -> bool:
    """Whether the file could be written."""
    try:
        with atomic_write(path) as file:
            torch.save(dict(found._asdict()), file)
    except OSError as error:  # after what may have been hours of work, which this run still can use
        rank_zero_warn(
            f"AnKGE: the analogical objects cannot be kept for other runs; set cache of AnalogyRetriever: {error}"
        )
        return False
    return True


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
