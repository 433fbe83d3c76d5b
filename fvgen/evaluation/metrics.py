"""Image quality figures that need no learned network."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio per frame, dB, for values in [0, 1].

    Args:
        image, truth: ``[..., 3, H, W]``.
        mask: ``[..., H, W]`` bool; only True pixels count.

    Returns:
        ``[...]``; NaN where the mask is empty, infinite for identical images.
    """
    error = (image.float() - truth.float()).square().mean(-3)
    mse = error.mean((-2, -1)) if mask is None else (error * mask).sum((-2, -1)) / mask.sum((-2, -1))
    return -10 * torch.log10(mse)


def mean_psnr(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Mean over frames of :func:`psnr`, leaving out frames whose mask is empty."""
    return float(psnr(image, truth, mask).nanmean())


def mean_ssim(image: Tensor, truth: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) with an 11-pixel Gaussian window, mean over frames ``[N, 3, H, W]`` in [0, 1]."""
    offsets = torch.arange(11, device=image.device, dtype=torch.float32) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        x = torch.nn.functional.conv2d(x, window[None, None, :, None])
        return torch.nn.functional.conv2d(x, window[None, None, None, :])

    a, b = image.float().flatten(0, 1)[:, None], truth.float().flatten(0, 1)[:, None]
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(score.mean())
