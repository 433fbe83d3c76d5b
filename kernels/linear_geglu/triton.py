"""Triton version: one matrix product whose programs hold a tile of the values and the matching tile of the gates."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from fvgen.kernels.geglu.triton import geglu_backward, gelu


class Tiles(NamedTuple):
    """How the product is cut up.

    Attributes:
        block_m, block_n, block_k: rows, channels (of value and of gate each) and depth of a tile.
        persistent: programs per multiprocessor, each of which goes through many tiles; 0 for one program per tile.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    persistent: int = 0


GROUP_M = 8  # tiles of rows that go through the channels together, so that their rows of x and the weight stay in the L2 cache
DEFAULT = Tiles(128, 64, 64, warps=4, stages=3)
MEASURED: dict[
    tuple[int, int, int], Tiles
] = {  # (rows, inner, channels) -> the fastest on one H200 (benchmarks/tune_linear_geglu.py)
    (40960, 320, 1280): Tiles(128, 64, 64, 4, 3, 2),
    (10240, 640, 2560): Tiles(128, 64, 64, 4, 3, 2),
    (640, 1280, 5120): Tiles(128, 64, 64, 4, 3, 2),
    (230400, 320, 1280): Tiles(128, 64, 64, 4, 3, 2),
    (57600, 640, 2560): Tiles(128, 64, 64, 4, 3, 2),
    (14400, 1280, 5120): Tiles(128, 128, 64, 8, 4, 1),
}
POINTERS = Tiles(128, 64, 32, warps=8, stages=3)
POINTERS_FLOAT32 = Tiles(64, 32, 32, warps=8, stages=2)


@triton.jit
def _place(i_t, rows, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and first channel of a tile; GROUP_M tiles of rows run fastest, then the channels."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(channels, BLOCK_N)
    first = i_t // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return (first + i_t % per_group % height) * BLOCK_M, i_t % per_group // height * BLOCK_N


@triton.jit
def _bias(bias_ptr, i_n, channels, HALVES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The bias of a tile's channels as a row: of one half, or of value and gate one after the other."""
    o_h = tl.arange(0, HALVES * BLOCK_N)
    o_n = i_n + o_h % BLOCK_N
    return tl.load(bias_ptr + o_h // BLOCK_N * channels + o_n, mask=o_n < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _descriptor_tile(
    x_desc, weight_desc, bias_ptr, out_desc, i_m, i_n, channels, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS_LAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of the output; what lies outside a tensor is read as zero and not written."""
    b_h = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    if not BIAS_LAST:
        b_h += _bias(bias_ptr, i_n, channels, 2, BLOCK_N)
    for i_k in range(0, inner, BLOCK_K):
        b_x = x_desc.load([i_m, i_k])
        b_w = tl.reshape(weight_desc.load([0, i_n, i_k]), [2 * BLOCK_N, BLOCK_K])
        b_h = tl.dot(b_x, b_w.T, b_h)
    if BIAS_LAST:
        b_h += _bias(bias_ptr, i_n, channels, 2, BLOCK_N)
    b_u, b_g = tl.split(tl.permute(tl.reshape(b_h, [BLOCK_M, 2, BLOCK_N]), [0, 2, 1]))
    out_desc.store([i_m, i_n], (b_u * gelu(b_g, EXACT)).to(out_desc.dtype))


@triton.jit
def descriptor_kernel(
    x_desc, weight_desc, bias_ptr, out_desc, rows, channels, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Tiles by tensor descriptors (TMA): x ``[rows, inner]``, weight ``[2, channels, inner]``, out ``[rows, channels]``."""
    if PERSISTENT:
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(channels, BLOCK_N)
        for i_t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            i_m, i_n = _place(i_t, rows, channels, BLOCK_M, BLOCK_N, GROUP_M)
            # sums that start from anything but zero would make the flattened loop wait for every product
            _descriptor_tile(
                x_desc, weight_desc, bias_ptr, out_desc, i_m, i_n, channels, inner, BLOCK_M, BLOCK_N, BLOCK_K, True, EXACT
            )  # fmt: skip
    else:
        i_m, i_n = _place(tl.program_id(0), rows, channels, BLOCK_M, BLOCK_N, GROUP_M)
        _descriptor_tile(
            x_desc, weight_desc, bias_ptr, out_desc, i_m, i_n, channels, inner, BLOCK_M, BLOCK_N, BLOCK_K, False, EXACT
        )  # fmt: skip


@triton.jit
def pointer_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, channels, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Any sizes and alignment; every axis is masked."""
    i_m, i_n = _place(tl.program_id(0), rows, channels, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < rows, o_n < channels
    p_x = x_ptr + o_m.to(tl.int64)[:, None] * inner + o_k[None, :]
    p_w = weight_ptr + o_n.to(tl.int64)[None, :] * inner + o_k[:, None]
    gates = tl.cast(channels, tl.int64) * inner
    b_u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + _bias(bias_ptr, i_n, channels, 1, BLOCK_N)
    b_g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + _bias(bias_ptr + channels, i_n, channels, 1, BLOCK_N)
    for i_k in range(0, inner, BLOCK_K):
        m_k = i_k + o_k < inner
        m_w = m_k[:, None] & m_n[None, :]
        b_x = tl.load(p_x + i_k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_wu = tl.load(p_w + i_k, mask=m_w, other=0.0)
        b_wg = tl.load(p_w + gates + i_k, mask=m_w, other=0.0)
        b_u = tl.dot(b_x, b_wu, b_u, input_precision="ieee")
        b_g = tl.dot(b_x, b_wg, b_g, input_precision="ieee")
    p_out = out_ptr + o_m.to(tl.int64)[:, None] * channels + o_n[None, :]
    tl.store(p_out, (b_u * gelu(b_g, EXACT)).to(out_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def tiles_for(rows: int, inner: int, channels: int) -> Tiles:
    """The tiles measured at the closest number of rows, or the default."""
    near = [(abs(math.log(rows / m)), tiles) for (m, k, c), tiles in MEASURED.items() if (k, c) == (inner, channels)]
    return min(near)[1] if near else DEFAULT


def descriptors_fit(x: Tensor, weight: Tensor) -> bool:
    """Whether TMA takes these tensors (rows of a multiple of 16 bytes, aligned) and the GPU has it with room for the tiles."""
    if x.element_size() != 2 or x.shape[-1] % 8 or weight.shape[0] % 16 or x.shape[-1] == 0:
        return False
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _grid(rows: int, channels: int, tiles: Tiles) -> int:
    return triton.cdiv(rows, tiles.block_m) * triton.cdiv(channels, tiles.block_n)


def _blocks(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": GROUP_M}


def with_descriptors(x: Tensor, weight: Tensor, bias: Tensor, tiles: Tiles, exact: bool = False) -> Tensor:
    """The operator by :func:`descriptor_kernel`, for tensors that :func:`descriptors_fit` and are not empty."""
    channels, inner = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty((*x.shape[:-1], channels))
    rows, blocks = x.numel() // inner, _blocks(tiles)
    block_m, block_n, block_k = tiles[:3]
    programs = _grid(rows, channels, tiles)
    if tiles.persistent:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        programs = min(programs, tiles.persistent * multiprocessors)
    descriptor_kernel[(programs,)](
        TensorDescriptor(x, [rows, inner], [inner, 1], [block_m, block_k]),
        TensorDescriptor(weight, [2, channels, inner], [channels * inner, inner, 1], [2, block_n, block_k]),
        bias,
        TensorDescriptor(out, [rows, channels], [channels, 1], [block_m, block_n]),
        rows, channels, inner, **blocks, PERSISTENT=tiles.persistent > 0, EXACT=exact,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def with_pointers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The operator by :func:`pointer_kernel`."""
    channels, inner = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty((*x.shape[:-1], channels))
    if out.numel():
        exact = x.dtype == torch.float32
        tiles, rows = POINTERS_FLOAT32 if exact else POINTERS, out.numel() // channels
        options: dict[str, Any] = {**_blocks(tiles), "num_warps": tiles.warps, "num_stages": tiles.stages}
        pointer_kernel[(_grid(rows, channels, tiles),)](
            x, weight, bias, out, rows, channels, inner, EXACT=exact, **options
        )  # fmt: skip
    return out


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.numel() and weight.numel() and descriptors_fit(x, weight):
        channels, inner = weight.shape[0] // 2, weight.shape[1]
        measured = torch.cuda.get_device_capability(x.device)[0] == 9  # others have less room, or need more
        tiles = tiles_for(x.numel() // inner, inner, channels) if measured else DEFAULT
        return with_descriptors(x, weight, bias, tiles)
    return with_pointers(x, weight, bias)


def linear_geglu_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product once more, the gradient of the gate by its own kernel, and two products of the library."""
    rows = math.prod(x.shape[:-1])
    flat = x.reshape(rows, x.shape[-1])
    grad_h = geglu_backward(grad.reshape(rows, grad.shape[-1]), functional.linear(flat, weight, bias))
    return (grad_h @ weight).view_as(x), grad_h.T @ flat, grad_h.sum(0)
