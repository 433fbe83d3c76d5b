"""Triton version: all frames of a site and head fit one tile, so that forward and backward read and write everything once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SITES = 4  # sites of one head per program
SITES_OF_TABLES = 32  # the same in a backward pass that sums gradients of tables, of which every program writes its own


@triton.jit
def _program(sites, SITES: tl.constexpr, HEADS: tl.constexpr):
    """Sample, head, first site and number of sites of this program; heads run fastest, since they lie next to each other."""
    i_p = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(sites, SITES)
    i_s = i_p // HEADS % groups * SITES
    return i_p // HEADS // groups, i_p % HEADS, i_s, tl.minimum(sites - i_s, SITES).to(tl.int32)


@triton.jit
def _rows_to_pairs(b_r, i_0, RELATIVE: tl.constexpr, BLOCK_T: tl.constexpr):
    """[query, row of a table] -> [query, key]: for every key the row of its distance."""
    o_q, o_k = tl.arange(0, BLOCK_T)[:, None] + i_0, tl.arange(0, BLOCK_T)[None, :]
    return tl.gather(b_r, tl.minimum(tl.maximum(o_k - o_q, -RELATIVE), RELATIVE) + RELATIVE, 1)


@triton.jit
def _pairs_to_rows(b_p, i_0, RELATIVE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """[query, key] -> [query, row of a table]: the sum over the keys of every row, of which only the outer rows have several."""
    o_q, o_k = tl.arange(0, BLOCK_T)[:, None] + i_0, tl.arange(0, BLOCK_T)[None, :]
    o_r = tl.arange(0, BLOCK_R)[None, :]
    if RELATIVE == 0:
        return tl.where(o_r == 0, tl.sum(b_p, 1)[:, None], 0.0)
    o_l = o_q + o_r - RELATIVE
    b_r = tl.gather(b_p, tl.minimum(tl.maximum(o_l, 0), BLOCK_T - 1), 1)
    b_r = tl.where((o_l >= 0) & (o_l < BLOCK_T) & (o_r < 2 * RELATIVE), b_r, 0.0)
    b_r = tl.where(o_r == 0, tl.sum(tl.where(o_k - o_q <= -RELATIVE, b_p, 0.0), 1)[:, None], b_r)
    return tl.where(o_r == 2 * RELATIVE, tl.sum(tl.where(o_k - o_q >= RELATIVE, b_p, 0.0), 1)[:, None], b_r)


@triton.jit
def _table(table_ptr, dtype, i_0, RELATIVE: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    o_r, o_d = tl.arange(0, BLOCK_R)[:, None] + i_0, tl.arange(0, BLOCK_D)[None, :]
    return tl.load(table_ptr + o_r * DIM + o_d, mask=(o_r <= 2 * RELATIVE) & (o_d < DIM), other=0.0).to(dtype)


@triton.jit
def _logits(
    b_q, b_k, key_ptr, i_0, scale, FRAMES: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Scaled logits [query, key], -inf where a key is not seen; every row sees at least the first key."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if RELATIVE is not None:
        b_a = _table(key_ptr, b_q.dtype, i_0, RELATIVE, DIM, BLOCK_R, BLOCK_D)
        b_s += _rows_to_pairs(tl.dot(b_q, tl.trans(b_a), input_precision="ieee"), i_0, RELATIVE, BLOCK_T)
    b_s = b_s * scale
    o_q, o_k = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_T)[None, :]
    m_s = o_k < FRAMES
    if CAUSAL:
        m_s = m_s & (o_k <= o_q)
    return tl.where(m_s, b_s, float("-inf"))


@triton.jit
def temporal_attention_kernel(
    qkv_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, scale, sites, FRAMES: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, RELATIVE: tl.constexpr, SITES: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale Q K^T) V and the log-sum-exp of the logits, site after site; RELATIVE: largest distance in the tables."""
    i_b, i_h, i_s, count = _program(sites, SITES, HEADS)
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t = o_t < FRAMES
    m_x = m_t[:, None] & (o_d < DIM)[None, :]
    for j in tl.range(0, count, num_stages=1):
        i_0 = (i_s + j >= sites).to(tl.int32)  # always 0: keeps tables and their indices out of registers between sites
        o_r = (i_b * FRAMES + o_t) * sites + i_s + j
        p_q = qkv_ptr + ((o_r * 3 * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
        b_q = tl.load(p_q, mask=m_x, other=0.0)
        b_k = tl.load(p_q + HEADS * DIM, mask=m_x, other=0.0)
        b_v = tl.load(p_q + 2 * HEADS * DIM, mask=m_x, other=0.0)
        b_s = _logits(b_q, b_k, key_ptr, i_0, scale, FRAMES, DIM, CAUSAL, RELATIVE, BLOCK_T, BLOCK_D, BLOCK_R)
        b_max = tl.max(b_s, 1)
        b_p = tl.exp(b_s - b_max[:, None])
        b_sum = tl.sum(b_p, 1)
        b_p = b_p / b_sum[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        if RELATIVE is not None:
            b_e = _table(value_ptr, b_v.dtype, i_0, RELATIVE, DIM, BLOCK_R, BLOCK_D)
            b_r = _pairs_to_rows(b_p, i_0, RELATIVE, BLOCK_T, BLOCK_R)
            b_o = tl.dot(b_r.to(b_v.dtype), b_e, b_o, input_precision="ieee")
        p_o = out_ptr + ((o_r * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
        tl.store(p_o, b_o.to(out_ptr.dtype.element_ty), mask=m_x)
        tl.store(lse_ptr + ((i_b * HEADS + i_h) * sites + i_s + j) * FRAMES + o_t, b_max + tl.log(b_sum), mask=m_t)


@triton.jit
def temporal_attention_backward_kernel(
    grad_ptr, qkv_ptr, lse_ptr, key_ptr, value_ptr, out_ptr, key_out_ptr, value_out_ptr, scale, sites, FRAMES: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, RELATIVE: tl.constexpr, SITES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV, packed as Q, K, V are, and this program's part of the tables' gradients.

    P comes from the log-sum-exp, dS = scale P (dP - rowsum(P dP)).
    """
    i_b, i_h, i_s, count = _program(sites, SITES, HEADS)
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t = o_t < FRAMES
    m_x = m_t[:, None] & (o_d < DIM)[None, :]
    if RELATIVE is not None:
        b_da = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        b_de = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for j in tl.range(0, count, num_stages=1):
        i_0 = (i_s + j >= sites).to(tl.int32)  # always 0: keeps tables and their indices out of registers between sites
        o_r = (i_b * FRAMES + o_t) * sites + i_s + j
        o_q = ((o_r * 3 * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
        p_q = qkv_ptr + o_q
        b_q = tl.load(p_q, mask=m_x, other=0.0)
        b_k = tl.load(p_q + HEADS * DIM, mask=m_x, other=0.0)
        b_v = tl.load(p_q + 2 * HEADS * DIM, mask=m_x, other=0.0)
        b_g = tl.load(grad_ptr + ((o_r * HEADS + i_h) * DIM)[:, None] + o_d[None, :], mask=m_x, other=0.0)
        b_lse = tl.load(lse_ptr + ((i_b * HEADS + i_h) * sites + i_s + j) * FRAMES + o_t, mask=m_t, other=0.0)
        # rows beyond the last frame have b_g = 0 and b_q = 0, and so add nothing below
        b_s = _logits(b_q, b_k, key_ptr, i_0, scale, FRAMES, DIM, CAUSAL, RELATIVE, BLOCK_T, BLOCK_D, BLOCK_R)
        b_p = tl.exp(b_s - b_lse[:, None])
        p_x = out_ptr + o_q
        b_x = tl.dot(tl.trans(b_p.to(b_g.dtype)), b_g, input_precision="ieee")
        tl.store(p_x + 2 * HEADS * DIM, b_x.to(out_ptr.dtype.element_ty), mask=m_x)
        b_dp = tl.dot(b_g, tl.trans(b_v), input_precision="ieee")
        if RELATIVE is not None:
            b_e = _table(value_ptr, b_g.dtype, i_0, RELATIVE, DIM, BLOCK_R, BLOCK_D)
            b_dp += _rows_to_pairs(tl.dot(b_g, tl.trans(b_e), input_precision="ieee"), i_0, RELATIVE, BLOCK_T)
            b_r = _pairs_to_rows(b_p, i_0, RELATIVE, BLOCK_T, BLOCK_R).to(b_g.dtype)
            b_de = tl.dot(tl.trans(b_r), b_g, b_de, input_precision="ieee")
        b_ds32 = scale * b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
        b_ds = b_ds32.to(b_q.dtype)
        b_x = tl.dot(b_ds, b_k, input_precision="ieee")
        if RELATIVE is not None:
            b_a = _table(key_ptr, b_q.dtype, i_0, RELATIVE, DIM, BLOCK_R, BLOCK_D)
            b_r = _pairs_to_rows(b_ds32, i_0, RELATIVE, BLOCK_T, BLOCK_R).to(b_q.dtype)
            b_x = tl.dot(b_r, b_a, b_x, input_precision="ieee")
            b_da = tl.dot(tl.trans(b_r), b_q, b_da, input_precision="ieee")
        tl.store(p_x, b_x.to(out_ptr.dtype.element_ty), mask=m_x)
        b_x = tl.dot(tl.trans(b_ds), b_q, input_precision="ieee")
        tl.store(p_x + HEADS * DIM, b_x.to(out_ptr.dtype.element_ty), mask=m_x)
    if RELATIVE is not None:
        o_r = tl.arange(0, BLOCK_R)
        o_x = (tl.program_id(0).to(tl.int64) * (2 * RELATIVE + 1) + o_r)[:, None] * DIM + o_d[None, :]
        m_r = (o_r <= 2 * RELATIVE)[:, None] & (o_d < DIM)[None, :]
        tl.store(key_out_ptr + o_x, b_da, mask=m_r)
        tl.store(value_out_ptr + o_x, b_de, mask=m_r)


def options(
    frames: int, heads: int, dim: int, causal: bool, relative: int | None, *, backward: bool
) -> tuple[dict[str, int | bool | None], int]:
    """Constants of a kernel and warps per program; matrix products need sides of at least 16."""
    block_t, block_d = max(16, triton.next_power_of_2(frames)), max(16, triton.next_power_of_2(dim))
    block_r = 0 if relative is None else max(16, triton.next_power_of_2(2 * relative + 1))
    sites = SITES_OF_TABLES if backward and relative is not None else SITES
    constants = {"FRAMES": frames, "HEADS": heads, "DIM": dim, "CAUSAL": causal, "RELATIVE": relative, "SITES": sites}
    tile = max(block_t, block_r) * block_d
    few, some = (1, 4 if backward else 2) if relative is None else (2, 8 if backward else 4)
    warps = few if tile <= 1024 else some if tile <= 2048 else 8  # the fewest that keep a tile in registers
    return {**constants, "BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_R": block_r}, warps


def _reachable(frames: int, table: Tensor) -> tuple[int | None, slice]:
    """Largest distance that occurs between frames and is told apart, None without a table, and the rows up to it."""
    if not table.numel():
        return None, slice(0)
    largest = table.shape[0] // 2
    relative = min(largest, frames - 1)
    return relative, slice(largest - relative, largest + relative + 1)


def temporal_attention(
    qkv: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    b, t, s, _, h, d = qkv.shape
    out = qkv.new_empty((b, t, s, h, d))
    lse = qkv.new_empty((b, h, s, t), dtype=torch.float32)
    if qkv.numel():
        relative, rows = _reachable(t, relative_key)
        constants, warps = options(t, h, d, causal, relative, backward=False)
        grid = (b * triton.cdiv(s, constants["SITES"]) * h,)
        tables = relative_key[rows], relative_value[rows]
        temporal_attention_kernel[grid](qkv, *tables, out, lse, scale, s, **constants, num_warps=warps)
    return out, lse


def temporal_attention_backward(
    grad: Tensor, qkv: Tensor, lse: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    b, t, s, _, h, d = qkv.shape
    out = torch.empty_like(qkv)
    gradients = torch.zeros_like(relative_key), torch.zeros_like(relative_value)
    if qkv.numel():
        relative, rows = _reachable(t, relative_key)
        constants, warps = options(t, h, d, causal, relative, backward=True)
        grid = (b * triton.cdiv(s, constants["SITES"]) * h,)
        tables = relative_key[rows], relative_value[rows]
        partial = [qkv.new_empty((*grid, *table.shape), dtype=torch.float32) for table in tables]
        temporal_attention_backward_kernel[grid](grad, qkv, lse, *tables, out, *partial, scale, s, **constants, num_warps=warps)
        for total, part in zip(gradients, partial, strict=True):
            total[rows] = part.sum(0)
    return out, *gradients
