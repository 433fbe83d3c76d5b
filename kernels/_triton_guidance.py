"""Guidance inside Triton kernels: the guided velocity, and the factor that pulls its standard deviation back."""

from __future__ import annotations

import triton
import triton.language as tl

SUMS = 4  # partial sums per program: sum and squares about the mean, of the conditional and of the guided velocity


@triton.jit
def guided_velocity(cond_ptr, uncond_ptr, o_x, m_n, guidance, GUIDED: tl.constexpr):
    """The conditional velocity and ``uncond + guidance (cond - uncond)``, both float32."""
    b_c = tl.load(cond_ptr + o_x, mask=m_n, other=0.0).to(tl.float32)
    if GUIDED:
        b_u = tl.load(uncond_ptr + o_x, mask=m_n, other=0.0).to(tl.float32)
        return b_c, b_u + guidance * (b_c - b_u)
    return b_c, b_c


@triton.jit
def _store_spread(p_sums, programs, b_x, m_n, n):
    """Sum, and sum of squares about the program's own mean, which does not cancel."""
    total = tl.sum(b_x)
    b_d = tl.where(m_n, b_x - total / n, 0.0)
    tl.store(p_sums, total)
    tl.store(p_sums + programs, tl.sum(b_d * b_d))


@triton.jit
def guidance_spread_kernel(cond_ptr, uncond_ptr, spread_ptr, guidance, count, programs, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Partial sums for the standard deviations of the conditional and of the guided velocity."""
    i_b, i_n = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < count
    b_c, b_g = guided_velocity(cond_ptr, uncond_ptr, i_b * count + o_n, m_n, guidance, True)
    n = tl.minimum(count - i_n * BLOCK, BLOCK).to(tl.float32)
    p_sums = spread_ptr + i_b * SUMS * programs + i_n
    _store_spread(p_sums, programs, b_c, m_n, n)
    _store_spread(p_sums + 2 * programs, programs, b_g, m_n, n)


@triton.jit
def _squares(p_sums, count, programs, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sum of squares about the mean of a sample, from its programs' partials in a fixed order."""
    total = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, programs, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        total += tl.load(p_sums + o_p, mask=o_p < programs, other=0.0)
    mean = tl.sum(total) / tl.cast(count, tl.float32)
    squares = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, programs, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_p = o_p < programs
        n = tl.where(m_p, tl.minimum(count - o_p * BLOCK, BLOCK), 1).to(tl.float32)
        shift = tl.where(m_p, tl.load(p_sums + o_p, mask=m_p, other=0.0) / n - mean, 0.0)
        squares += tl.load(p_sums + programs + o_p, mask=m_p, other=0.0) + n * shift * shift
    return tl.sum(squares)


@triton.jit
def rescale_factor(spread_ptr, i_b, count, programs, rescale, SUMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """``rescale std(cond) / std(guided) + 1 - rescale`` of sample i_b, from what ``guidance_spread_kernel`` left, same BLOCK."""
    p_sums = spread_ptr + i_b * SUMS * programs
    cond = _squares(p_sums, count, programs, BLOCK, BLOCK_P)
    guided = _squares(p_sums + 2 * programs, count, programs, BLOCK, BLOCK_P)
    return rescale * tl.sqrt(cond / guided) + (1.0 - rescale)
