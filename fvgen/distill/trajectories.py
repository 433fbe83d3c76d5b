"""The teacher's deterministic trajectories, which a CausVid-type initialisation is a regression on."""

from __future__ import annotations

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
from fvgen.io.durable import durable_file
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

    In fixed groups of ``group`` neighbours, so that a trajectory does not depend on the batch it was first needed in.

    Args:
        source: clips and conditions.
        count: number of clips.
        predict_v, schedule, how: see :func:`integrate`.
        cache: folder; files appear whole.
        seed: of the noises.
        group: clips that are integrated together.
    """

    def __init__(
        self,
        source: Source,
        count: int,
        predict_v: PredictV,
        schedule: NoiseSchedule,
        how: Integration,
        cache: Path,
        seed: int,
        group: int = 1,
    ) -> None:
        self.count = count if source.count is None else min(count, source.count)
        self._source, self._predict, self._schedule, self._how = source, predict_v, schedule, how
        self._cache, self._seed, self._group = cache, seed, group
        cache.mkdir(parents=True, exist_ok=True)

    def read(self, indices: Sequence[int]) -> Batch:
        from safetensors.torch import load_file

        for number in sorted({i // self._group for i in indices if not self._file(i).is_file()}):
            self._make(number)
        batch = self._source.read(indices)
        stored = [load_file(self._file(i)) for i in indices]  # also of what was just made: rounded like this ever after
        states, clean = (torch.stack([s[k] for s in stored]).float().to(batch.clean.device) for k in ("states", "clean"))
        return replace(batch, ode_states=states, ode_clean=clean)

    def _file(self, index: int) -> Path:
        return self._cache / f"{index:08d}.safetensors"

    def _make(self, number: int) -> None:
        """Integrates and stores one group."""
        from safetensors.torch import save_file

        indices = range(number * self._group, min((number + 1) * self._group, self.count))
        batch = self._source.read(indices)
        generators = (torch.Generator().manual_seed(derived_seed(self._seed, "trajectory", i)) for i in indices)
        noise = torch.stack([torch.randn(batch.clean.shape[1:], generator=g) for g in generators]).to(batch.clean.device)
        found = integrate(self._predict, self._schedule, batch.condition, noise, self._how)
        states, clean = (x.half().cpu() for x in found)
        for row, index in enumerate(indices):
            file = self._file(index)
            with durable_file(file) as part:
                save_file({"states": states[row].contiguous(), "clean": clean[row].contiguous()}, part)
