"""Forward diffusion with dynamic rescale, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.kernels._philox import normal_like


def _rates(tables: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    a, b, s = tables[:, t].to(dtype).reshape(3, -1, *[1] * (like.ndim - 1)).unbind(0)
    return a, b, s


def noise_injection(
    x0: Tensor, t: Tensor, tables: Tensor, seed: int, offset: int, want_noise: bool, want_velocity: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _inject(x0, normal_like(x0, seed, offset), t, tables, want_noise, want_velocity)


def randn(
    x0: Tensor, t: Tensor, tables: Tensor, seed: int, offset: int, want_noise: bool, want_velocity: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with noise of PyTorch's own, whatever seed and offset are."""
    return _inject(x0, torch.randn_like(x0, dtype=torch.float32), t, tables, want_noise, want_velocity)


def _inject(
    x0: Tensor, noise: Tensor, t: Tensor, tables: Tensor, want_noise: bool, want_velocity: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, s = _rates(tables, t, x0)
    clean = s * x0.to(a.dtype)
    x_t = (a * clean + b * noise).to(x0.dtype)
    empty = x0.new_empty(0)
    return (
        x_t,
        noise.to(x0.dtype) if want_noise else empty,
        (a * noise - b * clean).to(x0.dtype) if want_velocity else empty.clone(),
    )


def noise_injection_backward(grad: Tensor, grad_velocity: Tensor, t: Tensor, tables: Tensor) -> Tensor:
    a, b, s = _rates(tables, t, grad)
    total = a * grad.to(a.dtype)
    if grad_velocity.numel():
        total = total - b * grad_velocity.to(a.dtype)
    return (s * total).to(grad.dtype)
