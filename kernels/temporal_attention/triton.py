"""Triton version: all frames of a site and head fit one tile, so that forward and backward read and write everything once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SITES = 4  # sites of one head per program


@triton.jit
def _program(sites, SITES: tl.constexpr, HEADS: tl.constexpr):
    """Sample, head, first site and number of sites of this program; heads run fastest, since they lie next to each other."""
    i_p = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(sites, SITES)
    i_s = i_p // HEADS % groups * SITES
    return i_p // HEADS // groups, i_p % HEADS, i_s, tl.minimum(sites - i_s, SITES).to(tl.int32)


@triton.jit
def _logits(b_q, b_k, scale, FRAMES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr):
    """Scaled logits [query, key], -inf where a key is not seen; every row sees at least the first key."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    o_q, o_k = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_T)[None, :]
    m_s = o_k < FRAMES
    if CAUSAL:
        m_s = m_s & (o_k <= o_q)
    return tl.where(m_s, b_s, float("-inf"))


@triton.jit
def temporal_attention_kernel(
    qkv_ptr, out_ptr, lse_ptr, scale, sites, FRAMES: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    CAUSAL: tl.constexpr, SITES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale Q K^T) V and the log-sum-exp of the logits, site after site."""
    i_b, i_h, i_s, count = _program(sites, SITES, HEADS)
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t = o_t < FRAMES
    m_x = m_t[:, None] & (o_d < DIM)[None, :]
    for j in tl.range(0, count, num_stages=1):
        o_r = (i_b * FRAMES + o_t) * sites + i_s + j
        p_q = qkv_ptr + ((o_r * 3 * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
        b_q = tl.load(p_q, mask=m_x, other=0.0)
        b_k = tl.load(p_q + HEADS * DIM, mask=m_x, other=0.0)
        b_v = tl.load(p_q + 2 * HEADS * DIM, mask=m_x, other=0.0)
        b_s = _logits(b_q, b_k, scale, FRAMES, CAUSAL, BLOCK_T)
        b_max = tl.max(b_s, 1)
        b_p = tl.exp(b_s - b_max[:, None])
        b_sum = tl.sum(b_p, 1)
        b_p = b_p / b_sum[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        p_o = out_ptr + ((o_r * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
        tl.store(p_o, b_o.to(out_ptr.dtype.element_ty), mask=m_x)
        tl.store(lse_ptr + ((i_b * HEADS + i_h) * sites + i_s + j) * FRAMES + o_t, b_max + tl.log(b_sum), mask=m_t)


@triton.jit
def temporal_attention_backward_kernel(
    grad_ptr, qkv_ptr, lse_ptr, out_ptr, scale, sites, FRAMES: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    CAUSAL: tl.constexpr, SITES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV, packed as Q, K, V are; P from the log-sum-exp, dS = scale P (dP - rowsum(P dP))."""
    i_b, i_h, i_s, count = _program(sites, SITES, HEADS)
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t = o_t < FRAMES
    m_x = m_t[:, None] & (o_d < DIM)[None, :]
    for j in tl.range(0, count, num_stages=1):
        o_r = (i_b * FRAMES + o_t) * sites + i_s + j
        o_q = ((o_r * 3 * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
        p_q = qkv_ptr + o_q
        b_q = tl.load(p_q, mask=m_x, other=0.0)
        b_k = tl.load(p_q + HEADS * DIM, mask=m_x, other=0.0)
        b_v = tl.load(p_q + 2 * HEADS * DIM, mask=m_x, other=0.0)
        b_g = tl.load(grad_ptr + ((o_r * HEADS + i_h) * DIM)[:, None] + o_d[None, :], mask=m_x, other=0.0)
        b_lse = tl.load(lse_ptr + ((i_b * HEADS + i_h) * sites + i_s + j) * FRAMES + o_t, mask=m_t, other=0.0)
        # rows beyond the last frame have b_g = 0 and b_q = 0, and so add nothing below
        b_p = tl.exp(_logits(b_q, b_k, scale, FRAMES, CAUSAL, BLOCK_T) - b_lse[:, None])
        p_x = out_ptr + o_q
        b_x = tl.dot(tl.trans(b_p.to(b_g.dtype)), b_g, input_precision="ieee")
        tl.store(p_x + 2 * HEADS * DIM, b_x.to(out_ptr.dtype.element_ty), mask=m_x)
        b_dp = tl.dot(b_g, tl.trans(b_v), input_precision="ieee")
        b_ds = (scale * b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])).to(b_q.dtype)
        b_x = tl.dot(b_ds, b_k, input_precision="ieee")
        tl.store(p_x, b_x.to(out_ptr.dtype.element_ty), mask=m_x)
        b_x = tl.dot(tl.trans(b_ds), b_q, input_precision="ieee")
        tl.store(p_x + HEADS * DIM, b_x.to(out_ptr.dtype.element_ty), mask=m_x)


def options(frames: int, heads: int, dim: int, causal: bool, *, backward: bool) -> tuple[dict[str, int | bool], int]:
    """Constants of a kernel and warps per program; matrix products need sides of at least 16."""
    block_t, block_d = max(16, triton.next_power_of_2(frames)), max(16, triton.next_power_of_2(dim))
    constants = {"FRAMES": frames, "HEADS": heads, "DIM": dim, "CAUSAL": causal, "SITES": SITES}
    tile = block_t * block_d
    warps = 1 if tile <= 1024 else 8 if tile > 2048 else 4 if backward else 2  # the fewest that keep a tile in registers
    return {**constants, "BLOCK_T": block_t, "BLOCK_D": block_d}, warps


def temporal_attention(
    qkv: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    b, t, s, _, h, d = qkv.shape
    out = qkv.new_empty((b, t, s, h, d))
    lse = qkv.new_empty((b, h, s, t), dtype=torch.float32)
    if qkv.numel():
        constants, warps = options(t, h, d, causal, backward=False)
        grid = (b * triton.cdiv(s, SITES) * h,)
        temporal_attention_kernel[grid](qkv, out, lse, scale, s, **constants, num_warps=warps)
    return out, lse


def temporal_attention_backward(
    grad: Tensor, qkv: Tensor, lse: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    b, t, s, _, h, d = qkv.shape
    out = torch.empty_like(qkv)
    if qkv.numel():
        constants, warps = options(t, h, d, causal, backward=True)
        grid = (b * triton.cdiv(s, SITES) * h,)
        temporal_attention_backward_kernel[grid](grad, qkv, lse, out, scale, s, **constants, num_warps=warps)
    return out, torch.zeros_like(relative_key), torch.zeros_like(relative_value)
