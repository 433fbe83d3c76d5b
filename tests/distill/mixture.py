"""Gaussian mixtures in a plane: at every time their density, and so score and optimal classifier, is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.diffusion.parameterisation import v_from_x0
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.types import Condition


class Mixture:
    """``sum_k w_k N(m_k, sigma^2)`` with ``means [K, 2]`` float64; points are latents ``[B, 2, 1, 1, 1]``."""

    def __init__(self, schedule: NoiseSchedule, means: Tensor, sigma: float, weights: Tensor | None = None) -> None:
        self.schedule, self.means, self.sigma = schedule, means, sigma
        count = means.shape[0]
        self.weights = torch.full((count,), 1 / count, dtype=torch.float64) if weights is None else weights

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, 2, 1, 1, 1]``, differentiable with respect to the means."""
        pick = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return (self.means[pick] + self.sigma * noise).reshape(count, 2, 1, 1, 1)

    def _parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of each component's share of the noised density ``[B, K]``, distance to its centre, and its variance ``[B]``."""
        a, b, s = (r.reshape(-1, 1) for r in self.schedule.rates(t, x))
        variance = (a * s * self.sigma) ** 2 + b**2
        offset = x.reshape(-1, 1, 2) - (a * s)[..., None] * self.means.detach()
        log = self.weights.log() - offset.square().sum(2) / (2 * variance) - (2 * torch.pi * variance).log()
        return log, offset, variance

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """``log p(x_t) [B]`` after noising to ``t [B]``."""
        return self._parts(x, t)[0].logsumexp(1)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The optimal prediction of v: that of the posterior mean of x_0."""
        log, offset, variance = self._parts(x, t)
        a, _, s = (r.reshape(-1, 1, 1) for r in self.schedule.rates(t, x))
        mean = self.means.detach() + (a * s) * self.sigma**2 / variance[..., None] * offset
        x0 = (log.softmax(1)[..., None] * mean).sum(1).reshape(x.shape)
        return v_from_x0(self.schedule, x, x0, t)
