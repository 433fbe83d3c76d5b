"""Photos of different sizes in one frame: each lies in the middle, so that the optical axes of all are at one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def common_size(sizes: Iterable[Sequence[int]]) -> tuple[int, int]:
    """The smallest (H, W) that has room for all sizes (H, W)."""
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def corner(inner: Sequence[int], outer: Sequence[int]) -> tuple[int, int]:
    """(top, left) of a photo of size ``inner`` in a frame of size ``outer``."""
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2


def centred(x: Tensor, size: Sequence[int], value: float = 0.0) -> Tensor:
    """``[..., h, w]`` in the middle of ``[..., H, W]`` of ``size``, with ``value`` around it."""
    inner = (x.shape[-2], x.shape[-1])
    top, left = corner(inner, size)
    return F.pad(x, (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top), value=value)


def centred_points(points: Tensor, size: Sequence[int]) -> Tensor:
    """The same of points ``[h, w, 3]``, with zeros around them."""
    return centred(points.movedim(-1, 0), size).movedim(0, -1)


def photos_in_frame(photos: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """``[V, C, H, W]`` of photos ``[C, h, w]``, black around them."""
    return torch.stack([centred(photo, size) for photo in photos])
