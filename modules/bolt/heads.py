"""Heads of BYOL: projector and predictor are the same two-layer network."""

from torch import nn


class MLPHead(nn.Sequential):
    """Linear - BatchNorm - ReLU - Linear (BYOL, appendix).

    Args:
        in_dim: width of the input.
        hidden_dim: width between the layers (4096 in BYOL).
        out_dim: width of the output (256 in BYOL).
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, out_dim),
        )
