"""Where samplers get their noise: a function of the shape, so that a recorded sequence can stand in for a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fvgen.kernels.noise_injection import noise_injection

NoiseSource = Callable[[Sequence[int]], Tensor]


def seeded_noise(seed: int, device: torch.device | str = "cpu") -> NoiseSource:
    """Standard normal float32 ``[B, ...]``, drawn where it is wanted from a counter-based stream.

    A seed gives the same numbers on every device, but for the rounding of logarithm, sine and cosine. The stream is that of
    :mod:`fvgen.kernels.noise_injection`, noise injected into nothing; each draw begins where the one before ended.

    Args:
        seed: of the stream.
        device: where the noise is wanted.
    """
    only_noise = torch.tensor([[0.0], [1.0], [1.0]], device=device)
    drawn = 0

    def draw(shape: Sequence[int]) -> Tensor:
        nonlocal drawn
        nothing = torch.zeros(tuple(shape), device=device)
        time = torch.zeros(shape[0], dtype=torch.int64, device=device)
        offset, drawn = drawn, drawn + shape[0] * math.ceil(math.prod(shape[1:]) / 4)
        return noise_injection(nothing, time, only_noise, seed, offset).x_t

    return draw


def recorded_noise(values: Iterable[Tensor]) -> NoiseSource:
    """Hand out given tensors one after the other; a wrong shape or one draw too many is a ValueError."""
    remaining = iter(values)

    def draw(shape: Sequence[int]) -> Tensor:
        value = next(remaining, None)
        if value is None or tuple(value.shape) != tuple(shape):
            raise ValueError(f"no recorded noise of shape {tuple(shape)}: {'none left' if value is None else tuple(value.shape)}")
        return value

    return draw
