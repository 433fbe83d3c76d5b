"""Conversions between noisy latent, clean latent, noise and velocity. The only place where they are written down.

    x = a s x0 + b eps        v = a eps - b s x0        s x0 = a x - b v        eps = a v + b x

with a, b, s at time t (a^2 + b^2 = 1). ``x0`` is always the true clean latent: the amplitude s is divided out of it before
it is noised again at another time or decoded. There is no conversion from eps to x0 or v: at t = 999, a = 0 and x does not
contain x0, so it would divide by zero.

Every function takes latents ``[B, ...]`` and ``t [B]`` (or a scalar tensor) int64, computes in at least float32 and returns
that dtype.
"""

from __future__ import annotations

from torch import Tensor

from .schedule import NoiseSchedule


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Forward process ``F(x0, t)``."""
    a, b, s = schedule.rates(t, x0)
    return (a * s) * x0 + b * noise


def velocity(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The prediction target ``v`` (arXiv 2202.00512) of the rescaled clean latent."""
    a, b, s = schedule.rates(t, x0)
    return a * noise - (b * s) * x0


def x0_from_v(schedule: NoiseSchedule, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """``(a x - b v) / s``."""
    a, b, s = schedule.rates(t, x)
    return (a * x - b * v) / s


def eps_from_v(schedule: NoiseSchedule, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """``a v + b x``."""
    a, b, _ = schedule.rates(t, x)
    return a * v + b * x


def eps_from_x0(schedule: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """``(x - a s x0) / b``; b is at least 0.029."""
    a, b, s = schedule.rates(t, x)
    return (x - (a * s) * x0) / b


def v_from_x0(schedule: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """``(a x - s x0) / b``, defined at every t."""
    a, b, s = schedule.rates(t, x)
    return (a * x - s * x0) / b
