"""Triton version: channel statistics per block of rows, their combination in a fixed order, then one pass that normalises.

A group that fits into registers is done by one program in a single pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvgen.kernels.group_norm_silu.reference import ROWS, SMALL, beside, is_small


class Blocks(NamedTuple):
    """How a pass is cut up.

    Attributes:
        rows: of a program; tile: rows of them at a time, times BLOCK_C channels.
        unroll: tiles whose loads may be on their way at once, of a pass that writes nothing in between.
        once: the cache is told of what is not read again.
    """

    rows: int
    tile: int
    warps: int
    unroll: int = 1
    once: bool = False


class Joining(NamedTuple):
    """Of the small pass.

    Attributes:
        elements: partial statistics of a group that are on their way at once, at most.
        each: of them for a thread; so few blocks of rows take few warps, down to one that waits for no other.
    """

    elements: int
    each: int

    def tile(self, programs: int, block_j: int) -> dict[str, int]:
        """Tile and warps for this many blocks of rows."""
        block_p = max(1, min(triton.next_power_of_2(programs), self.elements // block_j))
        warps = max(1, min(16, block_p * block_j // (32 * self.each)))
        return {"BLOCK_P": block_p, "BLOCK_J": block_j, "num_warps": warps}


class Single(NamedTuple):
    """Of the pass that has a whole group in one program.

    Attributes:
        most: elements of a group that takes it, see :meth:`limit`.
        each: of them for a thread, unless that takes more than 16 warps.
    """

    most: int
    each: int

    def limit(self, x: Tensor) -> int:
        """Elements of a group that fit into registers: fewer of four bytes, or if rows do not begin at multiples of 16."""
        return self.most if x.element_size() == 2 and x.shape[2] % 16 == 0 else self.most // 2

    def tile(self, elements: int) -> dict[str, int]:
        """Tile and warps for a group of this size."""
        block = triton.next_power_of_2(elements)
        return {"BLOCK": block, "num_warps": max(1, min(16, block // (32 * self.each)))}


BLOCK_C = 64  # whole lines of the cache in half precision
STATISTICS = Blocks(rows=256, tile=16, warps=4, unroll=4)  # these were measured with benchmarks/tune_norms.py
SUMMED = Blocks(rows=64, tile=16, warps=4, once=True)  # where the sum is written on the way
JOINED = Joining(elements=8192, each=4)
NORMALISED = Blocks(rows=32, tile=32, warps=4, once=True)
SINGLE = Single(most=SMALL, each=16)
PROGRAMS = 1024  # as many as keep a large GPU busy: beyond, a program takes more rows, and fewer statistics are to be joined


@triton.jit
def place(channels, programs, rows, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, REVERSED: tl.constexpr):
    """Sample, rows and channels of the program; neighbouring programs share their rows, so that memory is read in order."""
    i_t = tl.program_id(0)
    if REVERSED:
        i_t = tl.num_programs(0) - 1 - i_t
    across = tl.cdiv(channels, BLOCK_C)
    i_x = i_t // across
    i_n, i_p = (i_x // programs).to(tl.int64), i_x % programs
    left = tl.minimum(rows - i_p * ROWS, ROWS)
    return i_x.to(tl.int64), i_n, i_n * rows + i_p * ROWS, left, (i_t % across) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def embedding(emb_ptr, i_n, o_c, channels, m_c, EMB: tl.constexpr):
    """EMB = 0: none, 1: one row for all samples, 2: a row for each."""
    if EMB == 2:
        emb_ptr += i_n * channels
    if EMB:
        return tl.load(emb_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    return tl.zeros(o_c.shape, tl.float32)


@triton.jit
def _load_rows(x_ptr, residual_ptr, o_x, m_x, m_residual, HAS_RESIDUAL: tl.constexpr, ONCE: tl.constexpr):
    """x and the residual as they are stored."""
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
    b_r = b_x
    if HAS_RESIDUAL:
        b_r = tl.load(residual_ptr + o_x, mask=m_residual, other=0.0, eviction_policy="evict_first" if ONCE else "")
    return b_x, b_r


@triton.jit
def statistics_kernel(
    x_ptr, residual_ptr, skip_ptr, emb_ptr, total_ptr, partial_ptr, rows, own, channels, programs,
    HAS_RESIDUAL: tl.constexpr, SKIP: tl.constexpr, EMB: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over ROWS rows.

    Both are taken about the first row, so that a large mean costs no digits, and summed over a tile's rows only at the end, so
    that nothing is waited for but memory; the next tile is on its way while one is worked on. With a residual, or a skip
    connection whose channels follow the ``own`` ones of x (whole blocks), the sum is stored on the way; otherwise the
    embedding only moves the mean.
    """
    i_x, i_n, i_row, left, o_c = place(channels, programs, rows, ROWS, BLOCK_C, False)
    m_c = o_c < channels
    o_r = tl.arange(0, BLOCK_R)
    if SKIP:
        i_c = (tl.program_id(0) % tl.cdiv(channels, BLOCK_C)) * BLOCK_C
        beside = i_c >= own
        source_ptr = tl.where(beside, skip_ptr, x_ptr)
        stride = tl.where(beside, channels - own, own)
        m_own = m_c & (o_c < own)
        p_x = i_row * stride + o_c - tl.where(beside, own, 0)
    else:
        source_ptr, stride, m_own = x_ptr, channels, m_c
        p_x = i_row * channels + o_c
    o_x = p_x[None, :] + o_r[:, None] * stride
    o_total = i_row * channels + o_c[None, :] + o_r[:, None] * channels
    m_r = (o_r < left)[:, None]
    m_x = m_r & m_c[None, :]
    b_x, b_r = _load_rows(source_ptr, residual_ptr, o_x, m_x, m_r & m_own[None, :], HAS_RESIDUAL, ONCE)
    b_emb = embedding(emb_ptr, i_n, o_c, own, m_own, EMB)
    b_pivot = tl.load(source_ptr + p_x, mask=m_c, other=0.0).to(tl.float32)
    if HAS_RESIDUAL or SKIP:
        b_pivot += b_emb
    if HAS_RESIDUAL:
        b_pivot += tl.load(residual_ptr + p_x, mask=m_own, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_r in tl.range(BLOCK_R, ROWS + BLOCK_R, BLOCK_R, loop_unroll_factor=UNROLL):
        o_x += BLOCK_R * stride
        m_r = (i_r + o_r < left)[:, None]
        m_next = m_r & m_c[None, :]
        n_x, n_r = _load_rows(source_ptr, residual_ptr, o_x, m_next, m_r & m_own[None, :], HAS_RESIDUAL, ONCE)
        b_u = b_x.to(tl.float32)
        if HAS_RESIDUAL or SKIP:
            b_u += b_emb[None, :]
        if HAS_RESIDUAL:
            b_u += b_r.to(tl.float32)
        if HAS_RESIDUAL or SKIP:
            b_total = b_u.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + o_total, b_total, mask=m_x)
            b_u = b_total.to(tl.float32)
            o_total += BLOCK_R * channels
        b_u = tl.where(m_x, b_u - b_pivot[None, :], 0.0)
        b_sum += b_u
        b_square += b_u * b_u
        b_x, b_r, m_x = n_x, n_r, m_next
    count = left.to(tl.float32)
    b_off = tl.sum(b_sum, 0) / count
    b_mean = b_pivot + b_off
    if not (HAS_RESIDUAL or SKIP):
        b_mean += b_emb
    p_out = partial_ptr + 2 * i_x * channels + o_c
    tl.store(p_out, b_mean, mask=m_c)
    tl.store(p_out + channels, tl.maximum(tl.sum(b_square, 0) - b_off * b_off * count, 0.0), mask=m_c)


@triton.jit
def combine_kernel(
    partial_ptr, emb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, affine_ptr, eps, rows, channels, groups, programs,
    EMB: tl.constexpr, FOLD: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of a group from those of its channels and blocks of rows, about their first mean.

    Leaves the last pass two numbers per channel: the factor, and what is added before it, or after it with FOLD.
    """
    i_g = tl.program_id(0).to(tl.int64)
    i_n = i_g // groups
    width = channels // groups
    o_j = tl.arange(0, BLOCK_J)
    m_j = o_j < width
    o_c = (i_g % groups) * width + o_j
    p_mean = partial_ptr + 2 * i_n * programs * channels
    pivot = tl.load(p_mean + (i_g % groups) * width)
    b_emb = embedding(emb_ptr, i_n, o_c, channels, m_j, EMB)
    b_w = tl.load(weight_ptr + o_c, mask=m_j, other=0.0).to(tl.float32)
    b_b = tl.load(bias_ptr + o_c, mask=m_j, other=0.0).to(tl.float32)
    size = tl.cast(rows, tl.float32) * tl.cast(width, tl.float32)
    b_sum = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
    b_square = tl.zeros([BLOCK_P, BLOCK_J], tl.float32)
    for first in range(0, programs, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P).to(tl.int64)
        m_p = (o_p < programs)[:, None] & m_j[None, :]
        b_count = tl.minimum(rows - o_p * ROWS, ROWS).to(tl.float32)[:, None]
        p_p = p_mean + 2 * o_p[:, None] * channels + o_c[None, :]
        b_m = tl.where(m_p, tl.load(p_p, mask=m_p, other=0.0) - pivot, 0.0)
        b_sum += b_m * b_count
        b_square += tl.load(p_p + channels, mask=m_p, other=0.0) + b_m * b_m * b_count
    off = tl.sum(tl.sum(b_sum, 1), 0) / size
    variance = tl.maximum(tl.sum(tl.sum(b_square, 1), 0) / size - off * off, 0.0)
    mean, rstd = pivot + off, 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(mean_ptr + i_g, mean)
    tl.store(rstd_ptr + i_g, rstd)
    b_w *= rstd
    b_shift = b_emb - mean
    if FOLD:  # one operation per element; a mean that would cost digits here has already cost x those of half precision
        b_shift = b_shift * b_w + b_b
    p_out = affine_ptr + 2 * i_n * channels + o_c
    tl.store(p_out, b_w, mask=m_j)
    tl.store(p_out + channels, b_shift, mask=m_j)


@triton.jit
def normalise_kernel(
    x_ptr, bias_ptr, affine_ptr, out_ptr, rows, channels, programs, SILU: tl.constexpr, FOLD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """silu((x + emb - mean) rstd weight + bias).

    From the end, since the last rows are those still in the cache. The next tile is on its way while one is worked on.
    """
    _, i_n, i_row, left, o_c = place(channels, programs, rows, ROWS, BLOCK_C, True)
    m_c = o_c < channels
    o_r = tl.arange(0, BLOCK_R)
    o_x = (i_row + o_r)[:, None] * channels + o_c[None, :]
    m_x = (o_r < left)[:, None] & m_c[None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first" if ONCE else "")
    p_a = affine_ptr + 2 * i_n * channels + o_c
    b_w = tl.load(p_a, mask=m_c, other=0.0)
    b_shift = tl.load(p_a + channels, mask=m_c, other=0.0)
    if not FOLD:
        b_b = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    for i_r in range(BLOCK_R, ROWS + BLOCK_R, BLOCK_R):
        o_next, m_next, n_x = o_x, m_x, b_x
        if ROWS > BLOCK_R:
            o_next = o_x + BLOCK_R * channels
            m_next = (i_r + o_r < left)[:, None] & m_c[None, :]
            n_x = tl.load(x_ptr + o_next, mask=m_next, other=0.0, eviction_policy="evict_first" if ONCE else "")
        b_y = b_x.to(tl.float32)
        b_y = b_y * b_w[None, :] + b_shift[None, :] if FOLD else (b_y + b_shift[None, :]) * b_w[None, :] + b_b[None, :]
        if SILU:
            b_y *= tl.sigmoid(b_y)
        tl.store(out_ptr + o_x, b_y.to(out_ptr.dtype.element_ty), mask=m_x)
        b_x, o_x, m_x = n_x, o_next, m_next


@triton.jit
def small_kernel(
    x_ptr, residual_ptr, skip_ptr, emb_ptr, weight_ptr, bias_ptr, total_ptr, mean_ptr, rstd_ptr, out_ptr,
    eps, rows, own, groups, HAS_RESIDUAL: tl.constexpr, SKIP: tl.constexpr, EMB: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole group in registers, its rows of WIDTH channels one behind the other.

    Everything is asked for before anything is waited for. A skip connection's channels follow the ``own`` ones of x.
    """
    i_g = tl.program_id(0)
    channels = groups * WIDTH  # Triton sees that this is a multiple of what WIDTH is one of, and loads 16 bytes at once
    i_n = (i_g // groups).to(tl.int64)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < rows * WIDTH
    o_c = (i_g % groups) * WIDTH + o_x % WIDTH
    o_r = i_n * rows + o_x // WIDTH
    o_x = o_r * channels + o_c
    if SKIP:
        m_own = m_x & (o_c < own)
        o_own = o_r * own + o_c
        p_skip = skip_ptr + o_r * (channels - own) + (o_c - own)
        b_skip = tl.load(p_skip, mask=m_x & (o_c >= own), other=0.0)
    else:
        m_own, o_own = m_x, o_x
    b_x = tl.load(x_ptr + o_own, mask=m_own, other=0.0)
    if HAS_RESIDUAL:
        b_r = tl.load(residual_ptr + o_own, mask=m_own, other=0.0)
    b_emb = embedding(emb_ptr, i_n, o_c, own, m_own, EMB)
    b_w = tl.load(weight_ptr + o_c, mask=m_x, other=0.0)
    b_b = tl.load(bias_ptr + o_c, mask=m_x, other=0.0)
    b_x = b_x.to(tl.float32) + b_emb
    if HAS_RESIDUAL:
        b_x += b_r.to(tl.float32)
    if SKIP:
        b_x += b_skip.to(tl.float32)
    if HAS_RESIDUAL or SKIP:
        b_total = b_x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + o_x, b_total, mask=m_x)
        b_x = b_total.to(tl.float32)
    size = tl.cast(rows, tl.float32) * WIDTH
    mean = tl.sum(b_x, 0) / size
    b_x = tl.where(m_x, b_x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 0) / size + eps)
    b_y = b_x * (b_w.to(tl.float32) * rstd) + b_b.to(tl.float32)
    if SILU:
        b_y *= tl.sigmoid(b_y)
    tl.store(out_ptr + o_x, b_y.to(out_ptr.dtype.element_ty), mask=m_x)
    tl.store(mean_ptr + i_g, mean)
    tl.store(rstd_ptr + i_g, rstd)


def emb_rows(emb: Tensor) -> int:
    return emb.ndim if emb.numel() else 0


def rows_per_program(rows: int, channels: int, least: int) -> int:
    """For ``rows`` in all samples together."""
    each = least
    while each < 4 * least and triton.cdiv(rows, 2 * each) * triton.cdiv(channels, BLOCK_C) >= PROGRAMS:
        each *= 2
    return each


def group_norm_silu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool,
    first: Blocks | None = None, joined: Joining = JOINED, last: Blocks = NORMALISED, single: Single = SINGLE,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, rows, channels = x.shape
    out, total = torch.empty_like(x), torch.empty_like(residual)
    mean, rstd = (x.new_empty((n, groups), dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return out, total, mean, rstd
    if is_small(rows, channels // groups, single.limit(x)):
        _in_one_pass(x, residual, None, weight, bias, emb, total, mean, rstd, out, eps, silu, single)
        return out, total, mean, rstd
    partial, rows_each = _statistics(x, residual, None, emb, total, first)
    summed, added = (total, emb.new_empty(0)) if residual.numel() else (x, emb)
    _apply(summed, partial, weight, bias, added, mean, rstd, out, groups, eps, silu, rows_each, joined, last)
    return out, total, mean, rstd


def group_norm_silu_skip(
    x: Tensor, residual: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool,
    first: Blocks | None = None, joined: Joining = JOINED, last: Blocks = NORMALISED, single: Single = SINGLE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, rows, own = x.shape
    none = x.new_empty(0)
    channels = own + skip.shape[2]
    small = is_small(rows, channels // groups, single.limit(x))
    if not x.numel() or (own % BLOCK_C and not small):
        total = beside(x, residual, skip, emb)
        return group_norm_silu(total, none, weight, bias, none, groups, eps, silu, None, joined, last, single)[0], total
    total = x.new_empty((n, rows, channels))
    out = torch.empty_like(total)
    mean, rstd = (x.new_empty((n, groups), dtype=torch.float32) for _ in range(2))
    if small:
        _in_one_pass(x, residual, skip, weight, bias, emb, total, mean, rstd, out, eps, silu, single)
        return out, total
    partial, rows_each = _statistics(x, residual, skip, emb, total, first)
    _apply(total, partial, weight, bias, none, mean, rstd, out, groups, eps, silu, rows_each, joined, last)
    return out, total


def _in_one_pass(
    x: Tensor, residual: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, emb: Tensor, total: Tensor,
    mean: Tensor, rstd: Tensor, out: Tensor, eps: float, silu: bool, single: Single,
) -> None:  # fmt: skip
    """Fills out, mean, rstd, and total unless it is empty."""
    rows, groups = out.shape[1], mean.shape[1]
    width = out.shape[2] // groups
    small_kernel[(mean.numel(),)](
        x, residual, x if skip is None else skip, emb, weight, bias, total, mean, rstd, out, eps, rows, x.shape[2], groups,
        HAS_RESIDUAL=residual.numel() > 0, SKIP=skip is not None, EMB=emb_rows(emb), SILU=silu, WIDTH=width,
        **single.tile(rows * width),
    )  # fmt: skip


def _statistics(
    x: Tensor, residual: Tensor, skip: Tensor | None, emb: Tensor, total: Tensor, blocks: Blocks | None
) -> tuple[Tensor, int]:
    """Partial statistics per block of rows, and the rows of a block; fills total, which is empty where the sum is x + emb."""
    n, rows, own = x.shape
    channels = own if skip is None else own + skip.shape[2]
    blocks = blocks or (SUMMED if total.numel() else STATISTICS)
    rows_each = rows_per_program(n * rows, channels, blocks.rows)
    programs = triton.cdiv(rows, rows_each)
    partial = x.new_empty((n, programs, 2, channels), dtype=torch.float32)
    statistics_kernel[(n * programs * triton.cdiv(channels, BLOCK_C),)](
        x, residual, x if skip is None else skip, emb, total, partial, rows, own, channels, programs,
        HAS_RESIDUAL=residual.numel() > 0, SKIP=skip is not None, EMB=emb_rows(emb), ROWS=rows_each, BLOCK_R=blocks.tile,
        BLOCK_C=BLOCK_C, UNROLL=blocks.unroll, ONCE=blocks.once and total.numel() > 0, num_warps=blocks.warps,
    )  # fmt: skip
    return partial, rows_each


def _apply(
    x: Tensor, partial: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, mean: Tensor, rstd: Tensor, out: Tensor,
    groups: int, eps: float, silu: bool, rows_each: int, joined: Joining = JOINED, last: Blocks = NORMALISED,
) -> None:  # fmt: skip
    """Fills mean and rstd from the partial statistics, and out from them."""
    n, rows, channels = x.shape
    programs, block_j = partial.shape[1], triton.next_power_of_2(channels // groups)
    affine = mean.new_empty((n, 2, channels))
    fold = x.element_size() == 2
    combine_kernel[(n * groups,)](
        partial, emb, weight, bias, mean, rstd, affine, eps, rows, channels, groups, programs, EMB=emb_rows(emb), FOLD=fold,
        ROWS=rows_each, **joined.tile(programs, block_j),
    )  # fmt: skip
    blocks = triton.cdiv(rows, last.rows)
    normalise_kernel[(n * blocks * triton.cdiv(channels, BLOCK_C),)](
        x, bias, affine, out, rows, channels, blocks, SILU=silu, FOLD=fold, ROWS=last.rows, BLOCK_R=last.tile,
        BLOCK_C=BLOCK_C, ONCE=last.once, num_warps=last.warps,
    )  # fmt: skip


def group_norm_silu_given(
    x: Tensor, partial: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
        _apply(x, partial, weight, bias, x.new_empty(0), mean, rstd, out, groups, eps, silu, ROWS)
    return out
