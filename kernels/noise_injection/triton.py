"""Triton version: one pass over memory, noise and table look-up inside the kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvgen.kernels._triton_normal import normal_block

BLOCK, WARPS = 1024, 4  # elements of one sample per program


@triton.jit
def noise_injection_kernel(
    x_ptr, t_ptr, tables_ptr, out_ptr, noise_ptr, velocity_ptr, seed, offset, count, quads, steps,
    WANT_NOISE: tl.constexpr, WANT_VELOCITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_t = a s x_0 + b eps and v = a eps - b s x_0, with eps from Philox at (seed, offset + b quads + element / 4)."""
    i_b = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < count
    o_x = i_b * count + o_n
    b_x = tl.load(x_ptr + o_x, mask=m_n, other=0.0)  # on its way while the table is looked up
    t = tl.load(t_ptr + i_b)
    a = tl.load(tables_ptr + t)
    b = tl.load(tables_ptr + steps + t)
    s = tl.load(tables_ptr + 2 * steps + t)

    o_quad = i_n * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    noise = normal_block(seed, offset + i_b * quads + o_quad)

    b_x = s * b_x.to(tl.float32)
    tl.store(out_ptr + o_x, (a * b_x + b * noise).to(out_ptr.dtype.element_ty), mask=m_n)
    if WANT_NOISE:
        tl.store(noise_ptr + o_x, noise.to(noise_ptr.dtype.element_ty), mask=m_n)
    if WANT_VELOCITY:
        tl.store(velocity_ptr + o_x, (a * noise - b * b_x).to(velocity_ptr.dtype.element_ty), mask=m_n)


@triton.jit
def noise_injection_backward_kernel(
    grad_ptr, grad_velocity_ptr, t_ptr, tables_ptr, out_ptr, count, steps, HAS_VELOCITY: tl.constexpr, BLOCK: tl.constexpr
):
    """dL/dx_0 = s (a g - b g_v)."""
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < count
    o_x = i_b * count + o_n
    b_g = tl.load(grad_ptr + o_x, mask=m_n, other=0.0)  # on their way while the table is looked up
    if HAS_VELOCITY:
        b_v = tl.load(grad_velocity_ptr + o_x, mask=m_n, other=0.0)
    t = tl.load(t_ptr + i_b)
    a = tl.load(tables_ptr + t)
    b = tl.load(tables_ptr + steps + t)
    s = tl.load(tables_ptr + 2 * steps + t)
    total = a * b_g.to(tl.float32)
    if HAS_VELOCITY:
        total -= b * b_v.to(tl.float32)
    total *= s
    tl.store(out_ptr + o_x, total.to(out_ptr.dtype.element_ty), mask=m_n)


def _grid(x: Tensor, block: int) -> tuple[int, int]:
    return triton.cdiv(x[0].numel(), block), x.shape[0]


def noise_injection(
    x0: Tensor, t: Tensor, tables: Tensor, seed: int, offset: int, want_noise: bool, want_velocity: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x0)
    noise = torch.empty_like(x0) if want_noise else x0.new_empty(0)
    velocity = torch.empty_like(x0) if want_velocity else x0.new_empty(0)
    if x0.numel():
        count = x0[0].numel()
        noise_injection_kernel[_grid(x0, BLOCK)](
            x0, t, tables, out, noise, velocity, seed, offset, count, (count + 3) // 4, tables.shape[1],
            WANT_NOISE=want_noise, WANT_VELOCITY=want_velocity, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out, noise, velocity


def noise_injection_backward(
    grad: Tensor, grad_velocity: Tensor, t: Tensor, tables: Tensor, block: int = BLOCK, warps: int = WARPS
) -> Tensor:
    out = torch.empty_like(grad)
    if grad.numel():
        noise_injection_backward_kernel[_grid(grad, block)](
            grad, grad_velocity, t, tables, out, grad[0].numel(), tables.shape[1],
            HAS_VELOCITY=grad_velocity.numel() > 0, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out
