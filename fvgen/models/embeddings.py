"""Embeddings of the diffusion time and the frame rate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of a scalar per sample, cosines first (Vaswani et al. 2017; Ho et al. 2020).

    Args:
        values: ``[B]`` integer or fractional times or frame rates.
        dim: width; an odd one ends with a column of zeros.
        max_period: the slowest sinusoid's period is this times 2 pi.

    Returns:
        ``[B, dim]`` float32.
    """
    half = dim // 2
    ramp = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * ramp / half)[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim - 2 * half))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear: ``[B, in_dim]`` to ``[B, out_dim]``."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
