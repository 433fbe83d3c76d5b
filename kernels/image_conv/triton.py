"""Triton version: nine taps of few channels are the depth, or the width, of one matrix product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, DEPTH_BYTES = 128, 128  # of a tile of all taps
TAKEN = 1024  # pixels of a program that adds up taps


@triton.jit
def from_image_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, height, width, image, channel, row, column, outputs,
    CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The taps of a tile's pixels are gathered once, then multiplied with all outputs. image, channel, row, column: strides."""
    pixels = height * width
    tiles = tl.cdiv(pixels, BLOCK_M)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    o_y = (o_p // width)[:, None] + (o_k % 9 // 3 - 1)[None, :]
    o_x = (o_p % width)[:, None] + (o_k % 3 - 1)[None, :]
    m_k = (o_k < 9 * CHANNELS)[None, :] & (o_p < pixels)[:, None]
    m_x = m_k & (o_y >= 0) & (o_y < height) & (o_x >= 0) & (o_x < width)
    b_x = tl.load(x_ptr + i_n * image + ((o_k // 9 * channel)[None, :] + o_y * row + o_x * column), mask=m_x, other=0.0)
    b_x = b_x.to(weight_ptr.dtype.element_ty)
    p_out = out_ptr + (i_n * pixels + o_p)[:, None] * outputs
    for i_o in range(0, outputs, BLOCK_N):
        o_n = i_o + tl.arange(0, BLOCK_N)
        m_n = o_n < outputs
        p_w = weight_ptr + o_k[:, None] * outputs + o_n[None, :]
        b_w = tl.load(p_w, mask=(o_k < 9 * CHANNELS)[:, None] & m_n[None, :], other=0.0)
        b_out = tl.dot(b_x, b_w, input_precision="ieee")
        if HAS_BIAS:
            b_out += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        tl.store(p_out + o_n[None, :], b_out.to(out_ptr.dtype.element_ty), mask=(o_p < pixels)[:, None] & m_n[None, :])


@triton.jit
def taps_kernel(
    x_ptr, weight_ptr, taps_ptr, pixels, channels, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products of every pixel with every tap and output, one plane ``[pixels]`` for each of the WIDTH."""
    tiles = tl.cdiv(pixels, BLOCK_M)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k, o_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    m_p, m_n = o_p < pixels, o_n < WIDTH
    p_x = x_ptr + (i_n * pixels + o_p)[:, None] * channels + o_k[None, :]
    p_w = weight_ptr + o_k[:, None] * WIDTH + o_n[None, :]
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, channels, BLOCK_K):
        m_k = i_k + o_k < channels
        b_x = tl.load(p_x + i_k, mask=m_p[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first")
        b_w = tl.load(p_w + i_k * WIDTH, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_out = tl.dot(b_x, b_w, b_out, input_precision="ieee")
    p_taps = taps_ptr + i_n * WIDTH * pixels + o_n[None, :].to(tl.int64) * pixels + o_p[:, None]
    tl.store(p_taps, b_out, mask=m_p[:, None] & m_n[None, :])


@triton.jit
def sum_taps_kernel(taps_ptr, bias_ptr, out_ptr, height, width, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[y, x] = bias + the nine taps of the neighbours, of one output of one image."""
    pixels = height * width
    tiles = tl.cdiv(pixels, BLOCK)
    i_plane = (tl.program_id(0) // tiles).to(tl.int64)
    i_o = (i_plane % OUTPUTS).to(tl.int32)
    o_p = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    o_y, o_x = o_p // width, o_p % width
    p_taps = taps_ptr + ((i_plane // OUTPUTS) * 9 * OUTPUTS + i_o) * pixels
    b_out = tl.zeros([BLOCK], tl.float32) + tl.load(bias_ptr + i_o).to(tl.float32)
    for tap in tl.static_range(9):
        y, x = o_y + (tap // 3 - 1), o_x + (tap % 3 - 1)
        m_x = (o_p < pixels) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        p_tap = p_taps + tl.cast(pixels, tl.int64) * (tap * OUTPUTS)
        b_out += tl.load(p_tap + o_p + (tap // 3 - 1) * width + (tap % 3 - 1), mask=m_x, other=0.0)
    tl.store(out_ptr + i_plane * pixels + o_p, b_out, mask=o_p < pixels)


def from_tile(channels: int, outputs: int) -> dict[str, int]:
    """Tile and warps: the gathered taps of a tile stay in registers, so many taps take few pixels."""
    block_k = max(16, triton.next_power_of_2(9 * channels))
    block_n = min(64, max(16, triton.next_power_of_2(outputs)))
    return {"BLOCK_M": min(128, 8192 // block_k), "BLOCK_K": block_k, "BLOCK_N": block_n, "num_warps": 8 if block_k > 32 else 4}


def conv_from_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    outputs = weight.shape[1]
    out = weight.new_empty((n, height, width, outputs))
    if out.numel():
        tile = from_tile(channels, outputs)
        from_image_kernel[(n * triton.cdiv(height * width, tile["BLOCK_M"]),)](
            x, weight, bias, out, height, width, *x.stride(), outputs, CHANNELS=channels, HAS_BIAS=bias.numel() > 0, **tile,
        )  # fmt: skip
    return out


def conv_to_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    n, height, width, channels = x.shape
    taps_wide, pixels = weight.shape[1], height * width
    out = x.new_empty((n, taps_wide // 9, height, width), dtype=torch.float32)
    if out.numel():
        taps = x.new_empty((n, taps_wide, pixels), dtype=torch.float32)
        block_n = max(16, triton.next_power_of_2(taps_wide))
        taps_kernel[(n * triton.cdiv(pixels, PIXELS),)](
            x, weight, taps, pixels, channels, WIDTH=taps_wide,
            BLOCK_M=PIXELS, BLOCK_K=DEPTH_BYTES // x.element_size(), BLOCK_N=block_n, num_warps=8 if block_n > 64 else 4,
        )  # fmt: skip
        sum_taps_kernel[(n * out.shape[1] * triton.cdiv(pixels, TAKEN),)](
            taps, bias, out, height, width, OUTPUTS=out.shape[1], BLOCK=TAKEN, num_warps=4
        )
    return out
