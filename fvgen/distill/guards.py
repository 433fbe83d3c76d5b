"""What stops a run before it wastes hours: each guard looks at the records of the log, never at the device.

So guards lag by as many iterations as the log collects. Checkpoints are written only after the guards have seen everything before
them: the last checkpoint is always one that no guard objects to.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


class TrainingStopped(Exception):
    """A guard has stopped the run; the message says what was seen, where, and what may be done."""


@dataclass(frozen=True)
class GuardLimits:
    """When to stop. All but the first are judged by means over ``window`` updates, so that a single bad batch stops nothing.

    Attributes:
        window: updates of one kind.
        mean_shift: distance of the student's latent mean from the real one, in real standard deviations.
        std_ratio: factor by which the student's latent standard deviation exceeds or falls short of the real one.
        saturation: share of the student's latents beyond four real standard deviations.
        logit_gap: of mean logits of real and generated clips. Then r is about exp(-gap) on every generated clip: the weights
            h(r) say nothing any more, and a softened divergence is reverse KL again.
    """

    window: int = 50
    mean_shift: float = 0.5
    std_ratio: float = 2.0
    saturation: float = 0.05
    logit_gap: float = 16.0


class Guards:
    """Looks at every record in order.

    Args:
        limits: when to stop.
    """

    def __init__(self, limits: GuardLimits | None = None) -> None:
        self._limits = limits or GuardLimits()
        self._seen: dict[str, deque[float]] = {}

    def check(self, records: Sequence[Record]) -> None:
        """Raises :class:`TrainingStopped` at the first record that a guard objects to."""
        for record in records:
            where = f"stage {record['stage']}, iteration {record['iteration']}"
            for name, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise TrainingStopped(f"{name} is {value} at {where}; lower --lr or look at the data, then start again")
            self._drift(record, where)
            self._collapse(record, where)

    def _mean(self, key: str, value: float) -> float | None:
        """Mean of the last values of one kind, None until there are enough."""
        seen = self._seen.setdefault(key, deque(maxlen=self._limits.window))
        seen.append(value)
        return sum(seen) / len(seen) if len(seen) == self._limits.window else None

    def _drift(self, record: Record, where: str) -> None:
        if "latent_mean" not in record or record["real_std"] <= 0:
            return
        kind, limits = record["update"], self._limits
        shift = self._mean(f"{kind} shift", (record["latent_mean"] - record["real_mean"]) / record["real_std"])
        if shift is not None and abs(shift) > limits.mean_shift:
            raise TrainingStopped(
                f"the student's latent mean has drifted {shift:+.2f} standard deviations from the real one (limit "
                f"{limits.mean_shift:g}) at {where}; lower --lr or --guidance"
            )
        ratio = self._mean(f"{kind} ratio", record["latent_std"] / record["real_std"])
        if ratio is not None and not 1 / limits.std_ratio <= ratio <= limits.std_ratio:
            raise TrainingStopped(
                f"the student's latents have {ratio:.2f} times the standard deviation of the real ones (limit factor "
                f"{limits.std_ratio:g}) at {where}; lower --lr or --guidance"
            )
        share = self._mean(f"{kind} saturation", record["saturation"])
        if share is not None and share > limits.saturation:
            raise TrainingStopped(
                f"{share:.1%} of the student's latents are saturated (limit {limits.saturation:.1%}) at {where}; lower --guidance"
            )

    def _collapse(self, record: Record, where: str) -> None:
        if "logit_real" not in record:
            return
        gap = self._mean("gap", record["logit_real"] - record["logit_fake"])
        if gap is not None and gap > self._limits.logit_gap:
            raise TrainingStopped(
                f"the classifier tells real from generated clips with a logit gap of {gap:.1f} (limit "
                f"{self._limits.logit_gap:g}) at {where}: its ratio has collapsed; lower --lr or update it less often"
            )
