"""One step of the student's and of the teacher's sampler, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fvgen.kernels._philox import normal_like

Draw = Callable[[Tensor, Tensor], Tensor]


def _noise(x: Tensor, stream: Tensor) -> Tensor:
    seed, offset = stream.tolist()
    return normal_like(x, seed, offset)


def randn(x: Tensor, _stream: Tensor) -> Tensor:
    """Noise of PyTorch's own, whatever the stream is."""
    return torch.randn_like(x, dtype=torch.float32)


def student_step(
    x: Tensor, v: Tensor, t: Tensor, t_next: Tensor | None, tables: Tensor, stream: Tensor, draw: Draw = _noise
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    shape = (3, -1, *[1] * (x.ndim - 1))
    a, b, s = tables[:, t].to(compute).reshape(shape).unbind(0)
    x0 = (a * x.to(compute) - b * v.to(compute)) / s
    if t_next is None:
        return x.new_empty(0), x0.to(x.dtype)
    a, b, s = tables[:, t_next].to(compute).reshape(shape).unbind(0)
    return (a * s * x0 + b * draw(x, stream)).to(x.dtype), x0.to(x.dtype)


def teacher_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    coefficients: Tensor,
    stream: Tensor,
    guidance: float,
    rescale: float,
    noisy: bool,
    want_x0: bool,
    draw: Draw = _noise,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    a, b, s, signal, direction, sigma = coefficients.to(compute).unbind(0)
    noised, v = x.to(compute), cond.to(compute)
    if uncond is not None:
        axes, base = tuple(range(1, x.ndim)), uncond.to(compute)
        v = base + guidance * (cond.to(compute) - base)
        if rescale:
            ratio = cond.to(compute).std(axes, keepdim=True) / v.std(axes, keepdim=True)
            v = v * (rescale * ratio + (1 - rescale))
    x0 = (a * noised - b * v) / s
    x_next = signal * x0 + direction * (a * v + b * noised)
    if noisy:
        x_next = x_next + sigma * draw(x, stream)
    return x_next.to(x.dtype), x0.to(x.dtype) if want_x0 else x.new_empty(0)
