"""Triton version: whole rows in registers, so that everything is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a forward tile of whole rows; the backward pass holds more of them and takes half
PROGRAMS = 512  # at most, in the backward pass: each leaves one partial row for weight and bias


@triton.jit
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr, eps, rows, channels,
    HAS_RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics in two passes over registers."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < rows, o_c < channels
    m_x = m_r[:, None] & m_c[None, :]
    o_x = o_r[:, None] * channels + o_c[None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_x += tl.load(residual_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_total = b_x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + o_x, b_total, mask=m_x)
        b_x = b_total.to(tl.float32)
    b_mean = tl.sum(b_x, 1) / channels
    b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 1) / channels + eps)
    b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_x * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(out_ptr + o_x, b_y.to(out_ptr.dtype.element_ty), mask=m_x)
    tl.store(mean_ptr + o_r, b_mean, mask=m_r)
    tl.store(rstd_ptr + o_r, b_rstd, mask=m_r)


@triton.jit
def layer_norm_backward_kernel(
    grad_ptr, grad_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, out_ptr, partial_ptr, rows, channels, programs, steps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (w dy - mean(w dy) - xhat mean(w dy xhat)) + dtotal; sums of dy xhat and dy over the program's rows."""
    i_p = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK_C], tl.float32)
    b_db = tl.zeros([BLOCK_C], tl.float32)
    for i_s in range(0, steps):
        o_r = (i_s * programs + i_p) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        m_x = m_r[:, None] & m_c[None, :]
        o_x = o_r[:, None] * channels + o_c[None, :]
        b_mean = tl.load(mean_ptr + o_r, mask=m_r, other=0.0)
        b_rstd = tl.load(rstd_ptr + o_r, mask=m_r, other=0.0)
        b_x = tl.load(total_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.where(m_x, (b_x - b_mean[:, None]) * b_rstd[:, None], 0.0)
        b_dy = tl.load(grad_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dw += tl.sum(b_dy * b_x, 0)
        b_db += tl.sum(b_dy, 0)
        b_dy *= b_w[None, :]
        b_across = tl.sum(b_dy, 1) / channels
        b_along = tl.sum(b_dy * b_x, 1) / channels
        b_dx = b_rstd[:, None] * (b_dy - b_across[:, None] - b_x * b_along[:, None])
        if HAS_RESIDUAL:
            b_dx += tl.load(grad_total_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
        tl.store(out_ptr + o_x, b_dx.to(out_ptr.dtype.element_ty), mask=m_x)
    p_out = partial_ptr + i_p * channels + o_c
    tl.store(p_out, b_dw, mask=m_c)
    tl.store(p_out + tl.cast(programs, tl.int64) * channels, b_db, mask=m_c)


def layer_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    rows, channels = x.shape
    out = torch.empty_like(x)
    total = torch.empty_like(residual)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if x.numel():
        block_c = triton.next_power_of_2(channels)
        block_r = min(64, max(1, TILE // block_c))
        layer_norm_kernel[(triton.cdiv(rows, block_r),)](
            x, residual, weight, bias, out, total, mean, rstd, eps, rows, channels,
            HAS_RESIDUAL=residual.numel() > 0, BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip
    return out, total, mean, rstd


def layer_norm_residual_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = total.shape
    out = torch.empty_like(total)
    if not total.numel():
        return out, torch.zeros_like(weight), torch.zeros_like(weight)
    block_c = triton.next_power_of_2(channels)
    block_r = min(64, max(1, TILE // 2 // block_c))
    tiles = triton.cdiv(rows, block_r)
    programs = min(tiles, PROGRAMS)
    partial = total.new_empty((2, programs, channels), dtype=torch.float32)
    layer_norm_backward_kernel[(programs,)](
        grad, grad_total, total, weight, mean, rstd, out, partial, rows, channels, programs, triton.cdiv(tiles, programs),
        HAS_RESIDUAL=grad_total.numel() > 0, BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(1).unbind(0)
    # copies: an operator must not return two views of one tensor
    return out, grad_weight.to(weight.dtype, copy=True), grad_bias.to(weight.dtype, copy=True)
