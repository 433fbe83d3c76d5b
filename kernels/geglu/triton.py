"""Triton version: both halves of a row are read once, the product is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_C = 4, 256  # rows and channels per program


@triton.jit
def _cdf(b_g):
    return 0.5 * (1.0 + tl.erf(b_g * 0.7071067811865476))


@triton.jit
def _tile(rows, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row and channel offsets of the program's tile, and its mask."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return o_m, o_c, (o_m < rows) & (o_c < channels)


@triton.jit
def geglu_kernel(x_ptr, out_ptr, rows, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """value * gate Phi(gate)."""
    o_m, o_c, m_x = _tile(rows, channels, BLOCK_M, BLOCK_C)
    p_x = x_ptr + o_m * (2 * channels) + o_c
    b_v = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_g = tl.load(p_x + channels, mask=m_x, other=0.0).to(tl.float32)
    b_out = b_v * (b_g * _cdf(b_g))
    tl.store(out_ptr + o_m * channels + o_c, b_out.to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def geglu_backward_kernel(grad_ptr, x_ptr, out_ptr, rows, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """d value = g gate Phi(gate), d gate = g value (Phi(gate) + gate phi(gate))."""
    o_m, o_c, m_x = _tile(rows, channels, BLOCK_M, BLOCK_C)
    o_x = o_m * (2 * channels) + o_c
    b_v = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_g = tl.load(x_ptr + o_x + channels, mask=m_x, other=0.0).to(tl.float32)
    b_d = tl.load(grad_ptr + o_m * channels + o_c, mask=m_x, other=0.0).to(tl.float32)
    cdf = _cdf(b_g)
    density = 0.3989422804014327 * tl.exp(-0.5 * b_g * b_g)
    tl.store(out_ptr + o_x, (b_d * b_g * cdf).to(out_ptr.dtype.element_ty), mask=m_x)
    tl.store(out_ptr + o_x + channels, (b_d * b_v * (cdf + b_g * density)).to(out_ptr.dtype.element_ty), mask=m_x)


def _sizes(x: Tensor) -> tuple[int, int, tuple[int, int]]:
    channels = x.shape[-1] // 2
    rows = x.numel() // (2 * channels)
    return rows, channels, (triton.cdiv(rows, BLOCK_M), triton.cdiv(channels, BLOCK_C))


def geglu(x: Tensor) -> Tensor:
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    if x.numel():
        rows, channels, grid = _sizes(x)
        geglu_kernel[grid](x, out, rows, channels, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C)
    return out


def geglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        rows, channels, grid = _sizes(x)
        geglu_backward_kernel[grid](grad, x, out, rows, channels, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C)
    return out
