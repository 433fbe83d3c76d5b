"""The student's samples during training: from noisy real clips, or from its own few-step sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fvgen.diffusion.parameterisation import x0_from_v
from fvgen.diffusion.predict import PredictV
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.networks import Batch, Draws
from fvgen.kernels.noise_injection import Injected, noise_injection

INPUTS = ("real", "rollout")


@dataclass(frozen=True)
class Process:
    """The forward process on one device.

    Attributes:
        schedule: the teacher's.
        tables: ``[3, S]`` float32 a_t, b_t, s_t, as the operators take them.
    """

    schedule: NoiseSchedule
    tables: Tensor

    @staticmethod
    def create(schedule: NoiseSchedule, device: torch.device | str = "cpu") -> Process:
        """That of ``schedule``, with its tables on ``device``."""
        abar = schedule.alphas_cumprod
        tables = torch.stack([abar.sqrt(), (1 - abar).sqrt(), schedule.scale]).float()
        return Process(schedule.to(device), tables.to(device))

    def __len__(self) -> int:
        return len(self.schedule)

    def noise(self, x0: Tensor, t: Tensor, seed: int, want_velocity: bool = False) -> Injected:
        """``F(x0, t)``; the same seed and shape draw the same noise, so real and generated clips can be noised alike."""
        return noise_injection(x0, t, self.tables, seed, want_velocity=want_velocity)

    def clean(self, predict_v: PredictV, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """``G(x_t, t) = (a_t x_t - b_t v) / s_t``, ``[B, C, T, h, w]`` in at least float32."""
        return x0_from_v(self.schedule, x, predict_v(x, t, batch.condition), t)


def student_sample(
    student: PredictV, process: Process, batch: Batch, times: Sequence[int], inputs: str, draws: Draws, gradient: bool
) -> Tensor:
    """The student's clean latents ``[B, C, T, h, w]`` for the conditions of a batch.

    ``real`` noises the real clips to one of ``times`` per sample and calls the student once. ``rollout`` starts from noise, as
    the sampler does, and leaves it after a step drawn alike on all ranks (a different number of calls per rank would dead-lock);
    only that last call has a gradient.

    Args:
        student: predicts v.
        process: the forward process.
        batch: real clips and conditions.
        times: the student's descending times; the first is the last of the schedule.
        inputs: one of ``INPUTS``.
        draws: random numbers.
        gradient: whether the last call records one.

    Raises:
        ValueError: unknown inputs.
    """
    if inputs not in INPUTS:
        raise ValueError(f"inputs must be one of {', '.join(INPUTS)}, got {inputs!r}")
    clean, device = batch.clean, batch.clean.device
    size = clean.shape[0]
    if inputs == "real":
        _, t = draws.choice(times, size, device)
        with torch.set_grad_enabled(gradient):
            return process.clean(student, process.noise(clean, t, draws.seed()).x_t, t, batch)
    # at the first time a = 0, so nothing of the real clips is left
    x0 = clean
    last = draws.shared_index(len(times))
    for i, time in enumerate(times[: last + 1]):
        with torch.set_grad_enabled(gradient and i == last):
            t = torch.full((size,), time, device=device)
            x0 = process.clean(student, process.noise(x0, t, draws.seed()).x_t, t, batch)
    return x0
