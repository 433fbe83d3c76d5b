"""Triton version: both halves of a row are read once, the product is written once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Of a program of the forward pass.

    Attributes:
        rows, channels: of the product; 16 elements a thread are two loads each of value and gate on their way at once.
        along: neighbouring programs follow each other along a row, not down the rows.
        once: the cache is told that x is not read again.
    """

    rows: int
    channels: int
    warps: int
    along: bool = True
    once: bool = False


FORWARD = Tile(rows=4, channels=256, warps=2)  # measured with benchmarks/tune_norms.py
BLOCK_M, BLOCK_C = 4, 256  # rows and channels per program of the backward pass
FAR = tl.constexpr(32.0)  # Phi(-32) is zero in float32; an infinite gate would make 0 times infinity of it


@triton.jit
def gelu(b_g, EXACT: tl.constexpr):
    """g Phi(g); for half precision as max(g, 0) - |g| Phi(-|g|), with a polynomial for the binary logarithm of Phi(-|g|)."""
    if EXACT:
        b_out = b_g * (0.5 * (1.0 + tl.erf(b_g * 0.7071067811865476)))
    else:
        b_a = tl.minimum(tl.abs(b_g), FAR, propagate_nan=tl.PropagateNan.ALL)
        b_p = -1.760321538313292e-06 * b_a + 6.000193752697669e-05
        b_p = b_p * b_a - 0.0009170437697321177
        b_p = b_p * b_a + 0.008451071567833424
        b_p = b_p * b_a - 0.05383552610874176
        b_p = b_p * b_a - 0.45859789848327637
        b_p = b_p * b_a - 1.1511940956115723
        b_p = b_p * b_a - 1.0
        b_out = tl.maximum(b_g, 0.0) - b_a * tl.exp2(b_p)
    return b_out


@triton.jit
def _cdf(b_g):
    return 0.5 * (1.0 + tl.erf(b_g * 0.7071067811865476))


@triton.jit
def geglu_kernel(
    x_ptr, out_ptr, rows, channels,
    EXACT: tl.constexpr, ALONG: tl.constexpr, ONCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """value * gate Phi(gate)."""
    i_t = tl.program_id(0)
    if ALONG:
        across = tl.cdiv(channels, BLOCK_C)
        i_m, i_c = i_t // across, i_t % across
    else:
        down = tl.cast(tl.cdiv(rows, BLOCK_M), tl.int32)
        i_m, i_c = i_t % down, i_t // down
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_x = (o_m < rows) & (o_c < channels)
    p_x = x_ptr + o_m * (2 * channels) + o_c
    b_v = tl.load(p_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "").to(tl.float32)
    b_g = tl.load(p_x + channels, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "").to(tl.float32)
    tl.store(out_ptr + o_m * channels + o_c, (b_v * gelu(b_g, EXACT)).to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def geglu_backward_kernel(grad_ptr, x_ptr, out_ptr, rows, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """d value = g gate Phi(gate), d gate = g value (Phi(gate) + gate phi(gate))."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_x = (o_m < rows) & (o_c < channels)
    o_x = o_m * (2 * channels) + o_c
    b_v = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_g = tl.load(x_ptr + o_x + channels, mask=m_x, other=0.0).to(tl.float32)
    b_d = tl.load(grad_ptr + o_m * channels + o_c, mask=m_x, other=0.0).to(tl.float32)
    cdf = _cdf(b_g)
    density = 0.3989422804014327 * tl.exp(-0.5 * b_g * b_g)
    tl.store(out_ptr + o_x, (b_d * b_g * cdf).to(out_ptr.dtype.element_ty), mask=m_x)
    tl.store(out_ptr + o_x + channels, (b_d * b_v * (cdf + b_g * density)).to(out_ptr.dtype.element_ty), mask=m_x)


def _sizes(x: Tensor) -> tuple[int, int]:
    channels = x.shape[-1] // 2
    return x.numel() // (2 * channels), channels


def geglu(x: Tensor, tile: Tile = FORWARD) -> Tensor:
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    if x.numel():
        rows, channels = _sizes(x)
        geglu_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(channels, tile.channels),)](
            x, out, rows, channels, EXACT=x.dtype == torch.float32, ALONG=tile.along, ONCE=tile.once,
            BLOCK_M=tile.rows, BLOCK_C=tile.channels, num_warps=tile.warps,
        )  # fmt: skip
    return out


def geglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        rows, channels = _sizes(x)
        grid = triton.cdiv(rows, BLOCK_M), triton.cdiv(channels, BLOCK_C)
        geglu_backward_kernel[grid](grad, x, out, rows, channels, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C)
    return out
