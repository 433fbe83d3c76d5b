"""Triton version: one pass for the normaliser, one that writes the gradient; a short one before them for the guidance rescale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvgen.kernels._triton_guidance import SUMS, guidance_spread_kernel, guided_velocity, rescale_factor
from fvgen.kernels.score_weighting.reference import DIVERGENCES, EPSILON

BLOCK = 2048  # elements of one sample per program


@triton.jit
def _total(sums_ptr, i_b, kind: tl.constexpr, programs, SUMS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sum of one partial over the programs of a sample, in a fixed order."""
    total = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, programs, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        total += tl.load(sums_ptr + (i_b * SUMS + kind) * programs + o_p, mask=o_p < programs, other=0.0)
    return tl.sum(total)


@triton.jit
def distance_kernel(
    x0_ptr, x_tau_ptr, cond_ptr, uncond_ptr, fake_ptr, tau_ptr, tables_ptr, spread_ptr, sums_ptr, guidance, rescale, count,
    programs, steps, GUIDED: tl.constexpr, RESCALED: tl.constexpr, SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of |x0 - mu_real| and of (mu_fake - mu_real)^2."""
    i_b, i_n = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < count
    o_x = i_b * count + o_n
    t = tl.load(tau_ptr + i_b)
    a, b, s = tl.load(tables_ptr + t), tl.load(tables_ptr + steps + t), tl.load(tables_ptr + 2 * steps + t)
    _, b_g = guided_velocity(cond_ptr, uncond_ptr, o_x, m_n, guidance, GUIDED)
    if RESCALED:
        b_g *= rescale_factor(spread_ptr, i_b, count, programs, rescale, SUMS, BLOCK, BLOCK_P)
    b_real = (a * tl.load(x_tau_ptr + o_x, mask=m_n, other=0.0).to(tl.float32) - b * b_g) / s
    b_distance = tl.abs(tl.load(x0_ptr + o_x, mask=m_n, other=0.0).to(tl.float32) - b_real)
    b_difference = b / s * (b_g - tl.load(fake_ptr + o_x, mask=m_n, other=0.0).to(tl.float32))
    p_sums = sums_ptr + i_b * SUMS * programs + i_n
    tl.store(p_sums, tl.sum(b_distance))
    tl.store(p_sums + programs, tl.sum(b_difference * b_difference))


@triton.jit
def gradient_kernel(
    cond_ptr, uncond_ptr, fake_ptr, logits_ptr, tau_ptr, tables_ptr, spread_ptr, sums_ptr, out_ptr, statistics_ptr, guidance,
    rescale, clip, count, programs, steps, epsilon, DIVERGENCE: tl.constexpr, GUIDED: tl.constexpr, RESCALED: tl.constexpr,
    SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g = h(r) (mu_fake - mu_real) / m."""
    i_b, i_n = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < count
    o_x = i_b * count + o_n
    t = tl.load(tau_ptr + i_b)
    b, s = tl.load(tables_ptr + steps + t), tl.load(tables_ptr + 2 * steps + t)
    l = tl.load(logits_ptr + i_b).to(tl.float32)
    h = l * 0.0 + 1.0
    if DIVERGENCE == 1:
        h = 1.0 / (1.0 + tl.exp(l))
    if DIVERGENCE == 2:
        h = 1.0 / (1.0 + tl.exp(-l))
    if DIVERGENCE == 3:
        h = tl.minimum(tl.exp(l), clip)
    if DIVERGENCE == 4:
        h = tl.minimum(tl.exp(-l), clip)
    n = tl.cast(count, tl.float32)
    m = _total(sums_ptr, i_b, 0, programs, SUMS, BLOCK_P) / n + epsilon
    _, b_g = guided_velocity(cond_ptr, uncond_ptr, o_x, m_n, guidance, GUIDED)
    if RESCALED:
        b_g *= rescale_factor(spread_ptr, i_b, count, programs, rescale, SUMS, BLOCK, BLOCK_P)
    b_difference = b / s * (b_g - tl.load(fake_ptr + o_x, mask=m_n, other=0.0).to(tl.float32))
    tl.store(out_ptr + o_x, (h / m * b_difference).to(out_ptr.dtype.element_ty), mask=m_n)
    if i_n == 0:
        root = tl.sqrt(_total(sums_ptr, i_b, 1, programs, SUMS, BLOCK_P) / n)
        tl.store(statistics_ptr + i_b * 4, m)
        tl.store(statistics_ptr + i_b * 4 + 1, h)
        tl.store(statistics_ptr + i_b * 4 + 2, root)
        tl.store(statistics_ptr + i_b * 4 + 3, h / m * root)


def score_weighting(
    x0: Tensor, x_tau: Tensor, v_real: Tensor, v_uncond: Tensor, v_fake: Tensor, logits: Tensor, tau: Tensor, tables: Tensor,
    guidance: float, rescale: float, divergence: str, clip: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty_like(x0)
    statistics = x0.new_empty((x0.shape[0], 4), dtype=torch.float32)
    if not x0.numel():
        return out, statistics
    count, steps, guided = x0[0].numel(), tables.shape[1], v_uncond.numel() > 0
    programs = triton.cdiv(count, BLOCK)
    grid = (programs, x0.shape[0])
    options = {"GUIDED": guided, "SUMS": SUMS, "BLOCK": BLOCK}
    block_p = min(1024, triton.next_power_of_2(programs))
    spread, sums = x0.new_empty((2, x0.shape[0], SUMS, programs), dtype=torch.float32).unbind(0)
    rescaled = guided and rescale != 0.0
    if rescaled:
        guidance_spread_kernel[grid](v_real, v_uncond, spread, guidance, count, programs, SUMS=SUMS, BLOCK=BLOCK)
    options |= {"RESCALED": rescaled, "BLOCK_P": block_p}
    distance_kernel[grid](
        x0, x_tau, v_real, v_uncond, v_fake, tau, tables, spread, sums, guidance, rescale, count, programs, steps, **options
    )
    gradient_kernel[grid](
        v_real, v_uncond, v_fake, logits, tau, tables, spread, sums, out, statistics, guidance, rescale, clip, count, programs,
        steps, EPSILON, DIVERGENCE=DIVERGENCES.index(divergence), **options,
    )  # fmt: skip
    return out, statistics
