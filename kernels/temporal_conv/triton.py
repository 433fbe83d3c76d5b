"""Triton version: an implicit matrix product over (tap, channel), in which a tap is a shift by one frame of rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fvgen.kernels.temporal_conv.reference import ROWS


class Tiles(NamedTuple):
    """How the product is cut up.

    Attributes:
        block_m, block_n, block_k: rows, channels and depth of a tile.
        extra: further channels of the tile, 0 for none: 128 + 32 and 256 + 64 divide widths that no power of two does.
        persistent: programs per multiprocessor, each of which goes through many tiles; 0 for one program per tile.
        group_m: tiles of rows that go through the channels together, so that x and the weight stay in the L2 cache.
    """

    block_m: int
    block_n: int
    extra: int
    block_k: int
    warps: int
    stages: int
    persistent: int = 0
    group_m: int = 8


# (B T S, C, O) -> the fastest that benchmarks/tune_temporal_conv.py found on one H200
MEASURED: dict[tuple[int, int, int], Tiles] = {
    (40960, 320, 320): Tiles(128, 128, 32, 64, 4, 3, 0, 8),
    (10240, 640, 640): Tiles(128, 128, 0, 64, 4, 3, 0, 8),
    (2560, 1280, 1280): Tiles(128, 256, 0, 64, 8, 3, 1, 8),
    (640, 1280, 1280): Tiles(64, 64, 0, 128, 4, 3, 0, 8),
    (230400, 320, 320): Tiles(128, 128, 32, 64, 4, 3, 0, 8),
    (57600, 640, 640): Tiles(256, 128, 0, 64, 8, 3, 1, 8),
    (14400, 1280, 1280): Tiles(128, 256, 0, 64, 8, 3, 1, 8),
    (3600, 1280, 1280): Tiles(128, 128, 32, 64, 4, 3, 0, 8),
}
# the same with statistics, where they change the choice
MEASURED_STATISTICS = {
    **MEASURED,
    (2560, 1280, 1280): Tiles(128, 128, 0, 64, 4, 3),
    (640, 1280, 1280): Tiles(128, 64, 0, 64, 4, 4),
    (57600, 640, 640): Tiles(128, 128, 0, 64, 4, 3),
}
# where nothing was measured: tiles, and how much of the tensor cores' speed they are thought to reach
DEFAULTS = (
    (Tiles(128, 256, 0, 64, 8, 3), 1.0),
    (Tiles(128, 256, 64, 64, 8, 3), 1.0),
    (Tiles(128, 128, 0, 64, 8, 3), 0.95),
    (Tiles(128, 128, 32, 64, 8, 3), 0.95),
    (Tiles(64, 128, 0, 64, 4, 4), 0.8),
    (Tiles(64, 64, 0, 64, 4, 4), 0.6),
)
MULTIPROCESSORS = 132
POINTERS = Tiles(128, 64, 0, 32, 8, 3)
POINTERS_FLOAT32 = Tiles(128, 32, 0, 32, 8, 2)


@triton.jit
def _place(i_t, clips, rows, channels, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, GROUP_M: tl.constexpr):
    """Clip, first row and first channel of a tile; GROUP_M tiles of rows run fastest, then the channels."""
    per_clip = tl.cdiv(rows, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(channels, WIDTH)
    first = i_t // per_group * GROUP_M
    height = tl.minimum(per_clip * clips - first, GROUP_M)
    i_r = first + i_t % per_group % height
    return i_r // per_clip, i_r % per_clip * BLOCK_M, i_t % per_group // height * WIDTH


@triton.jit
def _steps(i_m, rows, sites, blocks, BLOCK_M: tl.constexpr):
    """First and last step of the loop over (tap, block of channels), without taps that lie outside of the clip for all rows."""
    first = (i_m + BLOCK_M <= sites).to(tl.int32)
    last = 3 - (i_m >= rows - sites).to(tl.int32)
    return first * blocks, last * blocks


@triton.jit
def _statistics(
    b_y, partial_ptr, i_b, i_m, i_n, rows, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Mean and squared deviations of each channel over ROWS rows of the rounded tile ``[BLOCK_M, BLOCK_N]``."""
    o_p = i_m // ROWS + tl.arange(0, BLOCK_M // ROWS)
    o_n = i_n + tl.arange(0, BLOCK_N)
    b_left = tl.minimum(rows - o_p * ROWS, ROWS)
    b_count = tl.maximum(b_left, 1).to(tl.float32)
    m_y = tl.arange(0, ROWS)[None, :, None] < b_left[:, None, None]
    b_y = tl.reshape(b_y.to(tl.float32), [BLOCK_M // ROWS, ROWS, BLOCK_N])
    b_mean = tl.sum(tl.where(m_y, b_y, 0.0), 1) / b_count[:, None]
    b_d = tl.where(m_y, b_y - b_mean[:, None, :], 0.0)
    p_out = partial_ptr + (tl.cast(i_b, tl.int64) * tl.cdiv(rows, ROWS) + o_p)[:, None] * (2 * channels) + o_n[None, :]
    m_out = (b_left > 0)[:, None] & (o_n < channels)[None, :]
    tl.store(p_out, b_mean, mask=m_out)
    tl.store(p_out + channels, tl.sum(b_d * b_d, 1), mask=m_out)


@triton.jit
def _statistics_in_parts(
    b_y, partial_ptr, i_b, i_m, i_n, rows, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """:func:`_statistics` of a wide tile in parts, one after the other, which takes fewer registers."""
    if BLOCK_M * BLOCK_N > 4096:
        b_1, b_2 = tl.split(tl.permute(tl.reshape(b_y, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
        _statistics_in_parts(b_1, partial_ptr, i_b, i_m, i_n, rows, channels, BLOCK_M, BLOCK_N // 2, ROWS)
        _statistics_in_parts(b_2, partial_ptr, i_b, i_m, i_n + BLOCK_N // 2, rows, channels, BLOCK_M, BLOCK_N // 2, ROWS)
    else:
        _statistics(b_y, partial_ptr, i_b, i_m, i_n, rows, channels, BLOCK_M, BLOCK_N, ROWS)


@triton.jit
def _finish(
    b_out, bias_ptr, residual_desc, out_desc, partial_ptr, i_b, i_m, i_n, rows, channels,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds bias and residual, rounds, stores; the descriptors leave out what lies outside of the clip and of the channels."""
    if bias_ptr is not None:
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_out += tl.load(bias_ptr + o_n, mask=o_n < channels, other=0.0).to(tl.float32)[None, :]
    if residual_desc is not None:
        b_out += tl.reshape(residual_desc.load([i_b, i_m, i_n]), [BLOCK_M, BLOCK_N]).to(tl.float32)
    b_y = b_out.to(out_desc.dtype)
    out_desc.store([i_b, i_m, i_n], tl.reshape(b_y, [1, BLOCK_M, BLOCK_N]))
    if partial_ptr is not None:
        _statistics_in_parts(b_y, partial_ptr, i_b, i_m, i_n, rows, channels, BLOCK_M, BLOCK_N, ROWS)


@triton.jit
def _descriptor_tile(
    x_desc, weight_desc, weight_desc_2, bias_ptr, residual_desc, residual_desc_2, out_desc, out_desc_2, partial_ptr,
    i_b, i_m, i_n, rows, sites, channels, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of the output. Rows before and after the clip are outside of the descriptor of x, so they are read as zero."""
    blocks = tl.cdiv(inner, BLOCK_K)
    first, last = _steps(i_m, rows, sites, blocks, BLOCK_M)
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EXTRA:
        b_out_2 = tl.zeros([BLOCK_M, EXTRA], tl.float32)
    for i in range(first, last):
        tap = i // blocks
        i_k = i % blocks * BLOCK_K
        i_w = tap * channels + i_n
        b_x = tl.reshape(x_desc.load([i_b, i_m + (tap - 1) * sites, i_k]), [BLOCK_M, BLOCK_K])
        b_out = tl.dot(b_x, weight_desc.load([i_w, i_k]).T, b_out)
        if EXTRA:
            b_out_2 = tl.dot(b_x, weight_desc_2.load([i_w + BLOCK_N, i_k]).T, b_out_2)
    if EXTRA:
        _finish(
            b_out_2, bias_ptr, residual_desc_2, out_desc_2, partial_ptr, i_b, i_m, i_n + BLOCK_N, rows, channels,
            BLOCK_M, EXTRA, ROWS,
        )  # fmt: skip
    _finish(
        b_out, bias_ptr, residual_desc, out_desc, partial_ptr, i_b, i_m, i_n, rows, channels, BLOCK_M, BLOCK_N, ROWS
    )  # fmt: skip


# sizes are not specialised: descriptors gain nothing from it, and every new size would be compiled anew
@triton.jit(do_not_specialize=["clips", "rows", "sites", "channels", "inner"])
def descriptor_kernel(
    x_desc, weight_desc, weight_desc_2, bias_ptr, residual_desc, residual_desc_2, out_desc, out_desc_2, partial_ptr,
    clips, rows, sites, channels, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles by tensor descriptors (TMA).

    They see x as ``[clips, rows, inner]``, weight as ``[3 channels, inner]``, residual and out as ``[clips, rows, channels]``;
    those ending in 2 see the same tensors in blocks of EXTRA channels.
    """
    if PERSISTENT:
        tiles = clips * tl.cdiv(rows, BLOCK_M) * tl.cdiv(channels, BLOCK_N + EXTRA)
        for i_t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            i_b, i_m, i_n = _place(i_t, clips, rows, channels, BLOCK_M, BLOCK_N + EXTRA, GROUP_M)
            _descriptor_tile(
                x_desc, weight_desc, weight_desc_2, bias_ptr, residual_desc, residual_desc_2, out_desc, out_desc_2, partial_ptr,
                i_b, i_m, i_n, rows, sites, channels, inner, BLOCK_M, BLOCK_N, EXTRA, BLOCK_K, ROWS,
            )  # fmt: skip
    else:
        i_b, i_m, i_n = _place(tl.program_id(0), clips, rows, channels, BLOCK_M, BLOCK_N + EXTRA, GROUP_M)
        _descriptor_tile(
            x_desc, weight_desc, weight_desc_2, bias_ptr, residual_desc, residual_desc_2, out_desc, out_desc_2, partial_ptr,
            i_b, i_m, i_n, rows, sites, channels, inner, BLOCK_M, BLOCK_N, EXTRA, BLOCK_K, ROWS,
        )  # fmt: skip


@triton.jit
def pointer_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, partial_ptr, clips, rows, sites, channels, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Any sizes and alignment; every axis is masked."""
    i_b, i_m, i_n = _place(tl.program_id(0), clips, rows, channels, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < channels
    o_b = tl.cast(i_b, tl.int64) * rows
    blocks = tl.cdiv(inner, BLOCK_K)
    first, last = _steps(i_m, rows, sites, blocks, BLOCK_M)
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(first, last):
        tap = i // blocks
        o_x = o_m + (tap - 1) * sites
        o_i = i % blocks * BLOCK_K + o_k
        m_i = o_i < inner
        m_x = ((o_x >= 0) & (o_x < rows))[:, None] & m_i[None, :]
        o_w = (tap * channels + o_n).to(tl.int64)
        b_x = tl.load(x_ptr + (o_b + o_x)[:, None] * inner + o_i[None, :], mask=m_x, other=0.0)
        b_w = tl.load(weight_ptr + o_w[None, :] * inner + o_i[:, None], mask=m_i[:, None] & m_n[None, :], other=0.0)
        b_out = tl.dot(b_x, b_w, b_out, input_precision="ieee")
    o_out = (o_b + o_m)[:, None] * channels + o_n[None, :]
    m_out = (o_m < rows)[:, None] & m_n[None, :]
    if bias_ptr is not None:
        b_out += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        b_out += tl.load(residual_ptr + o_out, mask=m_out, other=0.0).to(tl.float32)
    b_y = b_out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + o_out, b_y, mask=m_out)
    if partial_ptr is not None:
        _statistics(b_y, partial_ptr, i_b, i_m, i_n, rows, channels, BLOCK_M, BLOCK_N, ROWS)


def _grid(clips: int, rows: int, channels: int, tiles: Tiles) -> int:
    return clips * triton.cdiv(rows, tiles.block_m) * triton.cdiv(channels, tiles.block_n + tiles.extra)


def tiles_for(clips: int, rows: int, inner: int, channels: int, statistics: bool = False) -> Tiles:
    """The measured tiles of about as many rows, or the default with the least work for the busiest multiprocessor.

    Args:
        clips, rows, inner, channels: B, T S, C and O.
        statistics: only tiles of whole blocks of rows.
    """
    near = [
        (abs(math.log(clips * rows / m)), tiles)
        for (m, k, n), tiles in (MEASURED_STATISTICS if statistics else MEASURED).items()
        if (k, n) == (inner, channels)
    ]
    if near and min(near)[0] < math.log(2):
        return min(near)[1]

    def cost(choice: tuple[Tiles, float]) -> float:
        tiles, speed = choice
        waves = triton.cdiv(_grid(clips, rows, channels, tiles), MULTIPROCESSORS)
        return waves * tiles.block_m * (tiles.block_n + tiles.extra) / speed

    return min((c for c in DEFAULTS if not (statistics and c[0].block_m % ROWS)), key=cost)[0]


def descriptors_fit(*tensors: Tensor) -> bool:
    """Whether TMA takes these tensors (rows of a multiple of 16 bytes, aligned) and the GPU has it with room for the tiles."""
    for t in tensors:
        if t.element_size() != 2 or t.shape[-1] % 8 or t.data_ptr() % 16:
            return False
    return torch.cuda.get_device_capability(tensors[0].device)[0] in (9, 10)


def _described(t: Tensor, block_m: int, *widths: int) -> list[TensorDescriptor | None]:
    """``[B, T, S, C]`` as ``[B, T S, C]`` in blocks of each of the widths; None for an empty tensor and for a width of 0."""
    if t.numel() == 0:
        return [None for _ in widths]
    clips, frames, sites, channels = t.shape
    shape, strides = [clips, frames * sites, channels], [frames * sites * channels, channels, 1]
    return [TensorDescriptor(t, shape, strides, [1, block_m, n]) if n else None for n in widths]


def with_descriptors(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, tiles: Tiles, partial: Tensor | None = None
) -> Tensor:
    """The operator by :func:`descriptor_kernel`, for tensors that :func:`descriptors_fit` and are not empty."""
    clips, frames, sites, inner = x.shape
    rows, channels = frames * sites, weight.shape[1]
    out = x.new_empty((clips, frames, sites, channels))
    programs = _grid(clips, rows, channels, tiles)
    if tiles.persistent:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        programs = min(programs, tiles.persistent * multiprocessors)
    block_m, block_n, extra, block_k = tiles[:4]
    weights = [TensorDescriptor(weight, [3 * channels, inner], [inner, 1], [n, block_k]) if n else None for n in (block_n, extra)]
    descriptor_kernel[(programs,)](
        *_described(x, block_m, block_k), *weights, bias if bias.numel() else None,
        *_described(residual, block_m, block_n, extra), *_described(out, block_m, block_n, extra), partial,
        clips, rows, sites, channels, inner, BLOCK_M=block_m, BLOCK_N=block_n, EXTRA=extra, BLOCK_K=block_k,
        GROUP_M=tiles.group_m, PERSISTENT=tiles.persistent > 0, ROWS=ROWS, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def with_pointers(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, partial: Tensor | None = None) -> Tensor:
    """The operator by :func:`pointer_kernel`."""
    clips, frames, sites, inner = x.shape
    rows, channels = frames * sites, weight.shape[1]
    out = x.new_empty((clips, frames, sites, channels))
    if out.numel():
        tiles = POINTERS_FLOAT32 if x.dtype == torch.float32 else POINTERS
        pointer_kernel[(_grid(clips, rows, channels, tiles),)](
            x, weight, *(t if t.numel() else None for t in (bias, residual)), out, partial, clips, rows, sites, channels, inner,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m, ROWS=ROWS,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def _forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, partial: Tensor | None = None) -> Tensor:
    if x.numel() and weight.numel() and weight.shape[1] % 8 == 0 and descriptors_fit(x, weight, residual):
        clips, frames, sites, inner = x.shape
        tiles = tiles_for(clips, frames * sites, inner, weight.shape[1], partial is not None)
        return with_descriptors(x, weight, bias, residual, tiles, partial)
    return with_pointers(x, weight, bias, residual, partial)


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return _forward(x, weight, bias, residual)


def temporal_conv_statistics(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    blocks = triton.cdiv(x.shape[1] * x.shape[2], ROWS)
    partial = x.new_empty((x.shape[0], blocks, 2, weight.shape[1]), dtype=torch.float32)
    return _forward(x, weight, bias, x.new_empty(0), partial), partial


def temporal_conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same convolution with the taps reversed and transposed, and one product of the library per tap."""
    none, frames = grad.new_empty(0), x.shape[1]
    grad_x = _forward(grad, weight.flip(0).transpose(1, 2).contiguous(), none, none)
    taps = []
    for k in range(3):
        # frame t of the gradient meets frame t + k - 1 of x
        first, last = max(0, 1 - k), max(0, frames - max(0, k - 1))
        upstream, seen = grad[:, first:last], x[:, first + k - 1 : last + k - 1]
        taps.append(upstream.flatten(0, 2).T @ seen.flatten(0, 2))
    return grad_x, torch.stack(taps), grad.sum((0, 1, 2))
