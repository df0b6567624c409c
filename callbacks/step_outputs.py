"""Rows that evaluation and prediction steps return, put together over batches and ranks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


class StepOutputs:
    """Collects rows batch by batch and brings those of all ranks to rank zero, each sample once.

    A sampler that splits an epoch over ranks may repeat samples to fill the last batches. Rows that carry an
    ``index`` (row of the sample in its split) are freed of repetitions and sorted by it.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Take the rows of one batch: tensors of equal length, (B, ...), the same keys in every batch."""
        self._parts.append({key: value.detach().cpu() for key, value in rows.items()})

    def clear(self) -> None:
        """Forget everything."""
        self._parts = []

    def __len__(self) -> int:
        return sum(len(next(iter(part.values()))) for part in self._parts)

    def gather(self) -> dict[str, Tensor] | None:
        """Rows of all ranks on rank zero, None on the others; to be called by all ranks. No row at all gives ``{}``."""
        own = {key: torch.cat([part[key] for part in self._parts]) for key in self._parts[0]} if self._parts else {}
        ranks = _gather_objects(own)
        if ranks is None:
            return None
        filled = [rows for rows in ranks if rows]
        if not filled:
            return {}
        return _once({key: torch.cat([rows[key] for rows in filled]) for key in filled[0]})

    def take(self, writer: str) -> dict[str, Tensor] | None:
        """Gather and forget; None where there is nothing to write: on other ranks, and with a warning without rows.

        Args:
            writer: who asks, for the warning.
        """
        gathered = self.gather()
        self.clear()
        if gathered == {}:
            rank_zero_warn(f"{writer}: there was nothing to predict, so no file is written")
        return gathered or None


def batch_rows(batch: Any) -> dict[str, Tensor]:
    """Labels and index of a batch, as far as it has them: attributes, mapping keys, or (inputs, labels) pairs."""
    if isinstance(batch, Mapping):
        return {key: batch[key] for key in ("labels", "index") if key in batch}
    rows = {key: getattr(batch, key) for key in ("labels", "index") if isinstance(getattr(batch, key, None), Tensor)}
    if not rows and isinstance(batch, tuple | list) and len(batch) > 1:
        rows = {"labels": batch[1]}
    return rows


def batch_images(batch: Any) -> Tensor:
    """Images of a batch: attribute or mapping key ``images``, or the first entry of a pair."""
    if isinstance(batch, Mapping):
        return batch["images"]
    if hasattr(batch, "images"):
        return batch.images
    return batch[0]


def _gather_objects(value: Any) -> list[Any] | None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    on_first = dist.get_rank() == 0
    values: list[Any] | None = [None] * dist.get_world_size() if on_first else None
    dist.gather_object(value, values, dst=0)
    return values


def _once(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    if "index" not in rows:
        return rows
    _, first = np.unique(rows["index"].numpy(), return_index=True)
    return {key: value[torch.from_numpy(first)] for key, value in rows.items()}
