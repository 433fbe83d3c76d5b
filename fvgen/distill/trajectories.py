"""The teacher's deterministic trajectories, which a CausVid-type initialisation is a regression on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fvgen.diffusion.ddim import ddim_rates
from fvgen.diffusion.guidance import guided
from fvgen.diffusion.parameterisation import eps_from_v, x0_from_v
from fvgen.diffusion.predict import PredictV
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.diffusion.timesteps import make_timesteps
from fvgen.distill.data import Source
from fvgen.distill.networks import Batch, derived_seed
from fvgen.types import Condition
from fvgen.utils.errors import UserError


@dataclass(frozen=True)
class Integration:
    """How the trajectories are computed: DDIM with eta = 0, trailing spacing.

    Attributes:
        times: the student's times, whose states are kept; steps: DDIM steps, which must visit all of them.
        guidance, rescale: of the teacher.

    Raises:
        UserError: the steps do not visit the student's times.
    """

    times: tuple[int, ...]
    steps: int
    guidance: float
    rescale: float

    def __post_init__(self) -> None:
        if not set(self.times) <= set(make_timesteps(self.steps)):
            raise UserError(
                f"{self.steps} steps do not visit the student's times {self.times}; use a multiple of {len(self.times)}"
            )


@torch.no_grad()
def integrate(
    predict_v: PredictV, schedule: NoiseSchedule, condition: Condition, noise: Tensor, how: Integration
) -> tuple[Tensor, Tensor]:
    """States ``[B, S, C, T, h, w]`` at the student's times, and the clean latents ``[B, C, T, h, w]`` of the last step.

    Args:
        predict_v: the teacher, without guidance.
        schedule: its schedule.
        condition: with an unconditional context where guided.
        noise: ``[B, C, T, h, w]``, where the trajectories begin.
        how: steps, times and guidance.
    """
    predict, tables = guided(predict_v, how.guidance, how.rescale), schedule.to(noise.device)
    times = make_timesteps(how.steps, "trailing", len(schedule))
    x, states, x0 = noise, {}, noise
    for time, following in zip(times, [*times[1:], 0], strict=True):
        if time in how.times:
            states[time] = x
        t = torch.full((x.shape[0],), time, device=x.device)
        v = predict(x, t, condition)
        x0 = x0_from_v(tables, x, v, t)
        signal, direction, _ = ddim_rates(schedule, time, following, 0.0)
        x = signal * x0 + direction * eps_from_v(tables, x, v, t)
    return torch.stack([states[time] for time in how.times], 1), x0


class TrajectorySource:
    """The first ``count`` clips of a source with the teacher's trajectories, each computed when first needed and kept on disk.

    One at a time, so that a trajectory does not depend on the batch it was first needed in.

    Args:
        source: clips and conditions.
        count: number of clips.
        predict_v, schedule, how: see :func:`integrate`.
        cache: folder; files appear whole.
        seed: of the noises.
    """

    def __init__(
        self, source: Source, count: int, predict_v: PredictV, schedule: NoiseSchedule, how: Integration, cache: Path, seed: int
    ) -> None:
        self.count = count if source.count is None else min(count, source.count)
        self._source, self._predict, self._schedule, self._how = source, predict_v, schedule, how
        self._cache, self._seed = cache, seed
        cache.mkdir(parents=True, exist_ok=True)

    def read(self, indices: Sequence[int]) -> Batch:
        made = [self._one(i) for i in indices]
        batches, states, cleans = zip(*made, strict=True)
        return replace(_stack(batches), ode_states=torch.stack(states), ode_clean=torch.stack(cleans))

    def _one(self, index: int) -> tuple[Batch, Tensor, Tensor]:
        from safetensors.torch import load_file, save_file

        batch = self._source.read([index])
        file, device = self._cache / f"{index:08d}.safetensors", batch.clean.device
        if not file.is_file():
            generator = torch.Generator().manual_seed(derived_seed(self._seed, "trajectory", index))
            noise = torch.randn(batch.clean.shape, generator=generator).to(device)
            states, clean = integrate(self._predict, self._schedule, batch.condition, noise, self._how)
            part = file.with_name(f".{file.name}.{os.getpid()}.part")
            save_file({"states": states[0].half().cpu().contiguous(), "clean": clean[0].half().cpu().contiguous()}, part)
            os.replace(part, file)
        stored = load_file(file)  # also what was just made, so that its rounding is the same ever after
        return batch, stored["states"].float().to(device), stored["clean"].float().to(device)


def _stack(batches: Sequence[Batch]) -> Batch:
    conditions = [b.condition for b in batches]
    joined = {
        name: torch.cat([getattr(c, name) for c in conditions]) if getattr(conditions[0], name) is not None else None
        for name in ("latents", "context", "uncond_context", "fps")
    }
    return Batch(torch.cat([b.clean for b in batches]), Condition(**joined))
