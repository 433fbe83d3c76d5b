"""Triton's Philox stream in plain PyTorch, so that noise drawn inside a kernel can be tested exactly.

Philox4x32-10 of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), with Triton's counter layout (low and high
half of the counter, 0, 0), its mapping of 32 bits to [0, 1) and its Box-Muller transform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_TO_UNIT = 4.6566127342e-10


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, without overflowing int64."""
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit numbers (as int64 in [0, 2^32)) per int64 counter."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high_b, low_b = _multiply(_ROUND_B, c2)
        high_a, low_a = _multiply(_ROUND_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _uniform(bits: Tensor) -> Tensor:
    signed = torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits)
    return torch.where(signed < 0, -signed - 1, signed).float() * torch.tensor(_TO_UNIT, dtype=torch.float32)


def normal(seed: int, counter: Tensor) -> Tensor:
    """Standard normal float32 numbers ``[..., 4]`` for int64 counters ``[...]``."""
    numbers = []
    bits = philox(seed, counter)
    for first, second in (bits[:2], bits[2:]):
        radius = torch.sqrt(-2.0 * torch.log(_uniform(first).clamp_min(1.0e-7)))
        angle = torch.tensor(2 * math.pi, dtype=torch.float32) * _uniform(second)
        numbers += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(numbers, -1)


def normal_like(x: Tensor, seed: int, offset: int) -> Tensor:
    """Float32 noise in the shape of ``x [B, ...]``.

    Element e of sample b is number e mod 4 of counter offset + b ceil(N / 4) + e div 4, N being the elements of a sample. Use a
    new offset, at least B ceil(N / 4) farther on, for each draw.
    """
    batch, count = x.shape[0], math.prod(x.shape[1:])
    quads = (count + 3) // 4
    counter = offset + torch.arange(batch * quads, device=x.device).view(batch, quads)
    return normal(seed, counter).flatten(1)[:, :count].reshape(x.shape).contiguous()
