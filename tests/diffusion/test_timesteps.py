from __future__ import annotations

import pytest

from fvgen.diffusion import NoiseSchedule, make_timesteps
from fvgen.diffusion.ddim import ddim_rates
from fvgen.utils.errors import UserError


def test_four_steps() -> None:
    assert make_timesteps(4) == [999, 749, 499, 249]


def test_trailing_exists_for_every_count() -> None:
    for steps in range(1, 1001):
        times = make_timesteps(steps)
        assert len(times) == steps == len(set(times))
        assert times[0] == 999
        assert times[-1] >= 0
        assert times == sorted(times, reverse=True)


def test_ddim_factors_are_real_for_every_count() -> None:
    schedule = NoiseSchedule.create()
    for steps in range(1, 1001):
        times = make_timesteps(steps)
        pairs = list(zip(times, [*times[1:], 0], strict=True))
        # the first step leaves t = 999, the last may stay at t = 0
        for t, t_next in (pairs[0], pairs[len(pairs) // 2], pairs[-1]):
            for eta in (0.0, 0.5, 1.0):
                signal, direction, sigma = ddim_rates(schedule, t, t_next, eta)
                assert isinstance(direction, float)
                assert isinstance(sigma, float)
                total = direction**2 + sigma**2
                assert total == pytest.approx(1 - float(schedule.alphas_cumprod[t_next]), abs=1e-9)
                assert signal > 0


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (0, "trailing", "1..1000"),
        (1001, "trailing", "1..1000"),
        (7, "uniform", "uniform spacing has no 7"),
        (3, "uniform", "use the spacing trailing"),
        (30, "quad", "quad spacing has no 30"),
        (4, "linear", "must be one of"),
    ],
)
def test_irregular_requests(steps: int, spacing: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_timesteps(steps, spacing)
