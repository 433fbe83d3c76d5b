"""The fused steps against the samplers they replace, their conventions, and the kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fvgen.diffusion.ddim import ddim_rates, ddim_sample
from fvgen.diffusion.few_step import few_step_sample
from fvgen.diffusion.noise import recorded_noise
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.diffusion.timesteps import make_timesteps
from fvgen.kernels._philox import normal_like
from fvgen.kernels.diffusion_step import student_step, teacher_step
from fvgen.types import Condition
from tests.processes import interpret

SHAPE = (2, 3, 2, 5, 3)
COUNTERS = 2 * 23  # of one draw in this shape
SCHEDULE = NoiseSchedule.create()
START = normal_like(torch.empty(SHAPE), seed=11, offset=0)


def condition() -> Condition:
    random = torch.Generator().manual_seed(0)
    context, uncond = torch.randn((2, 2, 3, 4), generator=random).unbind(0)
    return Condition(torch.randn(SHAPE, generator=random), context, uncond, torch.tensor([8, 8]))


def predict_v(x: Tensor, t: Tensor, given: Condition) -> Tensor:
    """Depends on the noisy latents, the time, the render and the context, like the network."""
    time = (t.float() / 1000).view(-1, 1, 1, 1, 1)
    return torch.tanh(x * (1 - time) + 0.5 * given.latents) + 0.3 * time * x + given.context.mean((1, 2)).view(-1, 1, 1, 1, 1)


def tables() -> Tensor:
    a, b, s = SCHEDULE.rates(torch.arange(1000), torch.empty(1))
    return torch.stack([a, b, s])


def coefficients(time: int, time_next: int, eta: float) -> Tensor:
    a, b, s = (float(x) for x in SCHEDULE.rates(torch.tensor(time), torch.empty((), dtype=torch.float64)))
    return torch.tensor([a, b, s, *ddim_rates(SCHEDULE, time, time_next, eta)])


def draws(number: int) -> list[Tensor]:
    """The start and ``number`` draws of the stream, each at its own offset."""
    return [START, *(normal_like(START, seed=5, offset=i * COUNTERS) for i in range(number))]


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_student_steps_are_the_few_step_sampler(steps):
    seen = []
    expected = few_step_sample(
        predict_v, SCHEDULE, condition(), SHAPE, recorded_noise(draws(steps)), steps, callback=lambda *a: seen.append(a[2])
    )
    x, stream, times = START, torch.tensor([5, 0]), [torch.full((2,), t) for t in make_timesteps(steps)]
    for i, t in enumerate(times):
        t_next = times[i + 1] if i + 1 < steps else None
        out = student_step(x, predict_v(x, t, condition()), t, t_next, tables(), stream)
        assert close(out.x0, seen[i])
        x, stream = out.x_next, stream + torch.tensor([0, COUNTERS])
    assert x is None
    assert close(out.x0, expected)


@pytest.mark.parametrize(("guidance", "rescale", "eta"), [(7.5, 0.7, 1.0), (3.0, 0.0, 0.5), (1.0, 0.7, 1.0), (7.5, 0.7, 0.0)])
def test_teacher_steps_are_the_ddim_sampler(guidance, rescale, eta):
    steps, seen = 8, []
    expected = ddim_sample(
        predict_v, SCHEDULE, condition(), SHAPE, recorded_noise(draws(steps)), steps, eta, guidance, rescale,
        callback=lambda *a: seen.append(a[2]),
    )  # fmt: skip
    given, x, times = condition(), START, make_timesteps(steps)
    bare = Condition(given.latents, given.uncond_context, None, given.fps)
    for i, (time, time_next) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        t, stream = torch.full((2,), time), torch.tensor([5, i * COUNTERS])
        out = teacher_step(
            x, predict_v(x, t, given), coefficients(time, time_next, eta), stream, guidance=guidance, rescale=rescale,
            v_uncond=None if guidance == 1.0 else predict_v(x, t, bare), noisy=eta > 0, want_x0=True,
        )  # fmt: skip
        assert close(out.x0, seen[i])
        x = out.x_next
    assert close(x, expected)


def test_samples_have_their_own_times_and_noise():
    x, v = torch.randn((2, 2, 10), generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind(0)
    t, t_next, rates = torch.tensor([999, 400]), torch.tensor([749, 100]), tables()
    both = student_step(x, v, t, t_next, rates, torch.tensor([3, 8]))
    second = student_step(x[1:], v[1:], t[1:], t_next[1:], rates, torch.tensor([3, 8 + 3]))
    torch.testing.assert_close(both.x_next[1:], second.x_next)
    (a, b, s), (a_next, b_next, s_next) = ((rates[:, i].double()[..., None]) for i in (t, t_next))
    x0 = (a * x - b * v) / s
    torch.testing.assert_close(both.x0, x0)
    torch.testing.assert_close(both.x_next, a_next * s_next * x0 + b_next * normal_like(x, 3, 8).double())


def test_unasked_outputs_are_none():
    x, rates = torch.randn(2, 3), torch.ones(6)
    assert student_step(x, x, torch.tensor([1, 2]), None, tables(), torch.tensor([0, 0])).x_next is None
    assert teacher_step(x, x, rates, torch.tensor([0, 0])).x0 is None


def test_nothing_carries_a_graph():
    x = torch.randn(2, 3, requires_grad=True)
    assert not teacher_step(x, x, torch.ones(6), torch.tensor([0, 0])).x_next.requires_grad
    assert not student_step(x, x, torch.tensor([1, 2]), None, tables(), torch.tensor([0, 0])).x0.requires_grad


def test_strided_latents():
    x, v = torch.randn((2, 5, 4, 3), generator=torch.Generator().manual_seed(0)).unbind(0)
    rates, stream = torch.rand(6) + 0.1, torch.tensor([1, 2])
    strided = teacher_step(x.permute(1, 0, 2), v.permute(1, 0, 2), rates, stream).x_next
    plain = teacher_step(x.permute(1, 0, 2).contiguous(), v.permute(1, 0, 2).contiguous(), rates, stream).x_next
    assert torch.equal(strided, plain)


def test_wrong_shapes_are_named():
    x = torch.empty(2, 3, device="meta")
    with pytest.raises(RuntimeError, match="must have shape"):
        torch.ops.fvgen.teacher_step(x, x, None, x, x, 1.0, 0.0, True, True)
    with pytest.raises(RuntimeError, match="must have shape"):
        torch.ops.fvgen.student_step(x, x, x, None, x, x)


_INTERPRETED = """
import torch
from fvgen.kernels.diffusion_step import reference, spec, triton
for op in spec.SPECS:
    for case in op.cases:
        args = case.make("cpu", torch.float32)
        for expected, found in zip(getattr(reference, op.name)(*args), getattr(triton, op.name)(*args)):
            assert found.shape == expected.shape and found.dtype == expected.dtype, (op.name, case.name)
            error = (expected - found).abs().max() / expected.abs().max() if expected.numel() else 0
            assert error <= op.tolerance.forward, (op.name, case.name, error)
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)
