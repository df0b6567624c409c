"""Vectors of entities that are spread over processes, for more entities than one device has memory for.

Each process holds plain tensors: its own rows of the entity table, with their gradients and moments, and all relations.
DistributedDataParallel leaves the rows alone and averages the rest. Row-wise parallel DTensors would do for the look-up
as well, but they send all ids to all processes and add up partial tables, they need as many ids on each process, and
optimizer, clipping and checkpoints would have to deal with two kinds of tensors; here these are as for any parameter.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modules.knowledge_graph.embedding_tables import EmbeddingTables
from modules.knowledge_graph.row_exchange import RowShare, fetch_rows
from modules.knowledge_graph.scoring import ScoringFunction

BLOCK = 1 << 24  # numbers that are drawn at a time


class ShardedEmbeddingTables(EmbeddingTables):
    """Tables of which each process holds some rows of the entities, once :meth:`spread` says which.

    First values are those of :class:`EmbeddingTables` for the same state of torch's generator when it is built. Every
    process draws all of them, in blocks of 64 MiB, and keeps its own; this takes a score function that draws entities
    row after row and before relations.

    Args:
        scoring: the function.
        num_entities: E.
        num_relations: R, without reverses.
    """

    def __init__(self, scoring: ScoringFunction, num_entities: int, num_relations: int) -> None:
        state = torch.get_rng_state()
        super().__init__(scoring, 0, num_relations)
        self.num_entities, self._first_state = num_entities, state
        self.share: RowShare | None = None

    @property
    def is_spread(self) -> bool:
        """Whether several processes hold the entities."""
        return self.share is not None and self.share.world_size > 1

    def spread(self, share: RowShare) -> None:
        """Draw the rows of a process, or keep its rows of a whole table.

        Raises:
            RuntimeError: If the table is spread over another number of processes already.
        """
        if share == self.share:
            return
        if self.is_spread:
            raise RuntimeError(
                f"the entities are spread over {self.share.world_size} processes already and cannot be spread over "
                f"{share.world_size}; save a checkpoint, and load it into a new model"
            )
        whole = self.entities.detach()
        rows = self._draw(share) if self.share is None else whole[share.start : share.end].clone()
        self.entities = nn.Parameter(rows.to(whole.device), requires_grad=self.entities.requires_grad)
        self.share = share

    def _draw(self, share: RowShare) -> Tensor:
        width, own = self.entities.shape[1], []
        size = max(1, BLOCK // width)
        options = {"dtype": self.entities.dtype, "device": "cpu"}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._first_state)
            nothing, relations = torch.empty(0, width, **options), torch.empty(self.relations.shape, **options)
            for start in range(0, self.num_entities, size):
                block = torch.empty(min(size, self.num_entities - start), width, **options)
                self.scoring.initialize(block, relations[:0])
                own.append(block[max(share.start - start, 0) : max(share.end - start, 0)].clone())
            self.scoring.initialize(nothing, relations)
        self.relations.data.copy_(relations)
        return torch.cat(own)

    def _load_from_state_dict(self, *args: object, **options: object) -> None:
        if self.share is None:  # without a trainer, one process
            self.spread(RowShare(self.num_entities))
        super()._load_from_state_dict(*args, **options)

    def entity_vectors(self, ids: Tensor) -> Tensor:
        """See the base class; to be called by all processes together."""
        if self.share is None:
            raise RuntimeError("the tables hold no entities yet; call spread, as the module's configure_model does")
        return fetch_rows(self.entities, ids, self.share)

    def tail_distances(self, heads: Tensor, relations: Tensor) -> Tensor:
        """See the base class; of a table in one process."""
        self._check_whole("distances from all entities")
        return super().tail_distances(heads, relations)

    def named_vectors(self) -> Iterator[tuple[str, Tensor]]:
        """See the base class; of a table in one process."""
        self._check_whole("the whole table")
        return super().named_vectors()

    def _check_whole(self, what: str) -> None:
        if self.is_spread:
            raise RuntimeError(
                f"{what}: no process holds that, the entities are spread over {self.share.world_size} of them; load a "
                "checkpoint of the model in one process"
            )
