"""Triton version of the backward pass: sums per block of rows, their combination in a fixed order, then the gradient.

A group that fits into registers is done by one program in a single pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvgen.kernels._triton_sums import column_sums
from fvgen.kernels.group_norm_silu.triton import BLOCK_C, Blocks, emb_rows, embedding, place

SUMS = Blocks(rows=256, tile=16, warps=4, unroll=2)  # both measured with benchmarks/tune_norms.py
GRADIENT = Blocks(rows=128, tile=32, warps=4, once=True)
COMBINED = 2048  # elements of the partial sums joined at a time
SMALL, SMALL_WARPS = 4096, 4  # elements of a group (rows x channels, each rounded up to a power of two) in one program


def is_small(rows: int, width: int) -> bool:
    """Whether one program does a whole group of ``rows`` x ``width`` channels."""
    return triton.next_power_of_2(rows) * triton.next_power_of_2(width) <= SMALL


@triton.jit
def _d_silu(b_z):
    b_s = tl.sigmoid(b_z)
    return b_s * (1.0 + b_z * (1.0 - b_s))


@triton.jit
def sums_kernel(
    grad_ptr, grad_total_ptr, x_ptr, emb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, partial_ptr,
    rows, channels, groups, programs, HAS_RESIDUAL: tl.constexpr, EMB: tl.constexpr, EMB_SUMS: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz xhat, xhat and dtotal of each channel over ROWS rows, z being what the SiLU is applied to.

    The last two serve d emb alone. Rows are summed at the end, so that nothing is waited for but memory.
    """
    i_x, i_n, i_row, left, o_c = place(channels, programs, rows, ROWS, BLOCK_C, False)
    m_c = o_c < channels
    o_g = i_n * groups + o_c // (channels // groups)
    b_shift = embedding(emb_ptr, i_n, o_c, channels, m_c, EMB) - tl.load(mean_ptr + o_g, mask=m_c, other=0.0)
    b_rstd = tl.load(rstd_ptr + o_g, mask=m_c, other=0.0)
    b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32) * b_rstd
    b_b = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    o_r = tl.arange(0, BLOCK_R)
    o_x = (i_row + o_r)[:, None] * channels + o_c[None, :]
    b_dz_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_dot = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_dt_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_r in tl.range(0, ROWS, BLOCK_R, loop_unroll_factor=UNROLL):
        m_x = (i_r + o_r < left)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptr + o_x + i_r * channels, mask=m_x, other=0.0).to(tl.float32) + b_shift[None, :]
        b_dz = tl.load(grad_ptr + o_x + i_r * channels, mask=m_x, other=0.0).to(tl.float32)
        if SILU:
            b_dz *= _d_silu(b_x * b_w[None, :] + b_b[None, :])
        b_dz_sum += b_dz
        b_dot += b_dz * b_x
        if EMB_SUMS:
            b_sum += tl.where(m_x, b_x, 0.0)
            if HAS_RESIDUAL:
                b_dt_sum += tl.load(grad_total_ptr + o_x + i_r * channels, mask=m_x, other=0.0).to(tl.float32)
    p_out = partial_ptr + 4 * i_x * channels + o_c
    tl.store(p_out, tl.sum(b_dz_sum, 0), mask=m_c)
    tl.store(p_out + channels, tl.sum(b_dot, 0) * b_rstd, mask=m_c)
    if EMB_SUMS:
        tl.store(p_out + 2 * channels, tl.sum(b_sum, 0) * b_rstd, mask=m_c)
        tl.store(p_out + 3 * channels, tl.sum(b_dt_sum, 0), mask=m_c)


@triton.jit
def combine_backward_kernel(
    partial_ptr, weight_ptr, rstd_ptr, means_ptr, sums_ptr, grad_emb_ptr, rows, channels, groups, programs, samples,
    EMB_SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Sums over all rows: one row per sample for weight and bias, the two means of a group for dx, and d emb."""
    i_g = tl.program_id(0).to(tl.int64)
    i_n = i_g // groups
    width = channels // groups
    o_j = tl.arange(0, BLOCK_J)
    m_j = o_j < width
    o_c = (i_g % groups) * width + o_j
    b_dz = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
    b_dot = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
    b_x = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
    b_dt = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
    for first in range(0, programs, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_p = (o_p < programs)[:, None] & m_j[None, :]
        p_p = partial_ptr + 4 * (i_n * programs + o_p)[:, None] * channels + o_c[None, :]
        b_dz += tl.load(p_p, mask=m_p, other=0.0)
        b_dot += tl.load(p_p + channels, mask=m_p, other=0.0)
        if EMB_SUMS:
            b_x += tl.load(p_p + 2 * channels, mask=m_p, other=0.0)
            b_dt += tl.load(p_p + 3 * channels, mask=m_p, other=0.0)
    b_dz_sum, b_dot_sum = tl.sum(b_dz, 0), tl.sum(b_dot, 0)
    b_w = tl.load(weight_ptr + o_c, mask=m_j, other=0.0).to(tl.float32)
    size = tl.cast(rows, tl.float32) * tl.cast(width, tl.float32)
    across, along = tl.sum(b_w * b_dz_sum, 0) / size, tl.sum(b_w * b_dot_sum, 0) / size
    tl.store(means_ptr + 2 * i_g, across)
    tl.store(means_ptr + 2 * i_g + 1, along)
    p_sums = sums_ptr + i_n * channels + o_c
    tl.store(p_sums, b_dot_sum, mask=m_j)
    tl.store(p_sums + tl.cast(samples, tl.int64) * channels, b_dz_sum, mask=m_j)
    if EMB_SUMS:
        b_de = tl.load(rstd_ptr + i_g) * (b_w * b_dz_sum - tl.cast(rows, tl.float32) * across - along * tl.sum(b_x, 0))
        b_de += tl.sum(b_dt, 0)
        tl.store(grad_emb_ptr + i_n * channels + o_c, b_de.to(grad_emb_ptr.dtype.element_ty), mask=m_j)


@triton.jit
def _load_tile(grad_ptr, grad_total_ptr, x_ptr, o_x, m_x, HAS_RESIDUAL: tl.constexpr, ONCE: tl.constexpr):
    """x, dy and dtotal as they are stored."""
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
    b_dy = tl.load(grad_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
    b_dt = b_dy
    if HAS_RESIDUAL:
        b_dt = tl.load(grad_total_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
    return b_x, b_dy, b_dt


@triton.jit
def gradient_kernel(
    grad_ptr, grad_total_ptr, x_ptr, emb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, means_ptr, out_ptr,
    rows, channels, groups, programs, HAS_RESIDUAL: tl.constexpr, EMB: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """dx = rstd (weight dz - mean(weight dz) - xhat mean(weight dz xhat)) + dtotal.

    From the end, since the last rows are those still in the cache. The next tile is on its way while one is worked on.
    """
    _, i_n, i_row, left, o_c = place(channels, programs, rows, ROWS, BLOCK_C, True)
    m_c = o_c < channels
    o_r = tl.arange(0, BLOCK_R)
    o_x = (i_row + o_r)[:, None] * channels + o_c[None, :]
    m_x = (o_r < left)[:, None] & m_c[None, :]
    b_x, b_dz, b_dt = _load_tile(grad_ptr, grad_total_ptr, x_ptr, o_x, m_x, HAS_RESIDUAL, ONCE)
    o_g = i_n * groups + o_c // (channels // groups)
    b_shift = embedding(emb_ptr, i_n, o_c, channels, m_c, EMB) - tl.load(mean_ptr + o_g, mask=m_c, other=0.0)
    b_rstd = tl.load(rstd_ptr + o_g, mask=m_c, other=0.0)
    b_across = tl.load(means_ptr + 2 * o_g, mask=m_c, other=0.0) * b_rstd
    b_along = tl.load(means_ptr + 2 * o_g + 1, mask=m_c, other=0.0) * b_rstd * b_rstd
    b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32) * b_rstd
    b_b = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    for i_r in range(BLOCK_R, ROWS + BLOCK_R, BLOCK_R):
        o_next = o_x + BLOCK_R * channels
        m_next = (i_r + o_r < left)[:, None] & m_c[None, :]
        n_x, n_dz, n_dt = _load_tile(grad_ptr, grad_total_ptr, x_ptr, o_next, m_next, HAS_RESIDUAL, ONCE)
        b_u = b_x.to(tl.float32) + b_shift[None, :]
        b_d = b_dz.to(tl.float32)
        if SILU:
            b_d *= _d_silu(b_u * b_w[None, :] + b_b[None, :])
        b_dx = b_d * b_w[None, :] - (b_u * b_along[None, :] + b_across[None, :])
        if HAS_RESIDUAL:
            b_dx += b_dt.to(tl.float32)
        tl.store(out_ptr + o_x, b_dx.to(out_ptr.dtype.element_ty), mask=m_x)
        b_x, b_dz, b_dt, o_x, m_x = n_x, n_dz, n_dt, o_next, m_next


@triton.jit
def small_backward_kernel(
    grad_ptr, grad_total_ptr, x_ptr, emb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr, grad_emb_ptr, out_ptr,
    rows, groups, samples, HAS_RESIDUAL: tl.constexpr, EMB: tl.constexpr, EMB_SUMS: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The whole group in registers."""
    i_g = tl.program_id(0)
    channels = groups * WIDTH  # as in the forward pass, so that 16 bytes are loaded at once
    i_n = (i_g // groups).to(tl.int64)
    o_r, o_j = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_J)
    m_j = o_j < WIDTH
    m_x = (o_r < rows)[:, None] & m_j[None, :]
    o_c = (i_g % groups) * WIDTH + o_j
    o_x = (i_n * rows + o_r)[:, None] * channels + o_c[None, :]
    b_x, b_dy, b_dt = _load_tile(grad_ptr, grad_total_ptr, x_ptr, o_x, m_x, HAS_RESIDUAL, False)
    rstd = tl.load(rstd_ptr + i_g)
    b_shift = embedding(emb_ptr, i_n, o_c, channels, m_j, EMB) - tl.load(mean_ptr + i_g)
    b_w = tl.load(weight_ptr + o_c, mask=m_j, other=0.0).to(tl.float32)
    b_b = tl.load(bias_ptr + o_c, mask=m_j, other=0.0).to(tl.float32)
    b_normal = tl.where(m_x, (b_x.to(tl.float32) + b_shift[None, :]) * rstd, 0.0)
    b_dz = b_dy.to(tl.float32)
    if SILU:
        b_dz *= _d_silu(b_normal * b_w[None, :] + b_b[None, :])
    b_dz_sum, b_dot = tl.sum(b_dz, 0), tl.sum(b_dz * b_normal, 0)
    size = tl.cast(rows, tl.float32) * WIDTH
    across, along = tl.sum(b_w * b_dz_sum, 0) / size, tl.sum(b_w * b_dot, 0) / size
    b_dx = rstd * (b_dz * b_w[None, :] - across - b_normal * along)
    if HAS_RESIDUAL:
        b_dx += b_dt.to(tl.float32)
    tl.store(out_ptr + o_x, b_dx.to(out_ptr.dtype.element_ty), mask=m_x)
    p_sums = sums_ptr + i_n * channels + o_c
    tl.store(p_sums, b_dot, mask=m_j)
    tl.store(p_sums + tl.cast(samples, tl.int64) * channels, b_dz_sum, mask=m_j)
    if EMB_SUMS:
        b_de = tl.sum(tl.where(m_x, b_dx, 0.0), 0)
        tl.store(grad_emb_ptr + i_n * channels + o_c, b_de.to(grad_emb_ptr.dtype.element_ty), mask=m_j)


def group_norm_silu_backward(
    grad: Tensor, grad_total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, silu: bool, first: Blocks = SUMS, last: Blocks = GRADIENT, warps: int = SMALL_WARPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, rows, channels = x.shape
    out, shared = torch.empty_like(x), emb_rows(emb) == 1
    if not x.numel():
        return out, torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(emb)
    sums = x.new_empty((2 + shared, n, channels), dtype=torch.float32)
    grad_emb = sums[2] if shared else torch.empty_like(emb)
    has_residual, width = grad_total.numel() > 0, channels // groups
    block_j = triton.next_power_of_2(width)
    options = {"HAS_RESIDUAL": has_residual, "EMB": 0 if has_residual else emb_rows(emb), "SILU": silu}
    given = grad, grad_total, x, emb, weight, bias, mean, rstd
    if is_small(rows, width):
        small_backward_kernel[(n * groups,)](
            *given, sums, grad_emb, out, rows, groups, n, EMB_SUMS=emb.numel() > 0, **options,
            WIDTH=width, BLOCK_R=triton.next_power_of_2(rows), BLOCK_J=block_j, num_warps=warps,
        )  # fmt: skip
    else:
        programs, across = triton.cdiv(rows, first.rows), triton.cdiv(channels, BLOCK_C)
        partial = x.new_empty((n, programs, 4, channels), dtype=torch.float32)
        means = x.new_empty((n, groups, 2), dtype=torch.float32)
        sums_kernel[(n * programs * across,)](
            *given, partial, rows, channels, groups, programs, EMB_SUMS=emb.numel() > 0, **options,
            ROWS=first.rows, BLOCK_R=first.tile, BLOCK_C=BLOCK_C, UNROLL=first.unroll, num_warps=first.warps,
        )  # fmt: skip
        combine_backward_kernel[(n * groups,)](
            partial, weight, rstd, means, sums, grad_emb, rows, channels, groups, programs, n, EMB_SUMS=emb.numel() > 0,
            BLOCK_P=max(1, min(triton.next_power_of_2(programs), COMBINED // block_j)), BLOCK_J=block_j, num_warps=8,
        )  # fmt: skip
        blocks = triton.cdiv(rows, last.rows)
        gradient_kernel[(n * blocks * across,)](
            *given, means, out, rows, channels, groups, blocks, **options,
            ROWS=last.rows, BLOCK_R=last.tile, BLOCK_C=BLOCK_C, ONCE=last.once, num_warps=last.warps,
        )  # fmt: skip
    return (out, *column_sums(sums, weight, bias, emb)) if shared else (out, *column_sums(sums, weight, bias), grad_emb)
