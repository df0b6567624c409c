"""Filtered ranks by counting: one pass over the scores per comparison, no sorting, no copy of the scores.

A rank is 1 + the number of candidates that are better than the target. Everything is counted first; what the known
candidates and the target itself contributed is taken off again. That touches only the known ones, where masking them
would copy the whole matrix and could not tell a masked candidate from one whose score is -inf.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# A candidate counts where its score compares so with the target's; several comparisons are averaged.
COMPARISONS = {"realistic": (torch.gt, torch.ge), "optimistic": (torch.gt,), "pessimistic": (torch.ge,)}
TIES = tuple(COMPARISONS)
CACHE, DEVICE_MEMORY = 1 << 20, 1 << 26  # numbers compared at a time on a processor (4 MiB) and on a GPU
EXACT = 1 << 24  # float32 counts up to here

ScoreBlock = Callable[[int, int], Tensor]


def ranks_by_counting(scores: Tensor, targets: Tensor, known: Tensor | None = None, ties: str = "realistic") -> Tensor:
    """Rank of each row's target among the candidates that are not known; a higher score is better.

    Args:
        scores: (B, N) floating point; left as they are.
        targets: (B,) int64 column of the target.
        known: (2, M) int64, row and column of candidates that are left out; in any order, repeated or not. A target
            listed there stays.
        ties: where a target stands among equal scores: ``realistic`` in the middle, ``optimistic`` before and
            ``pessimistic`` behind them.

    Returns:
        (B,) ranks from 1, in halves with ``realistic``; float32, or float64 where float32 cannot hold them.

    Raises:
        ValueError: for NaN scores, indices out of range, an unknown tie rule, or tensors that do not fit together.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores: shape {tuple(scores.shape)}, expected (rows, candidates)")
    num_candidates = scores.shape[1]
    _check_targets(targets, len(scores), num_candidates)
    target_scores = scores.gather(1, targets[:, None])[:, 0]
    whole = max(num_candidates, 1)
    return blocked_ranks(
        lambda start, end: scores[:, start:end], targets, target_scores, num_candidates, known, whole, ties
    )


@torch.no_grad()
def blocked_ranks(
    score_block: ScoreBlock,
    targets: Tensor,
    target_scores: Tensor,
    num_candidates: int,
    known: Tensor | None = None,
    block_size: int = 16384,
    ties: str = "realistic",
) -> Tensor:
    """The ranks of ``ranks_by_counting`` without all scores in memory at once.

    Args:
        score_block: called with ``start`` and ``end``; returns the scores (B, end - start) of these candidates.
        targets: (B,) int64, the target among the candidates. Its own column is never counted.
        target_scores: (B,) scores of the targets. They decide ties, so they must be computed as the blocks are: another
            order of summation can turn a tie into a win.
        num_candidates: N.
        known: (2, M) int64, row and candidate that are left out.
        block_size: candidates at a time.
        ties: as in ``ranks_by_counting``.

    Returns:
        (B,) ranks.

    Raises:
        ValueError: as ``ranks_by_counting`` does, and for a block of another shape.
    """
    if ties not in COMPARISONS:
        raise ValueError(f"ties: {ties!r}, expected one of {', '.join(TIES)}")
    if block_size < 1:
        raise ValueError(f"block_size: {block_size}, expected 1 or more")
    count = len(targets)
    _check_targets(targets, count, num_candidates)
    if target_scores.shape != targets.shape:
        raise ValueError(f"target_scores: shape {tuple(target_scores.shape)}, expected {(count,)}")
    block_size = min(block_size, EXACT)
    starts = range(0, num_candidates, block_size)
    left_out = _left_out(targets, known, num_candidates, block_size)
    better = torch.zeros(count, dtype=torch.int64, device=targets.device)
    undefined = target_scores.isnan()
    for start, (rows, columns) in zip(starts, left_out, strict=True):
        end = min(start + block_size, num_candidates)
        block = score_block(start, end)
        if block.shape != (count, end - start):
            raise ValueError(
                f"score_block({start}, {end}): shape {tuple(block.shape)}, expected {(count, end - start)}"
            )
        removed, removed_targets = block[rows, columns - start], target_scores[rows]
        for compare in COMPARISONS[ties]:
            better += _count(compare, block, target_scores)
            better.index_add_(0, rows, compare(removed, removed_targets).long(), alpha=-1)
        undefined |= block.amax(1).isnan()
    if undefined.any():
        row = undefined.nonzero()[0].item()
        raise ValueError(f"scores: row {row} holds NaN, which has no rank; look for what made the scores NaN")
    # Halves need one more bit than whole numbers.
    dtype = torch.float32 if 2 * num_candidates < EXACT else torch.float64
    return 1 + better.to(dtype) / len(COMPARISONS[ties])


def check_known(known: Tensor, num_rows: int, num_candidates: int) -> None:
    """Refuse known candidates that do not exist.

    Args:
        known: (2, M) int64, row and column.
        num_rows: B.
        num_candidates: N.

    Raises:
        ValueError: naming the first index out of range.
    """
    if known.ndim != 2 or len(known) != 2 or known.dtype != torch.int64:
        raise ValueError(f"known: {known.dtype} of shape {tuple(known.shape)}, expected int64 of shape (2, M)")
    limits = torch.tensor([[num_rows], [num_candidates]], device=known.device)
    outside = (known < 0) | (known >= limits)
    if outside.any():
        axis, place = outside.nonzero()[0].tolist()
        name = ("row", "column")[axis]
        raise ValueError(f"known: {name} {known[axis, place]} at place {place} is outside 0..{limits[axis].item() - 1}")


def _check_targets(targets: Tensor, num_rows: int, num_candidates: int) -> None:
    if targets.shape != (num_rows,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: {targets.dtype} of shape {tuple(targets.shape)}, expected int64 of shape ({num_rows},)"
        )
    outside = (targets < 0) | (targets >= num_candidates)
    if outside.any():
        row = outside.nonzero()[0].item()
        raise ValueError(f"targets: {targets[row]} in row {row} is outside 0..{num_candidates - 1}")


def _left_out(
    targets: Tensor, known: Tensor | None, num_candidates: int, block_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of what is not counted, the targets and the known, each pair once; for one block after another.

    Within a block the pairs go by row: that is how the scores lie in memory, and how known candidates mostly come, so
    that there is little to sort.
    """
    rows, columns = torch.arange(len(targets), device=targets.device), targets
    if known is not None:
        check_known(known, len(targets), num_candidates)
        rows, columns = torch.cat([rows, known[0]]), torch.cat([columns, known[1]])
    size = max(1, len(targets) * num_candidates)
    keys = torch.unique(columns // block_size * size + rows * num_candidates + columns)
    places = keys % size
    blocks = -(-num_candidates // block_size)
    sizes = torch.bincount(keys // size, minlength=blocks).tolist()
    width = max(1, num_candidates)
    return list(zip((places // width).split(sizes), (places % width).split(sizes), strict=True))


def _count(compare: Callable[..., Tensor], block: Tensor, target_scores: Tensor) -> Tensor:
    """How many columns of each row compare so with the row's target; (B,) int64.

    Comparisons written as float32 into memory that stays in the cache are several times quicker to make and to add up
    than booleans.
    """
    limit = CACHE if block.device.type == "cpu" else DEVICE_MEMORY
    chunk = max(1, limit // block.shape[1])
    space = torch.empty(min(chunk, len(block)), block.shape[1], dtype=torch.float32, device=block.device)
    counts = [
        compare(part, own[:, None], out=space[: len(part)]).sum(1)
        for part, own in zip(block.split(chunk), target_scores.split(chunk), strict=True)
    ]
    return torch.cat(counts).long()
