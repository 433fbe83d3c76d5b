"""Samplers around an oracle that knows the clean latent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fvgen.diffusion import (
    NoiseSchedule,
    combine,
    ddim_sample,
    few_step_sample,
    guided,
    recorded_noise,
    seeded_noise,
    v_from_x0,
)
from fvgen.types import Condition
from fvgen.utils.errors import UserError

SHAPE = (2, 3, 2, 4, 5)


def _condition(uncond: bool = False) -> Condition:
    context = torch.zeros(2, 77, 4)
    return Condition(torch.zeros(SHAPE), context, context + 1 if uncond else None, torch.tensor([10, 10]))


class Oracle:
    """Predicts the v that belongs to one clean latent; under the unconditional context, to its negative."""

    def __init__(self, schedule: NoiseSchedule, x0: Tensor) -> None:
        self.schedule, self.x0, self.times, self.calls = schedule, x0, [], 0

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        self.times.append(int(t[0]))
        sign = 1 - 2 * (condition.context.mean(dim=(1, 2)) > 0).float()
        x0 = self.x0.repeat(x.shape[0] // self.x0.shape[0], 1, 1, 1, 1)
        return v_from_x0(self.schedule, x, sign[:, None, None, None, None] * x0, t)


@pytest.mark.parametrize("base_scale", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
def test_few_step_returns_the_oracles_latent(steps: int, base_scale: float) -> None:
    schedule = NoiseSchedule.create(base_scale)
    oracle = Oracle(schedule, torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    seen: list[tuple[int, int]] = []
    x0 = few_step_sample(
        oracle, schedule, _condition(), SHAPE, seeded_noise(0), steps, callback=lambda i, n, _x: seen.append((i, n))
    )
    torch.testing.assert_close(x0, oracle.x0, rtol=0, atol=1e-4)
    assert oracle.calls == steps
    assert oracle.times[0] == 999
    assert seen == [(i + 1, steps) for i in range(steps)]


def test_few_step_noises_afresh_with_the_scale() -> None:
    """The second network input is a s x0 + b eps with the second noise."""
    schedule, inputs = NoiseSchedule.create(0.3), []
    start, fresh, target = torch.randn(3, *SHAPE).unbind(0)
    oracle = Oracle(schedule, target)

    def spy(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        inputs.append(x)
        return oracle(x, t, condition)

    few_step_sample(spy, schedule, _condition(), SHAPE, recorded_noise([start, fresh]), steps=2)
    a, b, s = schedule.rates(torch.tensor(499), target)
    assert torch.equal(inputs[0], start)
    torch.testing.assert_close(inputs[1], a * s * target + b * fresh, rtol=0, atol=1e-5)


def test_few_step_must_begin_at_the_end() -> None:
    schedule = NoiseSchedule.create()
    with pytest.raises(ValueError, match="999"):
        few_step_sample(Oracle(schedule, torch.zeros(SHAPE)), schedule, _condition(), SHAPE, seeded_noise(0), timesteps=[500])


@pytest.mark.parametrize("steps", [1, 4, 7, 10, 20, 25, 61])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_ends_near_the_oracles_latent(steps: int, eta: float) -> None:
    """It stops at t = 0, where a little noise (b = 0.029) is left over the clean latent."""
    schedule = NoiseSchedule.create()
    oracle = Oracle(schedule, torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    x = ddim_sample(oracle, schedule, _condition(), SHAPE, seeded_noise(0), steps, eta, guidance_scale=1.0)
    assert x.isfinite().all()
    a, b, s = (float(r) for r in schedule.rates(torch.tensor(0), torch.zeros(1)))
    assert s == 1
    residual = (x - a * oracle.x0) / b
    assert residual.std().item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("sampler", ["few_step", "ddim"])
def test_a_seed_decides_everything(sampler: str) -> None:
    schedule, condition = NoiseSchedule.create(), _condition()

    def run(seed: int) -> Tensor:
        def network(x: Tensor, _t: Tensor, _c: Condition) -> Tensor:
            return 0.3 * x

        if sampler == "few_step":
            return few_step_sample(network, schedule, condition, SHAPE, seeded_noise(seed))
        return ddim_sample(network, schedule, condition, SHAPE, seeded_noise(seed), steps=5, guidance_scale=1.0)

    torch.manual_seed(1)
    first = run(3)
    torch.manual_seed(2)
    assert torch.equal(first, run(3))
    assert not torch.equal(first, run(4))


def test_guidance_one_is_the_conditional_prediction_in_one_call() -> None:
    schedule = NoiseSchedule.create()
    oracle = Oracle(schedule, torch.randn(SHAPE))
    x, t = torch.randn(SHAPE), torch.tensor([500, 500])
    assert torch.equal(guided(oracle, 1.0, 0.7)(x, t, _condition()), oracle(x, t, _condition()))
    assert oracle.calls == 2
    cond, uncond = torch.randn(2, *SHAPE).unbind(0)
    torch.testing.assert_close(combine(cond, uncond, 1.0), cond)
    torch.testing.assert_close(combine(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(combine(cond, uncond, 7.5), 7.5 * cond - 6.5 * uncond)


def test_full_rescale_restores_the_conditional_spread_per_sample() -> None:
    cond, uncond = torch.randn(2, *SHAPE).unbind(0)
    cond[1] *= 5
    result = combine(cond, uncond, 7.5, rescale=1.0)
    axes = (1, 2, 3, 4)
    torch.testing.assert_close(result.std(dim=axes), cond.std(dim=axes))


def test_batched_guidance_agrees_with_two_calls() -> None:
    schedule = NoiseSchedule.create()
    x, t = torch.randn(SHAPE), torch.tensor([500, 500])
    one, two = (Oracle(schedule, torch.ones(SHAPE)) for _ in range(2))
    torch.testing.assert_close(
        guided(one, 3.0, 0.7, batched=True)(x, t, _condition(True)), guided(two, 3.0, 0.7)(x, t, _condition(True))
    )
    assert (one.calls, two.calls) == (1, 2)


def test_guidance_without_an_unconditional_context() -> None:
    schedule = NoiseSchedule.create()
    with pytest.raises(UserError, match="guidance=True"):
        ddim_sample(Oracle(schedule, torch.zeros(SHAPE)), schedule, _condition(), SHAPE, seeded_noise(0), steps=1)


def test_recorded_noise_complains() -> None:
    draw = recorded_noise([torch.zeros(2)])
    with pytest.raises(ValueError, match="shape"):
        draw((3,))
    with pytest.raises(ValueError, match="none left"):
        draw((2,))
