"""DDIM sampler (arXiv 2010.02502) as the teacher uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvgen.types import Condition

from .guidance import guided
from .noise import NoiseSource
from .parameterisation import eps_from_v, x0_from_v
from .predict import PredictV, StepCallback
from .schedule import NoiseSchedule
from .timesteps import make_timesteps


def ddim_rates(schedule: NoiseSchedule, t: int, t_next: int, eta: float) -> tuple[float, float, float]:
    """Factors ``(signal, direction, sigma)`` of one step: ``x_next = signal x0 + direction eps + sigma noise``.

    ``signal`` contains s at ``t_next``. With eta = 1 the squared direction is a difference that should vanish when leaving
    t = 999 and can come out negative by rounding; it is clamped at 0.
    """
    abar, abar_next = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[t_next])
    variance = eta**2 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    direction = max(1 - abar_next - variance, 0.0) ** 0.5
    return abar_next**0.5 * float(schedule.scale[t_next]), direction, max(variance, 0.0) ** 0.5


@torch.no_grad()
def ddim_sample(
    predict_v: PredictV,
    schedule: NoiseSchedule,
    condition: Condition,
    shape: Sequence[int],
    noise: NoiseSource,
    steps: int = 50,
    eta: float = 1.0,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.7,
    spacing: str = "trailing",
    batched_guidance: bool = False,
    callback: StepCallback | None = None,
) -> Tensor:
    """Latents after ``steps`` steps, two network calls each when guided.

    The last step goes to t = 0, not to the clean latent: there abar is 0.99915 and s is 1, so with eta > 0 a little noise is
    added even then. Converting clean latents at every step by their own s_t is the teacher's "dynamic rescale".

    Args:
        predict_v: the teacher.
        schedule: its noise schedule.
        condition: what to sample for, with an unconditional context when ``guidance_scale`` is not 1.
        shape: ``[B, C, T, h, w]`` of the latents.
        noise: draws the start, then one noise per step whose sigma is not 0.
        steps, spacing: see :func:`fvgen.diffusion.timesteps.make_timesteps`.
        eta: 0 = deterministic, 1 = ancestral.
        guidance_scale, guidance_rescale, batched_guidance: see :mod:`fvgen.diffusion.guidance`.
        callback: called as ``callback(step, total, x0)`` after each step, ``step`` counting from 1; ``x0`` is the clean latent.

    Returns:
        ``[B, C, T, h, w]`` float32, ready to decode.
    """
    times = make_timesteps(steps, spacing, len(schedule))
    x = noise(shape)
    tables = schedule.to(x.device)
    predict = guided(predict_v, guidance_scale, guidance_rescale, batched_guidance)
    for i, (time, time_next) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        t = torch.full((x.shape[0],), time, device=x.device)
        v = predict(x, t, condition)
        x0, eps = x0_from_v(tables, x, v, t), eps_from_v(tables, x, v, t)
        signal, direction, sigma = ddim_rates(schedule, time, time_next, eta)
        x = signal * x0 + direction * eps
        if sigma > 0:
            x = x + sigma * noise(shape)
        if callback is not None:
            callback(i + 1, steps, x0)
    return x
