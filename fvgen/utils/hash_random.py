"""Counter-based random numbers: the same for the same seed in every batch.

Uniform numbers and integers are the same on every device too; normal ones up to the rounding of its logarithm and cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64 with wrap-around."""
    x = (x ^ _logical_shift(x, 30)) * _MIX_A
    x = (x ^ _logical_shift(x, 27)) * _MIX_B
    return x ^ _logical_shift(x, 31)


class HashRandom:
    """One independent stream per seed; row ``i`` of every draw depends on ``seeds[i]`` alone.

    Args:
        seeds: ``[B]`` int64; its device is where the numbers are made.
        stream: separates uses that share a seed.
    """

    def __init__(self, seeds: Tensor, stream: int = 0) -> None:
        self._key = _mix(_mix(seeds.to(torch.int64) + _GOLDEN) ^ (stream * 0x5851F42D4C957F2D & 0x7FFFFFFFFFFFFFFF))
        self._next = 0

    @property
    def device(self) -> torch.device:
        return self._key.device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """``[B, *shape]`` float32 of 24 random bits, uniform in [low, high); rounding may yield ``high`` itself."""
        count = math.prod(shape)
        index = torch.arange(self._next, self._next + count, device=self.device)
        self._next += count
        bits = _mix(self._key[:, None] + index * _GOLDEN)
        unit = _logical_shift(bits, 40).to(torch.float32) * 2.0**-24
        return (low + (high - low) * unit).reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """``[B, *shape]`` float32, standard normal (Box-Muller)."""
        radius = torch.sqrt(-2.0 * torch.log(1.0 - self.uniform(*shape)))
        return radius * torch.cos(2.0 * math.pi * self.uniform(*shape))

    def integers(self, high: int, *shape: int) -> Tensor:
        """``[B, *shape]`` int64, uniform in {0 .. high-1}."""
        return (self.uniform(*shape) * high).long()
