from __future__ import annotations

import pytest
import torch

from fvgen.diffusion import NoiseSchedule, add_noise, eps_from_v, eps_from_x0, v_from_x0, velocity, x0_from_v

SCALES = [0.3, 0.7, 1.0]


def _draw(schedule: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(schedule), 3, 2, dtype=torch.float64, generator=generator).unbind(0)
    return x0, noise, torch.arange(len(schedule))


@pytest.mark.parametrize("base_scale", SCALES)
def test_round_trips_at_every_time(base_scale: float) -> None:
    schedule = NoiseSchedule.create(base_scale)
    x0, noise, t = _draw(schedule)
    x, v = add_noise(schedule, x0, noise, t), velocity(schedule, x0, noise, t)
    torch.testing.assert_close(x0_from_v(schedule, x, v, t), x0, rtol=0, atol=1e-13)
    torch.testing.assert_close(eps_from_v(schedule, x, v, t), noise, rtol=0, atol=1e-13)
    torch.testing.assert_close(eps_from_x0(schedule, x, x0, t), noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(v_from_x0(schedule, x, x0, t), v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base_scale", SCALES)
def test_amplitude_of_the_clean_latent(base_scale: float) -> None:
    """a x - b v is s x0, not x0, with s falling linearly to its base over 400 times."""
    schedule = NoiseSchedule.create(base_scale)
    x0, noise, t = _draw(schedule)
    a, b, s = schedule.rates(t, x0)
    x, v = add_noise(schedule, x0, noise, t), velocity(schedule, x0, noise, t)
    torch.testing.assert_close(a * x - b * v, s * x0, rtol=0, atol=1e-13)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))
    assert schedule.scale[0] == 1
    torch.testing.assert_close(schedule.scale[399:], torch.full((601,), base_scale, dtype=torch.float64))
    expected = 1 - (1 - base_scale) * 249 / 399
    assert float(schedule.scale[249]) == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx({0.7: 0.81, 0.3: 0.56, 1.0: 1.0}[base_scale], abs=0.005)


def test_terminal_time_holds_noise_only() -> None:
    schedule = NoiseSchedule.create()
    x0, noise, _ = _draw(schedule)
    last = torch.tensor(999)
    assert float(schedule.alphas_cumprod[999]) == 0.0
    assert torch.equal(add_noise(schedule, x0, noise, last), noise)


def test_low_precision_is_computed_in_float32() -> None:
    schedule, t = NoiseSchedule.create(), torch.tensor([100])
    x0 = torch.ones(1, 2, 2, dtype=torch.bfloat16)
    assert add_noise(schedule, x0, x0, t).dtype == torch.float32


def test_scalar_and_batched_times_agree() -> None:
    schedule = NoiseSchedule.create()
    x0, noise = torch.randn(2, 3, 4, 2, 2, 2).unbind(0)
    one = add_noise(schedule, x0, noise, torch.tensor(300))
    assert torch.equal(one, add_noise(schedule, x0, noise, torch.full((3,), 300)))
