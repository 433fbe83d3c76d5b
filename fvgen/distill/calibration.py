"""Whether the classifier's ratio means what it says, and how the weights are spread over time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS, TIME_BINS, STEPS = 10, 5, 1000


@dataclass(frozen=True)
class CalibrationBin:
    """Clips whose predicted chance of being real lies in one tenth of 0 .. 1.

    Attributes:
        count: clips; predicted: mean of ``sigmoid(l) = r / (r + 1)``; found: share of them that is real.
    """

    count: int
    predicted: float
    found: float


def calibration(real: Tensor, fake: Tensor) -> list[CalibrationBin]:
    """Filled bins, lowest first, of logits ``[N]`` of real and ``[N]`` of generated clips."""
    chance = torch.cat([real, fake]).double().sigmoid()
    is_real = torch.cat([torch.ones_like(real), torch.zeros_like(fake)]).double()
    place = (chance * BINS).long().clamp(max=BINS - 1)
    found = []
    for i in range(BINS):
        inside = place == i
        if inside.any():
            found.append(CalibrationBin(int(inside.sum()), float(chance[inside].mean()), float(is_real[inside].mean())))
    return found


def calibration_table(bins: list[CalibrationBin]) -> str:
    """The bins as a Markdown table."""
    rows = [f"| {b.count} | {b.predicted:.3f} | {b.found:.3f} |" for b in bins]
    return "\n".join(["| clips | predicted real | found real |", "|---|---|---|", *rows])


def weight_histogram(weights: Tensor, times: Tensor) -> list[tuple[int, int, Tensor]]:
    """Weights h ``[N]`` by their times ``[N]``: (first time, last time, weights) of each filled fifth of the schedule."""
    width = STEPS // TIME_BINS
    parts = [(low, low + width - 1, weights[(times >= low) & (times < low + width)]) for low in range(0, STEPS, width)]
    return [part for part in parts if len(part[2])]
