"""Schedule buffers, time steps and DDIM factors against the reference."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from fvgen.diffusion.ddim import ddim_rates
from fvgen.diffusion.schedule import NoiseSchedule, reference_buffers
from fvgen.diffusion.timesteps import make_timesteps
from fvgen.utils.errors import UserError
from tests.models import reference

pytestmark = pytest.mark.golden
SPACINGS = {"uniform_trailing": "trailing"}
# Not schedules: a weight table and a log-variance that a plain mean-square loss does not use.
UNUSED = {"lvlb_weights"}


def _within_ulps(actual: Tensor, expected: Tensor, ulps: int = 1) -> None:
    np.testing.assert_array_max_ulp(actual.numpy(), expected.numpy(), maxulp=ulps)


@pytest.mark.parametrize("name", reference.cases("schedule", prefix="buffer."))
def test_buffer(name: str) -> None:
    short = name.removeprefix("buffer.")
    if short in UNUSED:
        return
    expected = reference.tensors("schedule", name)[""]
    base = re.fullmatch(r"scale_arr_base(.+)", short)
    base_scale = float(base[1]) if base else 0.7
    buffers = reference_buffers(NoiseSchedule.create(base_scale), base_scale)
    _within_ulps(buffers["scale_arr" if base else short], expected)


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod"])
def test_float64(name: str) -> None:
    expected = reference.tensors("schedule", f"{name}.f64")[""]
    actual = getattr(NoiseSchedule.create(), name)
    torch.testing.assert_close(actual, expected, rtol=0, atol=reference.tolerances("`schedule` buffers")[0])


def test_float64_before_the_rescale() -> None:
    expected = reference.tensors("schedule", "betas_before_rescale.f64")[""]
    actual = NoiseSchedule.create(zero_terminal_snr=False).betas
    torch.testing.assert_close(actual, expected, rtol=0, atol=reference.tolerances("`schedule` buffers")[0])


def test_every_checkpoint_buffer_is_computed() -> None:
    names = reference.manifest("schedule")["state_dict_buffers"]
    assert list(reference_buffers(NoiseSchedule.create(), 0.7)) == names


@pytest.mark.parametrize("case", reference.keys_of("schedule", "ddim_timesteps"))
def test_timesteps(case: str) -> None:
    entry = reference.manifest("schedule")
    spacing, steps = case.split(":")
    spacing = SPACINGS.get(spacing, spacing)
    if case in entry["ddim_timesteps_irregular"]:
        with pytest.raises(UserError, match=spacing):
            make_timesteps(int(steps), spacing)
    else:
        assert make_timesteps(int(steps), spacing)[::-1] == entry["ddim_timesteps"][case]


def test_irregular_counts() -> None:
    """The same step counts are refused for uniform and quad; trailing spacing is mended instead."""
    irregular = reference.manifest("schedule")["ddim_timesteps_irregular"]
    refused = set()
    for spacing in ("uniform", "quad"):
        for steps in range(1, 1001):
            try:
                make_timesteps(steps, spacing)
            except UserError:
                refused.add(f"{spacing}:{steps}")
    assert refused == {case for case in irregular if not case.startswith("uniform_trailing:")}


@pytest.mark.parametrize("case", reference.keys_of("schedule", "ddim_parameters"))
def test_ddim_factors(case: str) -> None:
    entry = reference.manifest("schedule")["ddim_parameters"][case]
    schedule, eta = NoiseSchedule.create(0.7), float(case.split("eta")[1])
    times = entry["timesteps"]
    for i, (t, t_next) in enumerate(zip(times, [0, *times[:-1]], strict=True)):
        signal, direction, sigma = ddim_rates(schedule, t, t_next, eta)
        before = entry["alphas_prev"][i]
        # The factors are products and roots of float32 table entries in the reference.
        assert signal == pytest.approx(before**0.5 * entry["scale_arr_prev"][i], rel=1e-6)
        assert sigma == pytest.approx(entry["sigmas"][i], rel=1e-5, abs=1e-6)
        assert direction**2 == pytest.approx(max(1 - before - entry["sigmas"][i] ** 2, 0), abs=1e-6)
        assert float(schedule.scale[t]) == pytest.approx(entry["scale_arr"][i], rel=1e-6)
        # 1 - abar is taken in float32 there: an ulp of 1, not of the difference
        assert float(1 - schedule.alphas_cumprod[t]) == pytest.approx(entry["sqrt_one_minus_alphas"][i] ** 2, abs=1.2e-7)
