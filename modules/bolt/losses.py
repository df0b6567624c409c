"""Consistency losses between predictions of the online network and projections of the target network."""

import torch
from torch import Tensor
from torch.nn import functional


def cosine_consistency(prediction: Tensor, projection: Tensor) -> Tensor:
    """BYOL's loss 2 - 2 cos(u, z'), mean over the batch.

    Args:
        prediction: u (B, d), online.
        projection: z' (B, d), target, without gradient.

    Returns:
        Scalar in [0, 4], at least in float32.
    """
    prediction, projection = _full_precision(prediction), _full_precision(projection)
    return 2 - 2 * functional.cosine_similarity(prediction, projection, dim=-1).mean()


def info_nce(prediction: Tensor, projection: Tensor, temperature: float = 0.2, offset: int = 0) -> Tensor:
    """MoCo v3's contrastive loss: 2 t times the cross-entropy of telling the own key among all keys (its Algorithm 1).

    Args:
        prediction: queries (B, d), online.
        projection: keys (M, d) of all processes, target, without gradient.
        temperature: t.
        offset: row of ``projection`` that belongs to the first query (rank times B).

    Returns:
        Scalar, at least in float32.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        queries = functional.normalize(_full_precision(prediction), dim=-1)
        keys = functional.normalize(_full_precision(projection), dim=-1)
        own = torch.arange(offset, offset + queries.shape[0], device=queries.device)
        return 2 * temperature * functional.cross_entropy(queries @ keys.T / temperature, own)


@torch.no_grad()
def normalised_std(projection: Tensor) -> Tensor:
    """Mean over dimensions of the deviation of L2-normalised rows: near 1/sqrt(d) if spread out, 0 if collapsed."""
    return functional.normalize(_full_precision(projection), dim=-1).std(0).mean()


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
