"""Triton version: programs go along the rows of the output, border included."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Numbers of a row that a program takes, its warps, and whether the cache is told that they are not read again."""

    block: int
    warps: int
    once: bool = True


TILE = Tile(2048, 8, once=False)


@triton.jit
def padded_sum_kernel(
    x_ptr, residual_ptr, fill_ptr, out_ptr, height, width, before, after,
    CHANNELS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """CHANNELS is a constant, so that the compiler sees that pixels begin at multiples of 16 bytes where they do."""
    length = (before + width + after) * CHANNELS
    across = tl.cdiv(length, BLOCK)
    i_t = tl.program_id(0)
    i_row = i_t // across
    rows = before + height + after
    i_n, i_y = (i_row // rows).to(tl.int64), i_row % rows - before
    o_out = i_t % across * BLOCK + tl.arange(0, BLOCK)
    m_out = o_out < length
    o_x = o_out - before * CHANNELS
    m_x = (o_x >= 0) & (o_x < width * CHANNELS) & (i_y >= 0) & (i_y < height)
    i_x = (i_n * height + i_y) * width * CHANNELS
    b_x = tl.load(x_ptr + i_x + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
    if HAS_RESIDUAL:
        b_r = tl.load(residual_ptr + i_x + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
        b_x = (b_x.to(tl.float32) + b_r.to(tl.float32)).to(b_x.dtype)
    b_x = tl.where(m_x, b_x, tl.load(fill_ptr + o_out % CHANNELS, mask=m_out & ~m_x, other=0.0))
    tl.store(out_ptr + i_row.to(tl.int64) * length + o_out, b_x, mask=m_out)


def padded_sum(x: Tensor, residual: Tensor, fill: Tensor, before: int, after: int, tile: Tile = TILE) -> Tensor:
    n, height, width, channels = x.shape
    out = x.new_empty((n, before + height + after, before + width + after, channels))
    if out.numel():
        block = min(tile.block, triton.next_power_of_2(out.shape[2] * channels))
        grid = n * out.shape[1] * triton.cdiv(out.shape[2] * channels, block)
        padded_sum_kernel[(grid,)](
            x, residual, fill, out, height, width, before, after,
            CHANNELS=channels, HAS_RESIDUAL=residual.numel() > 0, BLOCK=block, ONCE=tile.once, num_warps=tile.warps,
        )  # fmt: skip
    return out
