"""Triton version: a block of queries stays on chip while it meets first the text, then the image tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvgen.kernels.cross_attention.reference import contexts

BLOCK_L = 32  # tokens that a block of queries meets at a time
PROGRAMS = 256  # about as many for the gradient of a context: each leaves a partial sum


@triton.jit
def _program(per, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Group of rows with common contexts, head, rows of q and their mask; heads run fastest: they are neighbours in memory."""
    i_p = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(per, BLOCK_Q)
    i_g = i_p // HEADS // blocks
    o_s = i_p // HEADS % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return i_g, i_p % HEADS, i_g * per + o_s, o_s < per


@triton.jit
def _tokens(
    kv_ptr, first, i_h, TOKENS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Keys and values of WIDTH tokens of a head, zero past the last token."""
    o_l, o_d = first + tl.arange(0, WIDTH), tl.arange(0, BLOCK_D)
    m_x = (o_l < TOKENS)[:, None] & (o_d < DIM)[None, :]
    p_k = kv_ptr + i_h * DIM + (o_l * (2 * HEADS * DIM))[:, None] + o_d[None, :]
    return tl.load(p_k, mask=m_x, other=0.0), tl.load(p_k + HEADS * DIM, mask=m_x, other=0.0)


@triton.jit
def _logits(b_q, b_k, first, scale, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Scaled logits [query, token], -inf past the last token."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    return tl.where((first + tl.arange(0, WIDTH) < TOKENS)[None, :], b_s, float("-inf"))


@triton.jit
def _meet(
    b_o, b_max, b_sum, b_q, kv_ptr, first, i_h, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of tokens of the softmax in blocks; each has at least one token, so that the maximum is finite."""
    b_k, b_v = _tokens(kv_ptr, first, i_h, TOKENS, WIDTH, HEADS, DIM, BLOCK_D)
    b_s = _logits(b_q, b_k, first, scale, TOKENS, WIDTH)
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp(b_s - b_new[:, None])
    b_old = tl.exp(b_max - b_new)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_old[:, None], input_precision="ieee")
    return b_o, b_new, b_sum * b_old + tl.sum(b_p, 1)


@triton.jit
def _attend(
    b_q, kv_ptr, i_h, scale, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """softmax(scale q k^T) v and the log-sum-exp."""
    FULL: tl.constexpr = TOKENS // BLOCK_L * BLOCK_L
    b_o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, FULL, BLOCK_L):
        b_o, b_max, b_sum = _meet(b_o, b_max, b_sum, b_q, kv_ptr, first, i_h, scale, TOKENS, BLOCK_L, HEADS, DIM, BLOCK_D)
    if TOKENS > FULL:
        WIDTH: tl.constexpr = 16 if TOKENS % BLOCK_L <= 16 else BLOCK_L  # matrix products take sides of at least 16
        b_o, b_max, b_sum = _meet(b_o, b_max, b_sum, b_q, kv_ptr, FULL, i_h, scale, TOKENS, WIDTH, HEADS, DIM, BLOCK_D)
    return b_o / b_sum[:, None], b_max + tl.log(b_sum)


@triton.jit
def cross_attention_kernel(
    q_ptr, text_ptr, image_ptr, out_ptr, lse_ptr, scale, image_scale, per, rows, text_share, image_share,
    TEXT: tl.constexpr, IMAGE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Both branches for one block of queries of a head; IMAGE = 0 leaves the second out."""
    i_g, i_h, o_r, m_r = _program(per, HEADS, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_x = m_r[:, None] & (o_d < DIM)[None, :]
    o_x = ((o_r * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
    b_q = tl.load(q_ptr + o_x, mask=m_x, other=0.0)
    p_kv = text_ptr + i_g // text_share * (TEXT * 2 * HEADS * DIM)
    b_o, b_lse = _attend(b_q, p_kv, i_h, scale, TEXT, HEADS, DIM, BLOCK_Q, BLOCK_L, BLOCK_D)
    p_lse = lse_ptr + i_h * rows + o_r
    tl.store(p_lse, b_lse, mask=m_r)
    if IMAGE:
        p_kv = image_ptr + i_g // image_share * (IMAGE * 2 * HEADS * DIM)
        b_i, b_lse = _attend(b_q, p_kv, i_h, scale, IMAGE, HEADS, DIM, BLOCK_Q, BLOCK_L, BLOCK_D)
        b_o += image_scale * b_i
        tl.store(p_lse + tl.cast(rows, tl.int64) * HEADS, b_lse, mask=m_r)
    tl.store(out_ptr + o_x, b_o.to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def _products(
    b_q, b_g, b_lse, kv_ptr, first, i_h, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys, P and dP = g v^T of one block of tokens."""
    b_k, b_v = _tokens(kv_ptr, first, i_h, TOKENS, WIDTH, HEADS, DIM, BLOCK_D)
    b_p = tl.exp(_logits(b_q, b_k, first, scale, TOKENS, WIDTH) - b_lse[:, None])
    return b_k, b_p, tl.dot(b_g, tl.trans(b_v), input_precision="ieee")


@triton.jit
def _delta(
    b_q, b_g, b_lse, kv_ptr, first, i_h, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, b_p, b_dp = _products(b_q, b_g, b_lse, kv_ptr, first, i_h, scale, TOKENS, WIDTH, HEADS, DIM, BLOCK_D)
    return tl.sum(b_p * b_dp, 1)


@triton.jit
def _add(
    b_dq, b_delta, b_q, b_g, b_lse, kv_ptr, first, i_h, scale, weight,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b_k, b_p, b_dp = _products(b_q, b_g, b_lse, kv_ptr, first, i_h, scale, TOKENS, WIDTH, HEADS, DIM, BLOCK_D)
    b_ds = b_p * (weight * b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def _query_gradient(
    b_dq, b_q, b_g, b_lse, kv_ptr, i_h, scale, weight, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds weight dS k with dS = P (dP - delta), delta = rowsum(P dP) from a first walk over the tokens."""
    FULL: tl.constexpr = TOKENS // BLOCK_L * BLOCK_L
    WIDTH: tl.constexpr = 16 if TOKENS % BLOCK_L <= 16 else BLOCK_L
    b_delta = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, FULL, BLOCK_L):
        b_delta += _delta(b_q, b_g, b_lse, kv_ptr, first, i_h, scale, TOKENS, BLOCK_L, HEADS, DIM, BLOCK_D)
    if TOKENS > FULL:
        b_delta += _delta(b_q, b_g, b_lse, kv_ptr, FULL, i_h, scale, TOKENS, WIDTH, HEADS, DIM, BLOCK_D)
    b_d = weight * b_delta
    for first in range(0, FULL, BLOCK_L):
        b_dq = _add(b_dq, b_d, b_q, b_g, b_lse, kv_ptr, first, i_h, scale, weight, TOKENS, BLOCK_L, HEADS, DIM, BLOCK_D)
    if TOKENS > FULL:
        b_dq = _add(b_dq, b_d, b_q, b_g, b_lse, kv_ptr, FULL, i_h, scale, weight, TOKENS, WIDTH, HEADS, DIM, BLOCK_D)
    return b_dq, b_delta


@triton.jit
def query_gradient_kernel(
    grad_ptr, q_ptr, text_ptr, image_ptr, lse_ptr, delta_ptr, out_ptr, scale, image_scale, per, rows, text_share, image_share,
    TEXT: tl.constexpr, IMAGE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries, and delta of both branches for the gradients of the contexts."""
    i_g, i_h, o_r, m_r = _program(per, HEADS, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_x = m_r[:, None] & (o_d < DIM)[None, :]
    o_x = ((o_r * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
    b_q = tl.load(q_ptr + o_x, mask=m_x, other=0.0)
    b_g = tl.load(grad_ptr + o_x, mask=m_x, other=0.0)
    o_h = i_h * rows + o_r
    b_lse = tl.load(lse_ptr + o_h, mask=m_r, other=0.0)
    p_kv = text_ptr + i_g // text_share * (TEXT * 2 * HEADS * DIM)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_dq, b_delta = _query_gradient(
        b_dq, b_q, b_g, b_lse, p_kv, i_h, scale, 1.0, TEXT, HEADS, DIM, BLOCK_Q, BLOCK_L, BLOCK_D
    )  # fmt: skip
    tl.store(delta_ptr + o_h, b_delta, mask=m_r)
    if IMAGE:
        o_h += tl.cast(rows, tl.int64) * HEADS
        b_lse = tl.load(lse_ptr + o_h, mask=m_r, other=0.0)
        p_kv = image_ptr + i_g // image_share * (IMAGE * 2 * HEADS * DIM)
        b_dq, b_delta = _query_gradient(
            b_dq, b_q, b_g, b_lse, p_kv, i_h, scale, image_scale, IMAGE, HEADS, DIM, BLOCK_Q, BLOCK_L, BLOCK_D
        )  # fmt: skip
        tl.store(delta_ptr + o_h, b_delta, mask=m_r)
    tl.store(out_ptr + o_x, (scale * b_dq).to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def context_gradient_kernel(
    grad_ptr, q_ptr, kv_ptr, lse_ptr, delta_ptr, partial_ptr, scale, weight, share, rows, chunks, steps, contexts,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK = weight scale dS^T q and dV = weight P^T g of a block of tokens, over every chunks-th block of queries."""
    i_p = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(TOKENS, BLOCK_L)
    i_h, i_c = i_p % HEADS, i_p // HEADS % chunks
    i_l, i_m = i_p // HEADS // chunks % blocks, i_p // HEADS // chunks // blocks
    o_l, o_d = i_l * BLOCK_L + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    m_d = (o_d < DIM)[None, :]
    m_l = (o_l < TOKENS)[:, None] & m_d
    b_k, b_v = _tokens(kv_ptr + i_m * (TOKENS * 2 * HEADS * DIM), i_l * BLOCK_L, i_h, TOKENS, BLOCK_L, HEADS, DIM, BLOCK_D)
    b_dk = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for i_s in range(0, steps):
        o_s = (i_s * chunks + i_c) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_s = o_s < share
        o_r = i_m * share + o_s
        o_x = ((o_r * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
        # queries past the last have q = g = delta = 0, and so add nothing
        b_q = tl.load(q_ptr + o_x, mask=m_s[:, None] & m_d, other=0.0)
        b_g = tl.load(grad_ptr + o_x, mask=m_s[:, None] & m_d, other=0.0)
        b_lse = tl.load(lse_ptr + i_h * rows + o_r, mask=m_s, other=0.0)
        b_delta = tl.load(delta_ptr + i_h * rows + o_r, mask=m_s, other=0.0)
        b_p = tl.exp(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision="ieee")
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_g), input_precision="ieee") - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    o_t = (i_c * contexts + i_m) * TOKENS + o_l
    p_k = partial_ptr + ((o_t * 2 * HEADS + i_h) * DIM)[:, None] + o_d[None, :]
    tl.store(p_k, weight * scale * b_dk, mask=m_l)
    tl.store(p_k + HEADS * DIM, weight * b_dv, mask=m_l)


class Tile(NamedTuple):
    """Of a program: queries, and tokens that they meet at a time."""

    queries: int
    tokens: int
    warps: int


FORWARD = Tile(64, 64, 4)  # of heads of up to 64 channels in half precision: the fastest of nine on one H200, or level with it


def options(dtype: torch.dtype, per: int, dim: int, tile: Tile | None = None) -> tuple[dict[str, int], int]:
    """Tile of a program over ``per`` queries and its warps; matrix products need sides of at least 16."""
    block_d = max(16, triton.next_power_of_2(dim))
    if tile is None:
        # wide blocks read the contexts less often, but waste more of a short sequence
        block_q = 32 if dtype == torch.float32 else 128 if per >= 256 and block_d <= 64 else 64
        tile = Tile(block_q, BLOCK_L, 8 if block_q * block_d > 4096 else 4)
    return {"BLOCK_Q": tile.queries, "BLOCK_L": tile.tokens, "BLOCK_D": block_d}, tile.warps


def context_options(dtype: torch.dtype, tokens: int, dim: int) -> tuple[dict[str, int], int]:
    """Tile of a program over a context of ``tokens`` and its warps: all tokens if they fit, so that q and g are read once."""
    block_d = max(16, triton.next_power_of_2(dim))
    most = 32 if dtype == torch.float32 else 128 if block_d <= 64 else 64
    block_l = min(most, max(16, triton.next_power_of_2(tokens)))
    return {"BLOCK_Q": 32, "BLOCK_L": block_l, "BLOCK_D": block_d}, 8 if block_l * block_d > 4096 else 4


def _layout(q: Tensor, text_kv: Tensor, image_kv: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """Runtime sizes of the kernels over queries, and the constants that follow from shapes."""
    n, s, heads, dim = q.shape
    shares = [n // kv.shape[0] for kv in contexts(text_kv, image_kv)]
    common = math.gcd(*shares)  # neighbouring rows that see the same text and image: one longer sequence
    tokens = [kv.shape[1] for kv in contexts(text_kv, image_kv)]
    sizes = (s * common, n * s, shares[0] // common, shares[-1] // common)
    return sizes, {"TEXT": tokens[0], "IMAGE": tokens[1] if len(tokens) > 1 else 0, "HEADS": heads, "DIM": dim}


def cross_attention(
    q: Tensor, text_kv: Tensor, image_kv: Tensor, scale: float, image_scale: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    n, s, heads, dim = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty((len(contexts(text_kv, image_kv)), heads, n, s), dtype=torch.float32)
    if q.numel():
        sizes, constants = _layout(q, text_kv, image_kv)
        if q.dtype != torch.float32 and dim <= 64:
            tile = tile or FORWARD
        blocks, warps = options(q.dtype, sizes[0], dim, tile)
        grid = (n * s // sizes[0] * triton.cdiv(sizes[0], blocks["BLOCK_Q"]) * heads,)
        cross_attention_kernel[grid](
            q, text_kv, image_kv, out, lse, scale, image_scale, *sizes, **constants, **blocks, num_warps=warps
        )  # fmt: skip
    return out, lse


def _context_gradient(grad: Tensor, q: Tensor, kv: Tensor, lse: Tensor, delta: Tensor, scale: float, weight: float) -> Tensor:
    n, s, heads, dim = q.shape
    m, tokens = kv.shape[:2]
    tile, warps = context_options(q.dtype, tokens, dim)
    share, blocks = n * s // m, m * triton.cdiv(tokens, tile["BLOCK_L"])
    query_blocks = triton.cdiv(share, tile["BLOCK_Q"])
    chunks = min(query_blocks, triton.cdiv(PROGRAMS, heads * blocks))
    partial = kv.new_empty((chunks, *kv.shape), dtype=torch.float32)
    context_gradient_kernel[(blocks * chunks * heads,)](
        grad, q, kv, lse, delta, partial, scale, weight, share, n * s, chunks, triton.cdiv(query_blocks, chunks), m,
        TOKENS=tokens, HEADS=heads, DIM=dim, **tile, num_warps=warps,
    )  # fmt: skip
    return partial.sum(0).to(kv.dtype)


def cross_attention_backward(
    grad: Tensor, q: Tensor, text_kv: Tensor, image_kv: Tensor, lse: Tensor, scale: float, image_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(q)
    if not q.numel():
        return out, torch.zeros_like(text_kv), torch.zeros_like(image_kv)
    delta = torch.empty_like(lse)
    sizes, constants = _layout(q, text_kv, image_kv)
    tile, warps = options(q.dtype, sizes[0], q.shape[3])
    grid = (q.shape[0] * q.shape[1] // sizes[0] * triton.cdiv(sizes[0], tile["BLOCK_Q"]) * q.shape[2],)
    query_gradient_kernel[grid](
        grad, q, text_kv, image_kv, lse, delta, out, scale, image_scale, *sizes, **constants, **tile, num_warps=warps
    )  # fmt: skip
    text = _context_gradient(grad, q, text_kv, lse[0], delta[0], scale, 1.0)
    if not image_kv.numel():
        return out, text, torch.zeros_like(image_kv)
    return out, text, _context_gradient(grad, q, image_kv, lse[1], delta[1], scale, image_scale)
