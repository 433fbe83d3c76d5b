"""Fréchet distance between two sets of frames (Heusel et al., arXiv 1706.08500), on features of a small fixed network.

The usual Inception weights are not bundled, so distances here cannot be compared with published ones; only with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrameFeatures:
    """Mean and standard deviation over space of every channel after each level of a VAE's encoder.

    The means follow what is shown where the encoder looks coarsely; the deviations of the first levels follow how sharp it is.

    Args:
        vae: an ``AutoencoderKL``; to compare numbers, always the same.
    """

    def __init__(self, vae: nn.Module) -> None:
        self._encoder = vae.encoder

    @torch.no_grad()
    def __call__(self, frames: Tensor, at_once: int = 64) -> Tensor:
        """Features ``[N, D]`` float32 of frames ``[N, 3, H, W]`` in [0, 1]."""
        return torch.cat([self._features(part) for part in frames.split(at_once)])

    def _features(self, frames: Tensor) -> Tensor:
        weight = self._encoder.conv_in.weight
        x = self._encoder.conv_in((2 * frames.float() - 1).to(weight.dtype))
        found = []
        for level in self._encoder.down_blocks:
            x = level(x)
            found += [x.float().mean((2, 3)), x.float().std((2, 3))]
        return torch.cat(found, 1)


class Gaussian:
    """Mean and covariance of feature vectors that arrive in pieces; float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def add(self, features: Tensor) -> None:
        """Takes in ``[N, D]``."""
        x = features.double()
        self.count += len(x)
        self._sum = self._sum + x.sum(0)
        self._products = self._products + x.T @ x

    @property
    def mean(self) -> Tensor:
        """``[D]``."""
        return torch.as_tensor(self._sum) / self.count

    @property
    def covariance(self) -> Tensor:
        """``[D, D]``, of the population's estimate (N - 1)."""
        mean = self.mean
        return (torch.as_tensor(self._products) - self.count * torch.outer(mean, mean)) / max(self.count - 1, 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.

    The trace of the root is that of ``(C_a^(1/2) C_b C_a^(1/2))^(1/2)``, which is symmetric, so that eigenvalues suffice.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = root @ b.covariance @ root
    trace = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    difference = (a.mean - b.mean).square().sum()
    return float(difference + a.covariance.trace() + b.covariance.trace() - 2 * trace)
