"""Sums over the rows of matrices that programs have left in float32, in a fixed order: gradients of weights and biases."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R, BLOCK_C, WARPS = 256, 16, 8  # 32 floats of a thread on their way at once


@triton.jit
def column_sums_kernel(
    partial_ptr, first_ptr, second_ptr, third_ptr, rows, channels,
    THIRD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    size = tl.cast(rows, tl.int64) * channels
    b_first = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_second = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_third = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        m_x = (o_r < rows)[:, None] & m_c[None, :]
        p_x = partial_ptr + o_r[:, None].to(tl.int64) * channels + o_c[None, :]
        b_first += tl.load(p_x, mask=m_x, other=0.0)
        b_second += tl.load(p_x + size, mask=m_x, other=0.0)
        if THIRD:
            b_third += tl.load(p_x + 2 * size, mask=m_x, other=0.0)
    tl.store(first_ptr + o_c, tl.sum(b_first, 0).to(first_ptr.dtype.element_ty), mask=m_c)
    tl.store(second_ptr + o_c, tl.sum(b_second, 0).to(second_ptr.dtype.element_ty), mask=m_c)
    if THIRD:
        tl.store(third_ptr + o_c, tl.sum(b_third, 0).to(third_ptr.dtype.element_ty), mask=m_c)


def column_sums(partial: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
    """``partial`` ``[K, R, C]`` float32 summed over R, for K = 2 or 3 new tensors like those given, ``[C]`` each."""
    _, rows, channels = partial.shape
    out = tuple(torch.empty_like(given) for given in like)
    block_r = min(BLOCK_R, triton.next_power_of_2(rows))
    column_sums_kernel[(triton.cdiv(channels, BLOCK_C),)](
        partial, *out[:2], out[-1], rows, channels, THIRD=len(out) == 3, BLOCK_R=block_r, BLOCK_C=BLOCK_C,
        num_warps=max(1, min(WARPS, block_r * BLOCK_C // 256)),
    )  # fmt: skip
    return out
