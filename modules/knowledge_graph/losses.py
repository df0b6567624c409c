"""Self-adversarial loss of knowledge-graph embeddings (Sun et al., 2019)."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def self_adversarial_loss(
    positive: Tensor,
    negative: Tensor,
    temperature: float = 1.0,
    excluded: Tensor | None = None,
    weights: Tensor | None = None,
    total_weight: Tensor | float | None = None,
) -> Tensor:
    """Half the weighted means of ``-log sigmoid(f+)`` and of ``-log sigmoid(-f-)`` under a softmax of the negatives.

    Args:
        positive: scores (B,) of the triples, margin minus distance.
        negative: scores (B, K) of their corruptions.
        temperature: tau of the softmax over the negatives, which has no gradient.
        excluded: (B, K) bool, true for corruptions that are true triples; a row of these alone has no negative part.
        weights: (B,) of the triples; None for equal ones.
        total_weight: what the weighted sums are divided by; None for the sum of ``weights``.

    Returns:
        Scalar.
    """
    logits = temperature * negative.detach()
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    share = torch.softmax(logits, dim=1)
    if excluded is not None:
        share = share.masked_fill(excluded, 0.0)  # a row of -inf is NaN
    terms = logsigmoid(positive) + (share * logsigmoid(-negative)).sum(1)
    if weights is None:
        total = len(terms) if total_weight is None else total_weight
        return -terms.sum() / total / 2
    total = weights.sum() if total_weight is None else total_weight
    return -(weights * terms).sum() / total / 2
