"""Which of the 1000 time steps a sampler visits, in the order it visits them (descending)."""

from __future__ import annotations

import numpy as np

from fvgen.utils.errors import UserError

SPACINGS = ("trailing", "uniform", "quad")


def make_timesteps(steps: int, spacing: str = "trailing", num_steps: int = 1000) -> list[int]:
    """``steps`` distinct descending times in 0 .. num_steps - 1.

    Args:
        steps: how many, 1 .. num_steps.
        spacing: ``trailing`` starts at the very last time (999, 749, 499, 249 for 4) and exists for every number of steps;
            ``uniform`` (1 + i * (1000 // steps)) and ``quad`` (dense at small times) exist for some.
        num_steps: length of the schedule.

    Raises:
        UserError: a spacing that has no regular form for this number of steps, or a number out of range.
    """
    if not 1 <= steps <= num_steps:
        raise UserError(f"the number of steps must lie in 1..{num_steps}, got {steps}")
    if spacing == "trailing":
        # The index is an integer: a floating-point range can run one element too far and end in time -1.
        times = np.round(num_steps - np.arange(steps) * (num_steps / steps)).astype(int) - 1
    elif spacing == "uniform":
        times = np.arange(0, num_steps, num_steps // steps)[::-1] + 1
    elif spacing == "quad":
        times = (np.linspace(0, np.sqrt(num_steps * 0.8), steps) ** 2).astype(int)[::-1] + 1
    else:
        raise UserError(f"the spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if len(set(times.tolist())) != steps or times.max() >= num_steps:
        raise UserError(f"{spacing} spacing has no {steps} distinct steps below {num_steps}; use the spacing trailing")
    return times.tolist()
