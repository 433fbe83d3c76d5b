"""Procedural textures that look like photographed surfaces: 1/f noise under tiles, stripes, wood, spots, print; mip-mapped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.utils.hash_random import HashRandom

TEXTURE_SIZE = 256
TEXTURES = 14
_LEVELS = 7


@dataclass(frozen=True)
class TextureBank:
    """Mip pyramids of ``TEXTURES`` periodic textures per world.

    Attributes:
        texels: ``[B * TEXTURES * stride, 3]`` colour, all levels of a texture behind one another.
        stride: texels per texture.
    """

    texels: Tensor
    stride: int


def _spectral_noise(random: HashRandom, count: int, low: float, high: float) -> Tensor:
    """Periodic Gaussian noise ``[B, count, S, S]`` with amplitude spectrum 1/f^a, a uniform in [low, high], unit variance."""
    n = TEXTURE_SIZE
    white = random.normal(count, n, n)
    fy = torch.fft.fftfreq(n, device=white.device)[:, None] * n
    fx = torch.fft.rfftfreq(n, device=white.device)[None] * n
    frequency = torch.sqrt(fy * fy + fx * fx).clamp_min(1.0)
    exponent = random.uniform(count, low=low, high=high)[..., None, None]
    spectrum = torch.fft.rfft2(white) * frequency.pow(-exponent)
    spectrum[..., 0, 0] = 0
    noise = torch.fft.irfft2(spectrum, s=(n, n))
    return noise / noise.std(dim=(-2, -1), keepdim=True)


def _patterns(random: HashRandom, warp: Tensor) -> Tensor:
    """One of nine structures per texture, ``[B, M, S, S]`` in [0, 1]; ``warp`` bends the straight lines."""
    m, n = warp.shape[1], warp.shape[-1]
    axis = torch.arange(n, device=warp.device) / n
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    bend = random.uniform(m, high=0.02)[..., None, None]
    u, v = u + bend * warp, v + bend * warp.roll(n // 3, -1)

    def repeats(high: int) -> Tensor:
        return (1 + random.integers(high, m))[..., None, None].float()

    def edge(x: Tensor, sharp: float = 12.0) -> Tensor:
        return torch.sigmoid(sharp * x)

    tau = 2 * math.pi
    ku, kv = 2 * repeats(8), 2 * repeats(8)
    row = torch.floor(v * kv)
    joint_u = torch.cos(tau * (u * ku / 2 + 0.5 * (row % 2)))
    bricks = 1 - edge(torch.maximum(joint_u, torch.cos(tau * v * kv)) - 0.93, 60.0)
    tiles = 1 - edge(torch.maximum(torch.cos(tau * u * ku), torch.cos(tau * v * ku)) - 0.97, 80.0)
    stripes = edge(torch.sin(tau * u * ku))
    checker = edge(torch.sin(tau * u * ku / 2) * torch.sin(tau * v * ku / 2), 20.0)
    wood = 0.5 + 0.5 * torch.sin(3 * tau * (u * repeats(6) + 0.12 * warp))
    spots = edge(torch.cos(tau * u * ku) * torch.cos(tau * v * kv) - 0.55, 15.0)
    letters = random.uniform(m, n // 8, n // 4).repeat_interleave(8, -2).repeat_interleave(4, -1)
    lines = (torch.sin(tau * v * 16) > 0).float()
    print_ = 1 - lines * (letters > 0.45).float()
    plain = torch.full_like(bricks, 0.5)
    table = torch.stack([plain, plain, bricks, tiles, stripes, checker, wood, spots, print_], 2)
    kind = random.integers(table.shape[2], m)[..., None, None, None].expand(-1, -1, 1, n, n)
    return table.gather(2, kind).squeeze(2)


def make_textures(random: HashRandom) -> TextureBank:
    """Draws the bank of every world of the batch."""
    m = TEXTURES
    light = _spectral_noise(random, m, 0.7, 1.6)
    structure = _patterns(random, _spectral_noise(random, m, 1.5, 2.2))
    chroma = _spectral_noise(random, 2 * m, 1.0, 1.8).unflatten(1, (m, 2))

    def per_texture(low: float, high: float) -> Tensor:
        return random.uniform(m, low=low, high=high)[..., None, None]

    luma = per_texture(0.15, 0.95) + per_texture(0.0, 0.5) * (structure - 0.5) + per_texture(0.01, 0.16) * light
    hue = 0.055 * random.normal(m, 2)[..., None, None]
    accent = 0.08 * random.normal(m, 2)[..., None, None]
    mottle = per_texture(0.0, 0.015)[:, :, None]
    cb, cr = (hue + accent * (structure[:, :, None] - 0.5) + mottle * chroma).unbind(2)
    rgb = torch.stack([luma + 1.4 * cr, luma - 0.34 * cb - 0.71 * cr, luma + 1.77 * cb], 2).clamp(0.01, 1.0)

    level = rgb.flatten(0, 1)
    levels = []
    for _ in range(_LEVELS):
        levels.append(level.permute(0, 2, 3, 1).flatten(1, 2))
        level = F.avg_pool2d(level, 2)
    texels = torch.cat(levels, 1)
    return TextureBank(texels.flatten(0, 1).contiguous(), texels.shape[1])


def sample_textures(bank: TextureBank, texture: Tensor, uv: Tensor, footprint: Tensor) -> Tensor:
    """Trilinear look-up.

    Args:
        texture: ``[...]`` int64, texture number counted over all worlds of the batch.
        uv: ``[..., 2]`` in texture periods.
        footprint: ``[...]`` size of a pixel on the surface, in texture periods.

    Returns:
        ``[..., 3]`` colour.
    """
    level = torch.log2((footprint * TEXTURE_SIZE).clamp(1.0, 2.0 ** (_LEVELS - 1)))
    low = level.floor().clamp(max=_LEVELS - 2)
    share = (level - low)[..., None]
    base = texture * bank.stride
    low = low.long()
    return (1 - share) * _bilinear(bank, base, uv, low) + share * _bilinear(bank, base, uv, low + 1)


def _bilinear(bank: TextureBank, base: Tensor, uv: Tensor, level: Tensor) -> Tensor:
    size = TEXTURE_SIZE >> level
    # texels before a level: the sum of (S / 2^k)^2 over the finer ones
    start = base + (TEXTURE_SIZE * TEXTURE_SIZE - size * size) * 4 // 3
    xy = uv * size[..., None] - 0.5
    corner = xy.floor()
    fx, fy = (xy - corner).unbind(-1)
    x0, y0 = corner.long().unbind(-1)
    wrap = size - 1  # sizes are powers of two
    result = torch.zeros(*uv.shape[:-1], 3, device=uv.device)
    for dy, wy in ((0, 1 - fy), (1, fy)):
        for dx, wx in ((0, 1 - fx), (1, fx)):
            index = start + ((y0 + dy) & wrap) * size + ((x0 + dx) & wrap)
            result = result + (wx * wy)[..., None] * bank.texels[index]
    return result
