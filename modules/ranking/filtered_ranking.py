"""Ranking scores as a metric: mean reciprocal rank, mean rank and hits, over all queries and over groups of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from modules.ranking.ranks import TIES, ranks_by_counting

UNIT = 1 << 32  # reciprocal ranks are added up as whole multiples of 1 / UNIT
LAST_POWER = 24
RANK_BINS = ("1", "2", *(f"{2 ** (power - 1) + 1}-{2**power}" for power in range(2, LAST_POWER + 1)))


class FilteredRanking(Metric):
    """Where the targets of link prediction or recommendation stand among all candidates, known ones left out.

    All sums are whole numbers: twice the ranks, and reciprocal ranks in units of 2^-32. Their order does not matter, so
    any split of the queries over batches and processes gives the same values to the last bit; room for two billion
    queries. A mean reciprocal rank is off by 2^-33 at most.

    Args:
        ks: the k of hits@k, the share of ranks up to k. A target in the middle of ties (rank 1.5) is no hit@1.
        ties: rule for equal scores, ``realistic``, ``optimistic`` or ``pessimistic``.
        groups: names of groups of queries that get values of their own; a query may be in none or in several.
        copies: G parallel tallies of the same queries, such as a grid of ways to combine scores; None for one.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: for arguments out of range or repeated.

    Example::

        ranking = FilteredRanking(groups=("tail", "head"))
        ranking.update(scores, batch.tails, batch.known, groups=side)
        ranking.compute()["tail/hits@10"]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    count: Tensor
    doubled_ranks: Tensor
    reciprocals: Tensor
    hits: Tensor
    bins: Tensor

    def __init__(
        self,
        ks: Sequence[int] = (1, 3, 10),
        ties: str = "realistic",
        groups: Sequence[str] = (),
        copies: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if ties not in TIES:
            raise ValueError(f"ties: {ties!r}, expected one of {', '.join(TIES)}")
        if any(k < 1 or k != int(k) for k in ks) or len(set(ks)) < len(ks):
            raise ValueError(f"ks: {list(ks)}, expected different whole numbers from 1")
        if isinstance(groups, str) or not all(groups) or len(set(groups)) < len(groups):
            raise ValueError(f"groups: {groups!r}, expected different names")
        if copies is not None and copies < 1:
            raise ValueError(f"copies: {copies}, expected 1 or more")
        self.ks, self.ties, self.groups, self.copies = tuple(ks), ties, tuple(groups), copies
        shape = (copies or 1, 1 + len(groups))  # the first column is for all queries
        for name in ("count", "doubled_ranks", "reciprocals"):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), "sum")
        self.add_state("hits", torch.zeros(*shape, len(ks), dtype=torch.int64), "sum")
        self.add_state("bins", torch.zeros(shape[0], len(RANK_BINS), dtype=torch.int64), "sum")

    def update(
        self, scores: Tensor, targets: Tensor, known: Tensor | None = None, groups: Tensor | None = None
    ) -> None:
        """Rank the targets of a batch and count them.

        Args:
            scores: (B, N) scores of all candidates, higher is better; (G, B, N) with copies.
            targets: (B,) int64 column of the target.
            known: (2, M) int64, row and column of candidates that are left out.
            groups: (B,) int64 number of each query's group, or (B, number of groups) bool membership. Without it the
                queries count among all queries only.

        Raises:
            ValueError: for NaN scores, indices out of range, or tensors that do not fit together.
        """
        if self.copies is None:
            ranks = ranks_by_counting(scores, targets, known, self.ties)
        elif scores.ndim == 3 and len(scores):
            ranks = torch.stack([ranks_by_counting(own, targets, known, self.ties) for own in scores])
        else:
            raise ValueError(f"scores: shape {tuple(scores.shape)}, expected ({self.copies}, rows, candidates)")
        self._tally(ranks, groups)

    def update_ranks(self, ranks: Tensor, groups: Tensor | None = None) -> None:
        """Count ranks that are known already.

        Args:
            ranks: (B,) ranks from 1 in whole or half numbers; (G, B) with copies.
            groups: as for ``update``.

        Raises:
            ValueError: for what is no rank, or tensors that do not fit together.
        """
        # torchmetrics does its bookkeeping (cached values, number of updates) around ``update`` only.
        self._wrap_update(self._tally)(ranks, groups)

    def _tally(self, ranks: Tensor, groups: Tensor | None) -> None:
        if ranks.ndim != (1 if self.copies is None else 2) or len(ranks) != (self.copies or len(ranks)):
            expected = "(queries,)" if self.copies is None else f"({self.copies}, queries)"
            raise ValueError(f"ranks: shape {tuple(ranks.shape)}, expected {expected}")
        ranks = ranks.reshape(self.copies or 1, -1)
        doubled = _doubled(ranks)[..., None]
        member = self._membership(groups, ranks.shape[1], ranks.device)
        # Not in place: after `validate` the sums are inference tensors, which `fit` may not change.
        self.count = self.count + member.sum(0)
        self.doubled_ranks = self.doubled_ranks + (doubled * member).sum(1)
        self.reciprocals = self.reciprocals + ((2 * UNIT + doubled // 2) // doubled * member).sum(1)
        within = doubled <= 2 * torch.tensor(self.ks, dtype=torch.int64, device=ranks.device)
        self.hits = self.hits + (within[:, :, None] & member[:, :, None]).sum(1)
        edges = 2 ** torch.arange(1, LAST_POWER + 1, device=ranks.device)  # twice the last rank of all bins but one
        bins = torch.nn.functional.one_hot(torch.bucketize(doubled[..., 0], edges), len(RANK_BINS))
        self.bins = self.bins + bins.sum(1)

    def _membership(self, groups: Tensor | None, queries: int, device: torch.device) -> Tensor:
        """(B, 1 + number of groups) bool; every query is in the first."""
        width = len(self.groups)
        if groups is None:
            own = torch.zeros(queries, width, dtype=torch.bool, device=device)
        elif groups.dtype == torch.bool and groups.shape == (queries, width):
            own = groups
        elif groups.dtype == torch.int64 and groups.shape == (queries,):
            outside = (groups < 0) | (groups >= width)
            if outside.any():
                raise ValueError(f"groups: {groups[outside][0]} is none of the {width} groups {list(self.groups)}")
            own = groups[:, None] == torch.arange(width, device=device)
        else:
            raise ValueError(
                f"groups: {groups.dtype} of shape {tuple(groups.shape)}, expected int64 of shape ({queries},) or "
                f"bool of shape ({queries}, {width})"
            )
        return torch.cat([torch.ones(queries, 1, dtype=torch.bool, device=device), own], 1)

    def compute(self) -> dict[str, Tensor]:
        """Values over all queries of all processes, and over each group.

        Returns:
            ``mrr``, ``mean_rank``, ``hits@k`` for each k (float32, NaN without queries) and ``count`` (int64), then the
            same as ``<group>/mrr`` and so on. Scalars; (G,) with copies (torchmetrics makes a scalar of G = 1).
        """
        # Not every device divides in double precision.
        count, doubled, reciprocals, hits = (
            state.cpu().double() for state in (self.count, self.doubled_ranks, self.reciprocals, self.hits)
        )
        means = {"mrr": reciprocals / UNIT / count, "mean_rank": doubled / 2 / count}
        means.update({f"hits@{k}": hits[..., place] / count for place, k in enumerate(self.ks)})
        values = {}
        for column, group in enumerate(("", *self.groups)):
            prefix = f"{group}/" if group else ""
            for name, mean in means.items():
                values[prefix + name] = self._for_copies(mean[:, column].float().to(self.count.device))
            values[f"{prefix}count"] = self._for_copies(self.count[:, column])
        return values

    def histogram(self) -> Tensor:
        """How many ranks of all queries of all processes fall into each of ``RANK_BINS``; to be called by all of them.

        A half counts with the next whole number, a rank beyond the last bin in the last bin.

        Returns:
            (25,) int64; (G, 25) with copies.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._for_copies(self.bins).clone()

    def _for_copies(self, values: Tensor) -> Tensor:
        return values[0] if self.copies is None else values


def _doubled(ranks: Tensor) -> Tensor:
    """Twice the ranks as int64."""
    doubled = 2 * (ranks if ranks.is_floating_point() else ranks.long())
    wrong = ~((doubled >= 2) & (doubled == doubled.round()) & doubled.isfinite())
    if wrong.any():
        raise ValueError(f"ranks: {ranks[wrong][0].item()} is no rank, expected whole or half numbers from 1")
    return doubled.long()
