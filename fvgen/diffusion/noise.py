"""Where samplers get their noise: a function of the shape, so that a recorded sequence can stand in for a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

NoiseSource = Callable[[Sequence[int]], Tensor]


def seeded_noise(seed: int | torch.Generator, device: torch.device | str = "cpu") -> NoiseSource:
    """Standard normal float32 drawn on the CPU and then moved, so that a seed gives the same noise on every device.

    Args:
        seed: a seed, or a CPU generator to draw from.
        device: where the noise is wanted.
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(device)

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
