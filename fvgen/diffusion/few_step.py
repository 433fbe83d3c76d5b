"""Sampler of the distilled student: predict the clean latent, noise it to the next time, repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvgen.types import Condition

from .noise import NoiseSource
from .parameterisation import add_noise, x0_from_v
from .predict import PredictV, StepCallback
from .schedule import NoiseSchedule
from .timesteps import make_timesteps


@torch.no_grad()
def few_step_sample(
    predict_v: PredictV,
    schedule: NoiseSchedule,
    condition: Condition,
    shape: Sequence[int],
    noise: NoiseSource,
    steps: int = 4,
    timesteps: Sequence[int] | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Clean latents in ``steps`` network calls, without guidance (it is distilled into the student).

    Args:
        predict_v: the student.
        schedule: the noise schedule it was trained with.
        condition: what to sample for.
        shape: ``[B, C, T, h, w]`` of the latents.
        noise: draws the start and one fresh noise per further step.
        steps: number of steps with trailing spacing, at least 1.
        timesteps: descending times instead of ``steps``; the first must be the last of the schedule.
        callback: called as ``callback(step, total, x0)`` after each step, ``step`` counting from 1.

    Returns:
        ``[B, C, T, h, w]`` float32 predicted clean latents, on the device of the noise.
    """
    times = list(timesteps) if timesteps is not None else make_timesteps(steps, "trailing", len(schedule))
    if not times or times[0] != len(schedule) - 1:
        raise ValueError(f"sampling from pure noise must begin at time {len(schedule) - 1}, got {times}")
    x = noise(shape)
    schedule = schedule.to(x.device)
    x0 = x
    for i, time in enumerate(times):
        t = torch.full((x.shape[0],), time, device=x.device)
        x0 = x0_from_v(schedule, x, predict_v(x, t, condition), t)
        if callback is not None:
            callback(i + 1, len(times), x0)
        if i + 1 < len(times):
            x = add_noise(schedule, x0, noise(shape), torch.full_like(t, times[i + 1]))
    return x0
