"""Token perturbation of BOLT: permutation, linear projection, split and fuse."""

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

Projection = Literal["learned", "orthogonal", "none"]


def displaced_counts(strength: Tensor, num_tokens: int) -> Tensor:
    """How many tokens to displace: round(r N), with 1 raised to 2 since one token alone cannot move.

    Args:
        strength: r (B,) in [0, 1].
        num_tokens: N.

    Returns:
        (B,) int64 in {0, 2, ..., N}.
    """
    counts = (strength * num_tokens).round().long()
    return torch.where(counts == 1, 2, counts)


def cyclic_permutations(counts: Tensor, num_tokens: int, generator: Generator | None = None) -> Tensor:
    """Permutations that displace exactly ``counts`` tokens, in one cycle through uniformly chosen positions.

    Args:
        counts: K (B,) int64, each 0 or 2..N.
        num_tokens: N.
        generator: source of randomness on the device of ``counts``; the global one by default.

    Returns:
        pi (B, N) int64: position i receives token pi[i].
    """
    shape, device = (counts.shape[0], num_tokens), counts.device
    order = torch.rand(shape, generator=generator, device=device).argsort(1)
    rank = torch.arange(num_tokens, device=device).expand(shape)
    last = counts.unsqueeze(1) - 1
    successor = torch.where(rank < last, rank + 1, torch.where(rank == last, 0, rank))
    return torch.empty_like(order).scatter_(1, order, order.gather(1, successor))


class TokenPerturbation(nn.Module):
    """Displace some tokens, project them, and let every token keep a part of its own channels.

    With strength r ~ U(r_min, r_max) per image, K = round(r N) tokens are displaced by pi and token i becomes
    [T_i[:c] ; (T_pi(i) W + b)[c:]] with c = D - round(g D): our reading of BOLT's "permutation, linear projection,
    split and fuse". It must act before position embeddings are added: a Transformer ignores the order of its input.

    Args:
        dim: D, width of a token.
        r_min: smallest strength.
        r_max: largest strength; 0 displaces nothing.
        mix: g in (0, 1], share of a token's channels that is replaced.
        projection: ``learned`` (D x D, starts as the identity), ``orthogonal`` (a fixed random rotation) or ``none``.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self, dim: int, r_min: float = 0.0, r_max: float = 1.0, mix: float = 0.5, projection: Projection = "learned"
    ) -> None:
        super().__init__()
        check_strength(r_min, r_max, mix)
        self.dim, self.r_min, self.r_max, self.mix = dim, r_min, r_max, mix
        self.kept = dim - round(mix * dim)
        self.projection: nn.Linear | None = None
        if projection == "learned":
            self.projection = nn.Linear(dim, dim)
            nn.init.eye_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        elif projection == "orthogonal":
            self.projection = nn.Linear(dim, dim, bias=False)
            nn.init.orthogonal_(self.projection.weight)
            self.projection.requires_grad_(False)
        elif projection != "none":
            raise ValueError(f"projection: {projection!r} is unknown; expected learned, orthogonal or none")

    def sample(
        self, batch: int, num_tokens: int, generator: Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Permutations (batch, N) for images of random strength.

        Raises:
            ValueError: if there are fewer than two tokens.
        """
        if num_tokens < 2:
            raise ValueError(f"perturbation: {num_tokens} token per image cannot be permuted; use a smaller patch size")
        uniform = torch.rand(batch, generator=generator, device=device)
        counts = displaced_counts(self.r_min + (self.r_max - self.r_min) * uniform, num_tokens)
        return cyclic_permutations(counts, num_tokens, generator)

    def difficulty(self, permutation: Tensor) -> Tensor:
        """Displaced content per image (B,) in [0, 1]: g times the normalised Hamming distance to the identity."""
        identity = torch.arange(permutation.shape[1], device=permutation.device)
        return self.mix * (permutation != identity).float().mean(1)

    def forward(
        self, tokens: Tensor, permutation: Tensor | None = None, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Perturb tokens.

        Args:
            tokens: (B, N, D) patch tokens without class token and positions.
            permutation: (c B, N) from :meth:`sample`; with c > 1 the result holds c perturbed copies of the batch, one
                after the other. Sampled for one copy if not given.
            generator: source of randomness if the permutation is sampled here.

        Returns:
            Perturbed tokens (c B, N, D) and difficulties (c B,).
        """
        if permutation is None:
            permutation = self.sample(tokens.shape[0], tokens.shape[1], generator, tokens.device)
        own, other = tokens[..., : self.kept], self._projected(tokens)
        copies = permutation.shape[0] // tokens.shape[0]
        if copies > 1:
            own, other = own.repeat(copies, 1, 1), other.repeat(copies, 1, 1)
        return torch.cat([own, take_tokens(other, permutation)], dim=-1), self.difficulty(permutation)

    def _projected(self, tokens: Tensor) -> Tensor:
        """Replaced channels of T W + b; a projection acts on each token alone, so it may precede the permutation."""
        if self.projection is None:
            return tokens[..., self.kept :]
        bias = self.projection.bias
        return functional.linear(
            tokens, self.projection.weight[self.kept :], None if bias is None else bias[self.kept :]
        )


class _TakeTokens(torch.autograd.Function):
    """Reorder tokens; the gradient is reordered by the inverse, on CPU several times faster than a scattered sum."""

    @staticmethod
    def forward(ctx: FunctionCtx, tokens: Tensor, rows: Tensor, inverse_rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows, inverse_rows)
        return tokens.reshape(-1, tokens.shape[-1]).index_select(0, rows).view_as(tokens)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, inverse_rows = ctx.saved_tensors
        return _TakeTokens.apply(gradient, inverse_rows, rows), None, None


def take_tokens(tokens: Tensor, permutation: Tensor) -> Tensor:
    """Tokens (B, N, D) in the order of permutations (B, N): position i receives token pi(i)."""
    images, positions = permutation.shape
    start = positions * torch.arange(images, device=permutation.device).unsqueeze(1)
    rows = (permutation + start).flatten()
    inverse = torch.empty_like(rows).scatter_(0, rows, torch.arange(rows.numel(), device=rows.device))
    return _TakeTokens.apply(tokens, rows, inverse)


def take_patches(images: Tensor, permutation: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) with their patches in the order of permutations (B, N), to show what a permutation does."""
    patches = functional.unfold(images, kernel_size=patch_size, stride=patch_size)
    patches = patches.gather(2, permutation.unsqueeze(1).expand(-1, patches.shape[1], -1))
    return functional.fold(patches, output_size=images.shape[-2:], kernel_size=patch_size, stride=patch_size)


def check_strength(r_min: float, r_max: float, mix: float) -> None:
    """Raise a ValueError that names the field, its value and its range."""
    for field, value in (("r_min", r_min), ("r_max", r_max)):
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"{field}: {value} is outside [0, 1]")
    if r_min > r_max:
        raise ValueError(f"r_min: {r_min} is above r_max: {r_max}; expected 0 <= r_min <= r_max <= 1")
    if not 0 < mix <= 1:
        raise ValueError(f"mix: {mix} is outside (0, 1]")
