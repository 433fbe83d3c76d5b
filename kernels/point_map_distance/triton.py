"""Triton version: points and weights are read once; a program keeps its pixels' gradients while it goes through the maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fvgen.kernels.point_map_distance.reference import NO_DISTANCE


class Tile(NamedTuple):
    """Pixels of one photo that a program takes, and its warps."""

    pixels: int
    warps: int


TILE = Tile(pixels=256, warps=1)  # sums need no barriers in one warp; eight pixels of a thread hide their cost
ENTRIES = tl.constexpr(12)  # of a motion (A | b)
FLOOR = tl.constexpr(NO_DISTANCE)


@triton.jit
def _moved(p_a, x, y, z):
    """A (x, y, z) + b of a motion ``[3, 4]``. b comes first: added last, its low bits are rounded the same way at every pixel."""
    u = tl.load(p_a + 3) + tl.load(p_a) * x + tl.load(p_a + 1) * y + tl.load(p_a + 2) * z
    v = tl.load(p_a + 7) + tl.load(p_a + 4) * x + tl.load(p_a + 5) * y + tl.load(p_a + 6) * z
    w = tl.load(p_a + 11) + tl.load(p_a + 8) * x + tl.load(p_a + 9) * y + tl.load(p_a + 10) * z
    return u, v, w


@triton.jit
def _store_sums(p_sums, blocks, u, v, w, x, y, z):
    """Sums over the pixels of (u, v, w) times (x, y, z, 1), one row of ``blocks`` numbers each."""
    tl.store(p_sums, tl.sum(u * x))
    tl.store(p_sums + blocks, tl.sum(u * y))
    tl.store(p_sums + 2 * blocks, tl.sum(u * z))
    tl.store(p_sums + 3 * blocks, tl.sum(u))
    tl.store(p_sums + 4 * blocks, tl.sum(v * x))
    tl.store(p_sums + 5 * blocks, tl.sum(v * y))
    tl.store(p_sums + 6 * blocks, tl.sum(v * z))
    tl.store(p_sums + 7 * blocks, tl.sum(v))
    tl.store(p_sums + 8 * blocks, tl.sum(w * x))
    tl.store(p_sums + 9 * blocks, tl.sum(w * y))
    tl.store(p_sums + 10 * blocks, tl.sum(w * z))
    tl.store(p_sums + 11 * blocks, tl.sum(w))


@triton.jit
def point_map_distance_kernel(
    depths_ptr, rays_ptr, cameras_ptr, motions_ptr, points_ptr, weights_ptr, out_ptr, partial_ptr, photos, maps, pixels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Distances and their gradients of one photo's pixels; sums over them go to ``partial``."""
    photos, maps, n = tl.cast(photos, tl.int64), tl.cast(maps, tl.int64), tl.cast(pixels, tl.int64)
    blocks = tl.cdiv(n, BLOCK)
    i_t = tl.program_id(0).to(tl.int64)
    i_v, i_p = i_t // blocks, i_t % blocks
    o_p = i_p * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < n
    b_z = tl.load(depths_ptr + i_v * n + o_p, mask=m_p, other=0.0)
    b_x = tl.load(rays_ptr + o_p, mask=m_p, other=0.0)
    b_y = tl.load(rays_ptr + n + o_p, mask=m_p, other=0.0)
    p_camera = cameras_ptr + i_v * ENTRIES
    b_wx, b_wy, b_wz = _moved(p_camera, b_z * b_x, b_z * b_y, b_z)
    b_gx = tl.zeros([BLOCK], tl.float32)
    b_gy = tl.zeros([BLOCK], tl.float32)
    b_gz = tl.zeros([BLOCK], tl.float32)
    b_loss = tl.zeros([BLOCK], tl.float32)
    for m in range(0, maps):
        i_m = i_v * maps + m
        p_x = points_ptr + i_m * 3 * n + o_p
        b_px = tl.load(p_x, mask=m_p, other=0.0)
        b_py = tl.load(p_x + n, mask=m_p, other=0.0)
        b_pz = tl.load(p_x + 2 * n, mask=m_p, other=0.0)
        b_w = tl.load(weights_ptr + i_m * n + o_p, mask=m_p, other=0.0)
        b_rx, b_ry, b_rz = _moved(motions_ptr + i_m * ENTRIES, b_px, b_py, b_pz)
        b_rx, b_ry, b_rz = b_wx - b_rx, b_wy - b_ry, b_wz - b_rz
        b_d = tl.sqrt_rn(b_rx * b_rx + b_ry * b_ry + b_rz * b_rz)
        b_loss += b_d * b_w
        b_f = b_w / tl.maximum(b_d, FLOOR)
        b_rx, b_ry, b_rz = b_rx * b_f, b_ry * b_f, b_rz * b_f
        b_gx += b_rx
        b_gy += b_ry
        b_gz += b_rz
        p_sums = partial_ptr + (photos + i_m) * ENTRIES * blocks + i_p
        _store_sums(p_sums, blocks, -b_rx, -b_ry, -b_rz, b_px, b_py, b_pz)
    b_dx = tl.load(p_camera) * b_gx + tl.load(p_camera + 4) * b_gy + tl.load(p_camera + 8) * b_gz
    b_dy = tl.load(p_camera + 1) * b_gx + tl.load(p_camera + 5) * b_gy + tl.load(p_camera + 9) * b_gz
    b_dz = tl.load(p_camera + 2) * b_gx + tl.load(p_camera + 6) * b_gy + tl.load(p_camera + 10) * b_gz
    tl.store(out_ptr + i_v * n + o_p, b_dx * b_x + b_dy * b_y + b_dz, mask=m_p)
    _store_sums(partial_ptr + i_v * ENTRIES * blocks + i_p, blocks, b_gx, b_gy, b_gz, b_z * b_x, b_z * b_y, b_z)
    tl.store(partial_ptr + photos * (maps + 1) * ENTRIES * blocks + i_t, tl.sum(b_loss))


@triton.jit
def point_map_sums_kernel(partial_ptr, cameras_ptr, motions_ptr, loss_ptr, photos, maps, blocks, BLOCK: tl.constexpr):
    """Rows of ``blocks`` partial sums: 12 of each camera, 12 of each motion; the last program adds those of the loss."""
    photos, n = tl.cast(photos, tl.int64), tl.cast(blocks, tl.int64)
    i_r = tl.program_id(0).to(tl.int64)
    cameras = photos * ENTRIES
    rows = cameras * (maps + 1)
    count = tl.where(i_r == rows, photos * n, n)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        o_p = start + tl.arange(0, BLOCK)
        b_sum += tl.load(partial_ptr + i_r * n + o_p, mask=o_p < count, other=0.0)
    total = tl.sum(b_sum)
    if i_r == rows:
        tl.store(loss_ptr, total)
    elif i_r < cameras:
        tl.store(cameras_ptr + i_r, total)
    else:
        tl.store(motions_ptr + i_r - cameras, total)


def point_map_distance(
    depths: Tensor, rays: Tensor, cameras: Tensor, motions: Tensor, points: Tensor, weights: Tensor, tile: Tile = TILE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    photos, maps, pixels = weights.shape
    out = depths.new_empty(()), torch.empty_like(depths), torch.empty_like(cameras), torch.empty_like(motions)
    loss, d_depths, d_cameras, d_motions = out
    if not depths.numel():
        for x in out:
            x.zero_()
        return out
    blocks = triton.cdiv(pixels, tile.pixels)
    rows = photos * (maps + 1) * ENTRIES.value
    partial = depths.new_empty((rows + photos) * blocks)
    point_map_distance_kernel[(photos * blocks,)](
        depths, rays, cameras, motions, points, weights, d_depths, partial, photos, maps, pixels,
        BLOCK=tile.pixels, num_warps=tile.warps,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(blocks))
    point_map_sums_kernel[(rows + 1,)](partial, d_cameras, d_motions, loss, photos, maps, blocks, BLOCK=block, num_warps=1)
    return out
