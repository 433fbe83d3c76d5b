"""What the updates train, draw and compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fvgen.diffusion.guidance import combine
from fvgen.diffusion.parameterisation import x0_from_v
from fvgen.diffusion.predict import unconditional
from fvgen.distill.comparison import RUNS, make_run
from fvgen.distill.configs import STUDENT_TIMES, MatchingConfig, RegressionConfig, StageOneConfig
from fvgen.distill.methods import DistributionMatching, OdeRegression, StageOne
from fvgen.distill.networks import Draws
from fvgen.distill.rollout import student_sample
from fvgen.distill.weight_mean import WeightMean

from .toy import Toy


def draws(own: int = 1) -> Draws:
    return Draws(shared=0, own=own)


def test_stage_one_trains_student_and_head():
    toy, method = Toy(), StageOne(Toy().process, StageOneConfig())
    method.student_update(toy.networks, toy.batch, draws()).total.backward()
    assert toy.gradients()["student"]
    assert toy.gradients()["teacher"] is toy.gradients()["trunk"] is toy.gradients()["fake"] is None
    toy = Toy()
    update = method.critic_update(toy.networks, toy.batch, draws())
    update.total.backward()
    assert [name for name, g in toy.gradients().items() if g] == ["head"]
    assert set(update.losses) | {"student"} == set(method.trained)


@pytest.mark.parametrize("divergence", ["softened_rkl", "reverse_kl"])
def test_stage_two_trains_student_and_critics(divergence):
    toy = Toy()
    method = DistributionMatching(toy.process, MatchingConfig(divergence=divergence))
    method.student_update(toy.networks, toy.batch, draws()).total.backward()
    assert [name for name, g in toy.gradients().items() if g] == ["student"]
    toy = Toy()
    update = method.critic_update(toy.networks, toy.batch, draws())
    update.total.backward()
    assert {name for name, g in toy.gradients().items() if g} | {"student"} == set(method.trained)
    assert set(update.losses) | {"student"} == set(method.trained)
    assert ("head" in method.trained) == (divergence != "reverse_kl")


def test_critic_sees_real_and_generated_clips_alike():
    """Same times and same noise: without a difference of the clean latents there is none of the noisy ones."""
    toy, method = Toy(), StageOne(Toy().process, StageOneConfig())
    method.critic_update(toy.networks, toy.batch, draws())
    ((both, times, _),) = toy.trunk.seen
    (real, fake), (t_real, t_fake) = both.chunk(2), times.chunk(2)
    assert torch.equal(t_real, t_fake)
    assert len(set(t_real.tolist())) > 1
    x0 = student_sample(toy.student, toy.process, toy.batch, STUDENT_TIMES, "real", draws(), gradient=False)
    a, _, s = toy.process.schedule.rates(t_real, x0)
    torch.testing.assert_close(real - fake, a * s * (toy.batch.clean - x0), rtol=1e-5, atol=1e-6)


def test_stage_two_gradient_by_hand():
    toy, config = Toy(), MatchingConfig(rescale=0.7)
    x0 = torch.randn_like(toy.batch.clean)
    g, statistics, _ = DistributionMatching(toy.process, config).gradient(toy.networks, x0, toy.batch, draws())
    x, t = (both.chunk(2)[0] for both in toy.teacher.seen[0][:2])
    assert ((t >= 20) & (t < 980)).all()
    cond, condition = toy.teacher(x, t, toy.batch.condition), toy.batch.condition
    real = combine(cond, toy.teacher(x, t, unconditional(condition)), 7.5, 0.7)
    mu_real, mu_fake = (x0_from_v(toy.process.schedule, x, v, t) for v in (real, toy.fake(x, t, condition)))
    logits = toy.head(toy.trunk(x, t, condition)).detach()
    m = (x0 - mu_real).abs().mean((1, 2, 3, 4), keepdim=True) + 1e-6
    expected = torch.sigmoid(-logits).reshape(-1, 1, 1, 1, 1) * (mu_fake - mu_real) / m
    torch.testing.assert_close(g, expected.detach(), rtol=1e-4, atol=1e-6)
    assert statistics["normaliser"].item() == pytest.approx(m.mean().item(), rel=1e-4)


def test_real_inputs_use_the_students_times():
    toy = Toy(size=64)
    student_sample(toy.student, toy.process, toy.batch, STUDENT_TIMES, "real", draws(), gradient=True)
    assert {int(t) for _, times, _ in toy.student.seen for t in times} == set(STUDENT_TIMES)
    assert len(toy.student.seen) == 1


def test_rollout_follows_the_sampler_and_only_its_last_call_has_a_gradient():
    lengths = set()
    for shared in range(12):
        toy = Toy()
        random = Draws(shared, 5)
        x0 = student_sample(toy.student, toy.process, toy.batch, STUDENT_TIMES, "rollout", random, gradient=True)
        seen = toy.student.seen
        assert [int(t[0]) for _, t, _ in seen] == list(STUDENT_TIMES[: len(seen)])
        assert [g for *_, g in seen] == [False] * (len(seen) - 1) + [True]
        assert x0.requires_grad
        lengths.add(len(seen))
        # the first input is pure noise: nothing of the real clip
        other = dataclasses.replace(toy.batch, clean=100 * toy.batch.clean)
        again = student_sample(toy.student, toy.process, other, STUDENT_TIMES, "rollout", Draws(shared, 5), gradient=False)
        torch.testing.assert_close(again, x0.detach())
    assert lengths == {1, 2, 3, 4}


def test_regression():
    toy = Toy()
    method = OdeRegression(toy.process, RegressionConfig())
    update = method.student_update(toy.networks, toy.batch, draws())
    x, t, _ = toy.student.seen[0]
    states = toy.batch.ode_states
    for i in range(4):
        assert torch.equal(x[i], states[i, STUDENT_TIMES.index(int(t[i]))])
    x0 = x0_from_v(toy.process.schedule, x, toy.student(x, t, toy.batch.condition), t)
    assert update.total.item() == pytest.approx((x0 - toy.batch.ode_clean).square().mean().item())
    with pytest.raises(ValueError, match="ode_states"):
        method.student_update(toy.networks, dataclasses.replace(toy.batch, ode_states=None), draws())
    with pytest.raises(ValueError, match="4 ODE states"):
        method.student_update(toy.networks, dataclasses.replace(toy.batch, ode_states=states[:, :3]), draws())


def test_r1_penalty_is_added_with_its_weight():
    toy, values = Toy(), {}
    for weight in (0.0, 2.0):
        method = StageOne(toy.process, StageOneConfig(r1_weight=weight))
        values[weight] = method.critic_update(toy.networks, toy.batch, draws())
    penalty = values[2.0].statistics["r1"]
    assert penalty > 0
    torch.testing.assert_close(values[2.0].total, values[0.0].total + 2 * penalty)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_updates(name):
    toy = Toy()
    for method in make_run(name, toy.process):
        update = method.student_update(toy.networks, toy.batch, draws())
        assert list(update.losses) == ["student"]
        assert all(not v.requires_grad and v.isfinite() for v in update.statistics.values())
        assert {"student_loss", "latent_mean", "latent_std"} <= set(update.statistics)
        if method.critic_updates:
            critic = method.critic_update(toy.networks, toy.batch, draws())
            assert {"student", *critic.losses} == set(method.trained)
            assert all(not v.requires_grad and v.isfinite() for v in critic.statistics.values())


def test_dmd2_adds_the_adversarial_loss():
    toy = Toy()
    (dmd2,) = make_run("dmd2", toy.process)
    update = dmd2.student_update(toy.networks, toy.batch, draws())
    plain = DistributionMatching(toy.process, MatchingConfig(divergence="reverse_kl"))
    expected = plain.student_update(toy.networks, toy.batch, draws()).total + 5e-3 * update.statistics["adversarial_loss"]
    torch.testing.assert_close(update.total, expected)
    assert make_run("fvgen", toy.process)[1].config.divergence == "softened_rkl"


def test_unknown_choices():
    toy = Toy()
    with pytest.raises(ValueError, match="fvgen"):
        make_run("dmd3", toy.process)
    with pytest.raises(ValueError, match="rollout"):
        student_sample(toy.student, toy.process, toy.batch, STUDENT_TIMES, "both", draws(), gradient=False)
    with pytest.raises(ValueError, match="score_span"):
        MatchingConfig(score_span=(0.5, 0.2))


def test_running_mean_of_the_weights():
    """It begins at h(1), and a gradient is divided by what was known before its own clips."""
    mean = WeightMean("softened_rkl", 0.9)
    assert mean.value.item() == 0.5
    mean.update(torch.tensor(0.7))
    assert mean.value.item() == pytest.approx(0.9 * 0.5 + 0.1 * 0.7)
    assert WeightMean("forward_kl").value.item() == 1.0
    toy = Toy()
    x0 = torch.randn_like(toy.batch.clean)
    plain, divided = (
        DistributionMatching(toy.process, MatchingConfig(), m).gradient(toy.networks, x0, toy.batch, draws())[0]
        for m in (None, mean)
    )
    torch.testing.assert_close(divided, plain / 0.52)
    assert mean.value.item() == pytest.approx(0.52)
    with pytest.raises(ValueError, match="decay"):
        WeightMean("softened_rkl", 0.5)
