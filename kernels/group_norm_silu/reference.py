"""Group normalisation of channels-last data with SiLU and an added embedding, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 4096  # elements of one group (rows x channels, each rounded up to a power of two) that one program holds in registers


def is_small(rows: int, width: int) -> bool:
    """Whether one program normalises a whole group of ``rows`` x ``width`` channels."""
    return (1 << (rows - 1).bit_length()) * (1 << (width - 1).bit_length()) <= SMALL


def _grouped(x: Tensor, emb: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``[N, R, G, C / G]`` of x + emb."""
    x = x.to(dtype)
    if emb.numel():
        x = x + emb.to(dtype)[:, None]
    return x.unflatten(2, (groups, -1))


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    grouped = _grouped(x, emb, groups, compute)
    mean = grouped.mean((1, 3), keepdim=True)
    rstd = ((grouped - mean).square().mean((1, 3), keepdim=True) + eps).rsqrt()
    z = ((grouped - mean) * rstd).flatten(2) * weight.to(compute) + bias.to(compute)
    out = z * torch.sigmoid(z) if silu else z
    return out.to(x.dtype), mean[:, 0, :, 0].contiguous(), rstd[:, 0, :, 0].contiguous()


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = mean.dtype
    scale = rstd[:, None, :, None]
    normal = (_grouped(x, emb, groups, compute) - mean[:, None, :, None]) * scale
    flat, w = normal.flatten(2), weight.to(compute)
    grad_z = grad.to(compute)
    if silu:
        z = flat * w + bias.to(compute)
        s = torch.sigmoid(z)
        grad_z = grad_z * s * (1 + z * (1 - s))
    grad_normal = (grad_z * w).unflatten(2, (groups, -1))
    along = (grad_normal * normal).mean((1, 3), keepdim=True)
    grad_x = (scale * (grad_normal - grad_normal.mean((1, 3), keepdim=True) - normal * along)).flatten(2)
    grad_emb = grad_x.sum(1).to(emb.dtype) if emb.numel() else torch.empty_like(emb)
    return (
        grad_x.to(x.dtype),
        (grad_z * flat).sum((0, 1)).to(weight.dtype),
        grad_z.sum((0, 1)).to(bias.dtype),
        grad_emb,
    )
