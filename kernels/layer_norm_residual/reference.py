"""Layer normalisation of a residual sum, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_CHANNELS = 2048  # one program holds whole rows in registers


def layer_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    compute = torch.promote_types(x.dtype, torch.float32)
    total = x.to(compute)
    stored = torch.empty_like(residual)
    if residual.numel():
        stored = (total + residual.to(compute)).to(x.dtype)
        total = stored.to(compute)  # what the gradient sees later
    mean = total.mean(-1, keepdim=True)
    rstd = ((total - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    out = (total - mean) * rstd * weight.to(compute) + bias.to(compute)
    return out.to(x.dtype), stored, mean[:, 0].contiguous(), rstd[:, 0].contiguous()


def layer_norm_residual_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    compute = mean.dtype
    scale = rstd[:, None]
    normal = (total.to(compute) - mean[:, None]) * scale
    grad_out = grad.to(compute)
    weighted = grad_out * weight.to(compute)
    grad_x = scale * (weighted - weighted.mean(-1, keepdim=True) - normal * (weighted * normal).mean(-1, keepdim=True))
    if grad_total.numel():
        grad_x = grad_x + grad_total.to(compute)
    return grad_x.to(total.dtype), (grad_out * normal).sum(0).to(weight.dtype), grad_out.sum(0).to(weight.dtype)
