"""Triton version: a step is one pass; the guidance rescale takes a short one before it for the standard deviations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvgen.kernels._triton_guidance import SUMS, guidance_spread_kernel, guided_velocity, rescale_factor
from fvgen.kernels._triton_normal import normal_block

BLOCK = 1024  # elements of one sample per program


@triton.jit
def _noise(stream_ptr, i_b, i_n, quads, BLOCK: tl.constexpr):
    """Elements i_n BLOCK .. of sample i_b's noise."""
    o_quad = i_n * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    return normal_block(tl.load(stream_ptr), tl.load(stream_ptr + 1) + i_b * quads + o_quad)


@triton.jit
def student_step_kernel(
    x_ptr, v_ptr, t_ptr, t_next_ptr, tables_ptr, stream_ptr, next_ptr, x0_ptr, count, quads, steps,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x0 = (a x - b v) / s and x_next = a' s' x0 + b' eps."""
    i_b, i_n = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < count
    o_x = i_b * count + o_n
    t = tl.load(t_ptr + i_b)
    a, b, s = tl.load(tables_ptr + t), tl.load(tables_ptr + steps + t), tl.load(tables_ptr + 2 * steps + t)
    b_x = tl.load(x_ptr + o_x, mask=m_n, other=0.0).to(tl.float32)
    b_v = tl.load(v_ptr + o_x, mask=m_n, other=0.0).to(tl.float32)
    b_x0 = (a * b_x - b * b_v) / s
    tl.store(x0_ptr + o_x, b_x0.to(x0_ptr.dtype.element_ty), mask=m_n)
    if not LAST:
        t = tl.load(t_next_ptr + i_b)
        signal, b = tl.load(tables_ptr + t) * tl.load(tables_ptr + 2 * steps + t), tl.load(tables_ptr + steps + t)
        b_next = signal * b_x0 + b * _noise(stream_ptr, i_b, i_n, quads, BLOCK)
        tl.store(next_ptr + o_x, b_next.to(next_ptr.dtype.element_ty), mask=m_n)


@triton.jit
def teacher_step_kernel(
    x_ptr, cond_ptr, uncond_ptr, coefficients_ptr, stream_ptr, spread_ptr, next_ptr, x0_ptr, guidance, rescale, count, quads,
    programs, GUIDED: tl.constexpr, RESCALED: tl.constexpr, NOISY: tl.constexpr, WANT_X0: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x0 = (a x - b v) / s, eps = a v + b x and x_next = signal x0 + direction eps + sigma noise with the guided v."""
    i_b, i_n = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < count
    o_x = i_b * count + o_n
    a, b, s = tl.load(coefficients_ptr), tl.load(coefficients_ptr + 1), tl.load(coefficients_ptr + 2)
    signal, direction = tl.load(coefficients_ptr + 3), tl.load(coefficients_ptr + 4)
    _, b_v = guided_velocity(cond_ptr, uncond_ptr, o_x, m_n, guidance, GUIDED)
    if RESCALED:
        b_v *= rescale_factor(spread_ptr, i_b, count, programs, rescale, SUMS, BLOCK, BLOCK_P)
    b_x = tl.load(x_ptr + o_x, mask=m_n, other=0.0).to(tl.float32)
    b_x0 = (a * b_x - b * b_v) / s
    b_next = signal * b_x0 + direction * (a * b_v + b * b_x)
    if NOISY:
        b_next += tl.load(coefficients_ptr + 5) * _noise(stream_ptr, i_b, i_n, quads, BLOCK)
    tl.store(next_ptr + o_x, b_next.to(next_ptr.dtype.element_ty), mask=m_n)
    if WANT_X0:
        tl.store(x0_ptr + o_x, b_x0.to(x0_ptr.dtype.element_ty), mask=m_n)


def student_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor | None, tables: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    last = t_next is None
    x_next, x0 = x.new_empty(0) if last else torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        count = x[0].numel()
        student_step_kernel[(triton.cdiv(count, BLOCK), x.shape[0])](
            x, v, t, t if last else t_next, tables, stream, x_next, x0, count, (count + 3) // 4, tables.shape[1],
            LAST=last, BLOCK=BLOCK,
        )  # fmt: skip
    return x_next, x0


def teacher_step(
    x: Tensor, cond: Tensor, uncond: Tensor | None, coefficients: Tensor, stream: Tensor, guidance: float, rescale: float,
    noisy: bool, want_x0: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x_next = torch.empty_like(x)
    x0 = torch.empty_like(x) if want_x0 else x.new_empty(0)
    if not x.numel():
        return x_next, x0
    count, guided = x[0].numel(), uncond is not None
    programs, rescaled = triton.cdiv(count, BLOCK), guided and rescale != 0.0
    grid = (programs, x.shape[0])
    spread = x.new_empty((x.shape[0], SUMS, programs) if rescaled else 0, dtype=torch.float32)
    if rescaled:
        guidance_spread_kernel[grid](cond, uncond, spread, guidance, count, programs, SUMS=SUMS, BLOCK=BLOCK)
    teacher_step_kernel[grid](
        x, cond, uncond if guided else cond, coefficients, stream, spread, x_next, x0, guidance, rescale, count,
        (count + 3) // 4, programs, GUIDED=guided, RESCALED=rescaled, NOISY=noisy, WANT_X0=want_x0, SUMS=SUMS,
        BLOCK_P=min(1024, triton.next_power_of_2(programs)), BLOCK=BLOCK,
    )  # fmt: skip
    return x_next, x0
