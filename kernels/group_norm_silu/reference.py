"""Group normalisation of channels-last data with SiLU, an added embedding and a residual, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128  # rows per block of the statistics that are handed over
SMALL = 16384  # elements of one group (rows x channels) that one program holds in registers


def is_small(rows: int, width: int, most: int = SMALL) -> bool:
    """Whether one program takes a whole group of ``rows`` x ``width`` channels; half as many if those are short or crooked."""
    return rows * width <= (most if width % 4 == 0 and width >= 32 else most // 2)


def _added(x: Tensor, emb: Tensor, dtype: torch.dtype) -> Tensor:
    """x + emb, with emb ``[N, C]``, ``[C]`` or empty."""
    x = x.to(dtype)
    return x + emb.to(dtype).unsqueeze(-2) if emb.numel() else x


def beside(x: Tensor, residual: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
    """x + emb + residual, rounded once, and the skip connection in further channels."""
    compute = torch.promote_types(x.dtype, torch.float32)
    own = _added(x, emb, compute)
    own = own + residual.to(compute) if residual.numel() else own
    return torch.cat([own.to(x.dtype), skip], 2)


def group_norm_silu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, ...]:
    compute = torch.promote_types(x.dtype, torch.float32)
    total = _added(x, emb, compute)
    stored = torch.empty_like(residual)
    if residual.numel():
        stored = (total + residual.to(compute)).to(x.dtype)
        total = stored.to(compute)  # what the gradient sees later
    grouped = total.unflatten(2, (groups, -1))
    mean = grouped.mean((1, 3), keepdim=True)
    rstd = ((grouped - mean).square().mean((1, 3), keepdim=True) + eps).rsqrt()
    z = ((grouped - mean) * rstd).flatten(2) * weight.to(compute) + bias.to(compute)
    out = z * torch.sigmoid(z) if silu else z
    return out.to(x.dtype), stored, mean[:, 0, :, 0].contiguous(), rstd[:, 0, :, 0].contiguous()


def group_norm_silu_skip(
    x: Tensor, residual: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    total, none = beside(x, residual, skip, emb), x.new_empty(0)
    return group_norm_silu(total, none, weight, bias, none, groups, eps, silu)[0], total


def group_norm_silu_given(
    x: Tensor, partial: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """``partial`` is what the first pass would leave: mean and squared deviations per channel and block of ROWS rows."""
    compute = partial.dtype
    rows = x.shape[1]
    count = (rows - ROWS * torch.arange(partial.shape[1], device=x.device)).clamp(max=ROWS).to(compute)[:, None, None]
    means, squares = (y.unflatten(2, (groups, -1)) for y in partial.unbind(2))  # [N, blocks, groups, width]
    size = rows * means.shape[3]
    mean = (means * count).sum((1, 3), keepdim=True) / size
    variance = (squares + (means - mean).square() * count).sum((1, 3), keepdim=True) / size
    normal = (x.to(compute).unflatten(2, (groups, -1)) - mean) * (variance + eps).rsqrt()
    z = normal.flatten(2) * weight.to(compute) + bias.to(compute)
    return (z * torch.sigmoid(z) if silu else z).to(x.dtype)


def group_norm_silu_backward(
    grad: Tensor,
    grad_total: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    emb: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x`` is the stored sum, with emb in it, where there is a ``grad_total``."""
    compute = mean.dtype
    scale = rstd[:, None, :, None]
    total = x.to(compute) if grad_total.numel() else _added(x, emb, compute)
    normal = (total.unflatten(2, (groups, -1)) - mean[:, None, :, None]) * scale
    flat, w = normal.flatten(2), weight.to(compute)
    grad_z = grad.to(compute)
    if silu:
        z = flat * w + bias.to(compute)
        s = torch.sigmoid(z)
        grad_z = grad_z * s * (1 + z * (1 - s))
    grad_normal = (grad_z * w).unflatten(2, (groups, -1))
    along = (grad_normal * normal).mean((1, 3), keepdim=True)
    grad_x = (scale * (grad_normal - grad_normal.mean((1, 3), keepdim=True) - normal * along)).flatten(2)
    if grad_total.numel():
        grad_x = grad_x + grad_total.to(compute)
    grad_emb = torch.empty_like(emb)
    if emb.numel():
        grad_emb = grad_x.sum(1 if emb.ndim == 2 else (0, 1)).to(emb.dtype)
    return (
        grad_x.to(x.dtype),
        (grad_z * flat).sum((0, 1)).to(weight.dtype),
        grad_z.sum((0, 1)).to(bias.dtype),
        grad_emb,
    )
