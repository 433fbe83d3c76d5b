"""Triton version: a row in the registers of one program, so that it is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EACH = 32  # entries of a thread: enough loads on their way, and few enough registers for several programs side by side
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_softmax_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr, EXTRA: tl.constexpr):
    """The first BLOCK entries of a row, and EXTRA further ones: 8192 + 1024 where one power of two would take 16384."""
    i_row = tl.program_id(0).to(tl.int64) * length
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + i_row + o_x, mask=o_x < length, other=float("-inf"), eviction_policy="evict_first")
    if EXTRA:
        o_e = BLOCK + tl.arange(0, EXTRA)
        b_e = tl.load(x_ptr + i_row + o_e, mask=o_e < length, other=float("-inf"), eviction_policy="evict_first")
    b_x = b_x.to(tl.float32)
    most = tl.max(b_x, 0)
    if EXTRA:
        b_e = b_e.to(tl.float32)
        most = tl.maximum(most, tl.max(b_e, 0))
    b_x = tl.exp2((b_x - most) * LOG2_E)
    total = tl.sum(b_x, 0)
    if EXTRA:
        b_e = tl.exp2((b_e - most) * LOG2_E)
        total += tl.sum(b_e, 0)
    share = 1.0 / total
    tl.store(out_ptr + i_row + o_x, (b_x * share).to(out_ptr.dtype.element_ty), mask=o_x < length)
    if EXTRA:
        tl.store(out_ptr + i_row + o_e, (b_e * share).to(out_ptr.dtype.element_ty), mask=o_e < length)


def tile(length: int, each: int = EACH) -> dict[str, int]:
    """Blocks and warps for rows of this length; two blocks where that leaves fewer entries unused."""
    block, extra = triton.next_power_of_2(length), 0
    if 256 <= length < block:
        block //= 2
        extra = triton.next_power_of_2(length - block)
        block, extra = (block, extra) if extra < block else (2 * block, 0)
    return {"BLOCK": block, "EXTRA": extra, "num_warps": max(1, min(16, block // (32 * each)))}


def row_softmax(x: Tensor, each: int = EACH) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        length = x.shape[-1]
        row_softmax_kernel[(x.numel() // length,)](x, out, length, **tile(length, each))
    return out
