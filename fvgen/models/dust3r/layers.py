"""Transformer blocks with rotary positions in two dimensions (CroCo v2, Weinzaepfel et al., arXiv 2211.10408)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class Rotary(NamedTuple):
    """Cosine and sine ``[B, 1, N, 2, D]`` float32 of every token's angles: for y and x, ``D`` a quarter of a head's width."""

    cos: Tensor
    sin: Tensor


def grid_positions(grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Token indices (y, x) of a grid of (rows, columns), row by row: ``[rows * columns, 2]`` int64."""
    rows, columns = grid
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))


def rotary(positions: Tensor, head_width: int, base: float = 100.0) -> Rotary:
    """Angles ``position * base^(-i / D)``, ``i`` = 0 .. D - 1, of positions ``[B, N, 2]`` (y, x)."""
    quarter = head_width // 4
    frequencies = base ** (-torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter)
    angles = (positions.float()[..., None] * frequencies)[:, None]
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, angles: Rotary) -> Tensor:
    """Turn ``[B, heads, N, width]``: the first half of a head by y, the second by x; in each, channel i pairs with i + D."""
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([a * angles.cos - b * angles.sin, b * angles.cos + a * angles.sin], dim=-2)
    return turned.flatten(-3).to(x.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, C]`` to ``[B, heads, N, C / heads]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention of tokens on themselves; one matrix gives q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Rotary) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention on the tokens of the other image; each side is turned by its own positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor, angles: Rotary, other_angles: Rotary) -> Tensor:
        q = rotate(split_heads(self.to_q(x), self.heads), angles)
        k = rotate(split_heads(self.to_k(other), self.heads), other_angles)
        attended = F.scaled_dot_product_attention(q, k, split_heads(self.to_v(other), self.heads))
        return self.to_out(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with exact GELU."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, int(ratio * width))
        self.linear_2 = nn.Linear(int(ratio * width), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class EncoderBlock(nn.Module):
    """Pre-norm block of the encoder."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width, eps=NORM_EPS)
        self.self_attn = SelfAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, mlp_ratio)

    def forward(self, x: Tensor, angles: Rotary) -> Tensor:
        x = x + self.self_attn(self.norm_self(x), angles)
        return x + self.mlp(self.norm_mlp(x))


class DecoderBlock(nn.Module):
    """Pre-norm block of a decoder: itself, then the other image, then the MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width, eps=NORM_EPS)
        self.self_attn = SelfAttention(width, heads)
        self.norm_cross = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm_other = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attn = CrossAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, mlp_ratio)

    def forward(self, x: Tensor, other: Tensor, angles: Rotary, other_angles: Rotary) -> Tensor:
        x = x + self.self_attn(self.norm_self(x), angles)
        x = x + self.cross_attn(self.norm_cross(x), self.norm_other(other), angles, other_angles)
        return x + self.mlp(self.norm_mlp(x))
