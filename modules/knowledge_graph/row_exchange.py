"""Rows of a table that are spread over processes: fetched by number, forward and backward, and brought together."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.nn.functional import embedding

BLOCK = 1 << 24  # numbers that each process sends at a time when a whole table is collected


@dataclass(frozen=True)
class RowShare:
    """The rows of a table that one process holds: each holds as many as the next, or one fewer, in the order of ranks.

    Args:
        num_rows: of the whole table.
        rank: this process.
        world_size: number of processes, those of torch.distributed's default group if there are several.

    Raises:
        ValueError: If there are fewer rows than processes.
    """

    num_rows: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.num_rows < self.world_size:
            raise ValueError(
                f"the table has {self.num_rows} rows, which cannot be spread over {self.world_size} processes; "
                f"set trainer.devices to at most {self.num_rows}, or sharded to false"
            )

    @property
    def bounds(self) -> list[int]:
        """First row of each process, and the number of all rows."""
        return [self.num_rows * rank // self.world_size for rank in range(self.world_size + 1)]

    @property
    def start(self) -> int:
        """First row of this process."""
        return self.bounds[self.rank]

    @property
    def end(self) -> int:
        """First row after those of this process."""
        return self.bounds[self.rank + 1]

    @property
    def largest(self) -> int:
        """Number of rows of the process that has most."""
        return -(-self.num_rows // self.world_size)


def fetch_rows(rows: Tensor, ids: Tensor, share: RowShare) -> Tensor:
    """Rows of the whole table by number, wherever they are; to be called by all processes.

    Each process asks the owners for the distinct rows it needs, so what it receives does not grow with the number of
    processes. Gradients go back to the owners, which average over processes: that is the gradient of a replicated table
    under DistributedDataParallel.

    Args:
        rows: (share.end - share.start, D) those that this process holds.
        ids: (N,) int64 rows of the whole table, as many on one process as on another or not.
        share: which rows are held.

    Returns:
        (N, D).
    """
    if share.world_size == 1:
        return embedding(ids, rows)
    distinct, places = torch.unique(ids, return_inverse=True)
    return embedding(places, _FetchedRows.apply(rows, distinct, share))


class _FetchedRows(Function):
    """Rows by ascending number, which is the order of their owners."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, ids: Tensor, share: RowShare) -> Tensor:
        owners = torch.bucketize(ids, torch.tensor(share.bounds[1:-1], device=ids.device), right=True)
        wanted = torch.bincount(owners, minlength=share.world_size)
        asked = torch.empty_like(wanted)
        dist.all_to_all_single(asked, wanted)
        wanted, asked = wanted.tolist(), asked.tolist()
        places = _exchanged(ids, wanted, asked) - share.start
        ctx.save_for_backward(places)
        ctx.shape, ctx.wanted, ctx.asked = rows.shape, wanted, asked
        return _exchanged(rows[places], asked, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        received = _exchanged(gradient.contiguous(), ctx.wanted, ctx.asked).div_(len(ctx.wanted))
        return gradient.new_zeros(ctx.shape).index_add_(0, places, received), None, None


def _exchanged(values: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send so many rows to each process, and return those received from each."""
    found = values.new_empty(sum(received), *values.shape[1:])
    dist.all_to_all_single(found, values, received, sent)
    return found


def from_all(values: Tensor, share: RowShare) -> list[Tensor]:
    """Tensors of one shape, from all processes."""
    parts = [torch.empty_like(values) for _ in range(share.world_size)]
    dist.all_gather(parts, values.contiguous())
    return parts


def counts_of_all(count: int, share: RowShare, device: torch.device) -> list[int]:
    """A number of each process."""
    return torch.cat(from_all(torch.tensor([count], device=device), share)).tolist()


def rows_of_all(values: Tensor, counts: list[int], share: RowShare) -> Tensor:
    """Rows of all processes, which have ``counts`` of them, in the order of ranks."""
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    return torch.cat([part[:count] for part, count in zip(from_all(padded, share), counts, strict=True)])


@torch.no_grad()
def collect_rows(rows: Tensor, share: RowShare) -> Tensor | None:
    """The whole table in the memory of the first process' machine, None on the others; to be called by all."""
    first = share.rank == 0
    whole = torch.empty(share.num_rows, *rows.shape[1:], dtype=rows.dtype, device="cpu") if first else None
    size = max(1, BLOCK // max(rows[:1].numel(), 1))
    for start in range(0, share.largest, size):
        part = rows.new_zeros(min(size, share.largest - start), *rows.shape[1:])
        own = rows[start : start + size]
        part[: len(own)] = own
        parts = [torch.empty_like(part) for _ in range(share.world_size)] if first else None
        dist.gather(part, parts)
        for rank, received in enumerate(parts or ()):
            low = share.bounds[rank] + start
            high = min(low + len(part), share.bounds[rank + 1])
            whole[low:high] = received[: high - low]
    return whole
