"""Preprocessing of an image for the CLIP vision tower."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocess(image: Tensor, size: int = 224) -> Tensor:
    """``[B, 3, H, W]`` in [-1, 1] to ``[B, 3, size, size]`` in CLIP's units.

    The image is squashed to a square, neither cropped nor kept in proportion: a Gaussian blur when an axis shrinks, bicubic
    resampling with aligned corners, then CLIP's mean and standard deviation. The overshoot of the bicubic kernel stays in.
    """
    height, width = image.shape[2:]
    if (height, width) != (size, size):
        factors = height / size, width / size
        if max(factors) > 1:
            image = _blur(image, factors)
        image = F.interpolate(image, (size, size), mode="bicubic", align_corners=True)
    mean, std = (_constant(values, image.dtype, image.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((image + 1) / 2 - mean) / std


@cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, because a copy from the host cannot be recorded in a CUDA graph; ordinary tensors even if first used in inference."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _gaussian(factor: float) -> tuple[float, ...]:
    """Odd-length normalised kernel that removes what a reduction by ``factor`` cannot show."""
    sigma = max((factor - 1) / 2, 0.001)
    length = int(max(4 * sigma, 3)) | 1
    weights = [math.exp(-((i - length // 2) ** 2) / (2 * sigma**2)) for i in range(length)]
    return tuple(w / sum(weights) for w in weights)


def _blur(image: Tensor, factors: tuple[float, float]) -> Tensor:
    """Separable Gaussian blur with a reflected border; ``factors`` = (vertical, horizontal) reduction."""
    rows, columns = _gaussian(factors[0]), _gaussian(factors[1])
    channels = image.shape[1]
    pad_y, pad_x = len(rows) // 2, len(columns) // 2
    image = F.pad(image, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    kernel_y = _constant(rows, image.dtype, image.device)[None, None, :, None]
    kernel_x = _constant(columns, image.dtype, image.device)[None, None, None, :]
    image = F.conv2d(image, kernel_y.expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(image, kernel_x.expand(channels, -1, -1, -1), groups=channels)
