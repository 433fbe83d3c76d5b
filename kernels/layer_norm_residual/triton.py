"""Triton version: whole rows in registers, so that everything is read and written once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvgen.kernels._triton_sums import column_sums


class Launch(NamedTuple):
    """Of the backward pass, whose programs stay and leave one partial row each for weight and bias.

    Attributes:
        warps: at least; more where a row is longer than two of their tiles.
    """

    warps: int
    per_multiprocessor: int


class Rows(NamedTuple):
    """Of the forward pass, whose programs have some whole rows each.

    Attributes:
        elements: of a tile, rows rounded up to a power of two; one row at least.
        once: the cache is told that x and the residual are not read again.
    """

    elements: int
    warps: int
    once: bool = False

    def tile(self, channels: int) -> dict[str, int]:
        """Tile and warps for rows of this length."""
        block_c = triton.next_power_of_2(channels)
        return {"BLOCK_R": min(64, max(1, self.elements // block_c)), "BLOCK_C": block_c, "num_warps": self.warps}


# measured with benchmarks/tune_norms.py: up to 512 channels a warp holds whole rows, and programs of one warp wait for nobody
IN_A_WARP = 512
NARROW_ROWS, WIDE_ROWS = Rows(elements=1024, warps=1), Rows(elements=4096, warps=4)  # of the forward pass, by the same width
NARROW = Launch(warps=1, per_multiprocessor=16)
WIDE = Launch(warps=4, per_multiprocessor=3)


@triton.jit
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr, eps, rows, channels,
    HAS_RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Statistics in two passes over registers. Everything is asked for before anything is waited for."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < rows, o_c < channels
    m_x = m_r[:, None] & m_c[None, :]
    o_x = o_r[:, None] * channels + o_c[None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
    if HAS_RESIDUAL:
        b_r = tl.load(residual_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
    b_w = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_x = b_x.to(tl.float32)
    if HAS_RESIDUAL:
        b_x += b_r.to(tl.float32)
        b_total = b_x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + o_x, b_total, mask=m_x)
        b_x = b_total.to(tl.float32)
    b_mean = tl.sum(b_x, 1) / channels
    b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 1) / channels + eps)
    b_y = b_x * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(out_ptr + o_x, b_y.to(out_ptr.dtype.element_ty), mask=m_x)
    tl.store(mean_ptr + o_r, b_mean, mask=m_r)
    tl.store(rstd_ptr + o_r, b_rstd, mask=m_r)


@triton.jit
def _load_piece(grad_ptr, grad_total_ptr, total_ptr, o_r, o_c, rows, channels, HAS_RESIDUAL: tl.constexpr, USED: tl.constexpr):
    """dy, dtotal and the sum as they are stored, [BLOCK_R, BLOCK_C] each."""
    m_x = (o_r < rows)[:, None] & (o_c < channels)[None, :]
    o_x = o_r[:, None] * channels + o_c[None, :]
    if USED:
        b_x = tl.load(total_ptr + o_x, mask=m_x, other=0.0)
        b_dy = tl.load(grad_ptr + o_x, mask=m_x, other=0.0)
    else:
        b_x = tl.zeros(o_x.shape, total_ptr.dtype.element_ty)
        b_dy = b_x
    b_dt = b_dy
    if USED and HAS_RESIDUAL:
        b_dt = tl.load(grad_total_ptr + o_x, mask=m_x, other=0.0)
    return b_dy, b_dt, b_x


@triton.jit
def _store_piece(out_ptr, b_g, b_normal, b_dt, b_across, b_along, b_rstd, o_r, o_c, rows, channels, HAS_RESIDUAL: tl.constexpr):
    m_x = (o_r < rows)[:, None] & (o_c < channels)[None, :]
    b_dx = b_rstd[:, None] * (b_g - b_across[:, None] - b_normal * b_along[:, None])
    if HAS_RESIDUAL:
        b_dx += b_dt.to(tl.float32)
    tl.store(out_ptr + o_r[:, None] * channels + o_c[None, :], b_dx.to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def layer_norm_backward_kernel(
    grad_ptr, grad_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, out_ptr, partial_ptr, rows, channels, programs, steps,
    HAS_RESIDUAL: tl.constexpr, HALVES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (w dy - mean(w dy) - xhat mean(w dy xhat)) + dtotal; sums of dy xhat and dy over the program's rows.

    A row longer than BLOCK_C is done as two pieces, so that a warp has whole rows where BLOCK_C is 256 and each thread keeps the
    two sums of its channels in registers to the end. The next rows are on their way while these are worked on.
    """
    i_p = tl.program_id(0).to(tl.int64)
    stride = tl.cast(programs, tl.int64) * BLOCK_R
    o_c = tl.arange(0, BLOCK_C)
    o_d = BLOCK_C + o_c
    o_r = i_p * BLOCK_R + tl.arange(0, BLOCK_R)
    b_wc = tl.load(weight_ptr + o_c, mask=o_c < channels, other=0.0).to(tl.float32)
    b_wd = tl.load(weight_ptr + o_d, mask=o_d < channels, other=0.0).to(tl.float32)
    b_dwc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_dbc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_dwd = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_dbd = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_yc, b_tc, b_xc = _load_piece(grad_ptr, grad_total_ptr, total_ptr, o_r, o_c, rows, channels, HAS_RESIDUAL, True)
    b_yd, b_td, b_xd = _load_piece(grad_ptr, grad_total_ptr, total_ptr, o_r, o_d, rows, channels, HAS_RESIDUAL, HALVES)
    b_mean = tl.load(mean_ptr + o_r, mask=o_r < rows, other=0.0)
    b_rstd = tl.load(rstd_ptr + o_r, mask=o_r < rows, other=0.0)
    for _ in range(0, steps):
        o_n = o_r + stride
        n_yc, n_tc, n_xc = _load_piece(grad_ptr, grad_total_ptr, total_ptr, o_n, o_c, rows, channels, HAS_RESIDUAL, True)
        n_yd, n_td, n_xd = _load_piece(grad_ptr, grad_total_ptr, total_ptr, o_n, o_d, rows, channels, HAS_RESIDUAL, HALVES)
        n_mean = tl.load(mean_ptr + o_n, mask=o_n < rows, other=0.0)
        n_rstd = tl.load(rstd_ptr + o_n, mask=o_n < rows, other=0.0)

        b_normal = (b_xc.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]  # not masked: dy is zero there
        b_g = b_yc.to(tl.float32)
        b_dwc += b_g * b_normal
        b_dbc += b_g
        b_g *= b_wc[None, :]
        b_sum, b_dot = b_g, b_g * b_normal
        if HALVES:
            b_other = (b_xd.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
            b_h = b_yd.to(tl.float32)
            b_dwd += b_h * b_other
            b_dbd += b_h
            b_h *= b_wd[None, :]
            b_sum += b_h
            b_dot += b_h * b_other
        b_across = tl.sum(b_sum, 1) / channels
        b_along = tl.sum(b_dot, 1) / channels
        _store_piece(out_ptr, b_g, b_normal, b_tc, b_across, b_along, b_rstd, o_r, o_c, rows, channels, HAS_RESIDUAL)
        if HALVES:
            _store_piece(out_ptr, b_h, b_other, b_td, b_across, b_along, b_rstd, o_r, o_d, rows, channels, HAS_RESIDUAL)
        o_r, b_mean, b_rstd = o_n, n_mean, n_rstd
        b_yc, b_tc, b_xc, b_yd, b_td, b_xd = n_yc, n_tc, n_xc, n_yd, n_td, n_xd
    p_dw = partial_ptr + i_p * channels
    p_db = p_dw + tl.cast(programs, tl.int64) * channels
    tl.store(p_dw + o_c, tl.sum(b_dwc, 0), mask=o_c < channels)
    tl.store(p_db + o_c, tl.sum(b_dbc, 0), mask=o_c < channels)
    if HALVES:
        tl.store(p_dw + o_d, tl.sum(b_dwd, 0), mask=o_d < channels)
        tl.store(p_db + o_d, tl.sum(b_dbd, 0), mask=o_d < channels)


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, launch: Rows | None = None
) -> tuple[Tensor, ...]:
    rows, channels = x.shape
    out = torch.empty_like(x)
    total = torch.empty_like(residual)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if x.numel():
        launch = launch or (NARROW_ROWS if channels <= IN_A_WARP else WIDE_ROWS)
        tile = launch.tile(channels)
        layer_norm_kernel[(triton.cdiv(rows, tile["BLOCK_R"]),)](
            x, residual, weight, bias, out, total, mean, rstd, eps, rows, channels,
            HAS_RESIDUAL=residual.numel() > 0, ONCE=launch.once, **tile,
        )  # fmt: skip
    return out, total, mean, rstd


def backward_launch(channels: int) -> Launch:
    """By the length of a row."""
    return NARROW if channels <= IN_A_WARP else WIDE


def backward_tile(channels: int, warps: int) -> dict[str, int]:
    """Tiles of 8 elements a thread, two side by side where a row is longer than a warp's 256; and the warps, enough for a row."""
    block_c = triton.next_power_of_2(channels)
    halves = block_c > 256
    block_c //= 1 + halves
    warps = max(warps, block_c // 256)
    return {"HALVES": halves, "BLOCK_R": 256 * warps // block_c, "BLOCK_C": block_c, "num_warps": warps}


def layer_norm_residual_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = total.shape
    out = torch.empty_like(total)
    if not total.numel():
        return out, torch.zeros_like(weight), torch.zeros_like(weight)
    launch = launch or backward_launch(channels)
    tile = backward_tile(channels, launch.warps)
    tiles = triton.cdiv(rows, tile["BLOCK_R"])
    multiprocessors = torch.cuda.get_device_properties(total.device).multi_processor_count
    programs = min(tiles, launch.per_multiprocessor * multiprocessors)
    partial = total.new_empty((2, programs, channels), dtype=torch.float32)
    layer_norm_backward_kernel[(programs,)](
        grad, grad_total, total, weight, mean, rstd, out, partial, rows, channels, programs, triton.cdiv(tiles, programs),
        HAS_RESIDUAL=grad_total.numel() > 0, **tile,
    )  # fmt: skip
    return out, *column_sums(partial, weight, weight)
