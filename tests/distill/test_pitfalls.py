"""Mistakes that training still runs with. Each test fails if its mistake is made."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fvgen.diffusion.guidance import guided
from fvgen.distill.configs import STUDENT_TIMES, MatchingConfig, StageOneConfig
from fvgen.distill.methods import DistributionMatching, StageOne
from fvgen.distill.networks import Draws
from fvgen.distill.rollout import student_sample
from fvgen.distill.weight_mean import WeightMean

from .toy import Toy


def matching(toy: Toy, mean: WeightMean | None = None, **choices: object) -> DistributionMatching:
    return DistributionMatching(toy.process, MatchingConfig(**choices), mean)


def gradient(toy: Toy, x0: torch.Tensor, mean: WeightMean | None = None, **choices: object) -> torch.Tensor:
    return matching(toy, mean, **choices).gradient(toy.networks, x0, toy.batch, Draws(0, 1))[0]


def test_guidance_is_not_off_by_one():
    """Guidance 1 is the conditional prediction: with fake = teacher nothing is left to move, and one call suffices."""
    toy = Toy()
    toy.fake.load_state_dict(toy.teacher.state_dict())
    assert gradient(toy, toy.batch.clean, guidance=1.0).abs().max() < 1e-12
    assert len(toy.teacher.seen) == 1
    # and a fake score that is the teacher at guidance 2 agrees with guidance 2
    toy.networks = dataclasses.replace(toy.networks, fake=guided(toy.teacher, 2.0))
    assert gradient(toy, toy.batch.clean, guidance=2.0).abs().max() < 1e-12
    assert gradient(toy, toy.batch.clean, guidance=3.0).abs().max() > 1e-3


def test_the_normaliser_is_per_sample():
    """A sample a thousand times larger than its neighbours does not change their gradients."""
    toy, x0 = Toy(), torch.randn(4, 2, 3, 2, 2, dtype=torch.float64)
    before = gradient(toy, x0)
    larger = x0.clone()
    larger[0] *= 1000
    torch.testing.assert_close(gradient(toy, larger)[1:], before[1:])
    assert before.shape == x0.shape


def test_the_normaliser_cannot_be_zero():
    """All-zero latents, teacher and noise: a student that agrees with the teacher exactly."""
    toy = Toy()
    toy.networks = dataclasses.replace(toy.networks, teacher=lambda x, t, c: exact_velocity(toy, x, t))
    x0 = torch.zeros_like(toy.batch.clean)
    g, statistics, _ = matching(toy, guidance=1.0).gradient(toy.networks, x0, toy.batch, Draws(0, 1))
    assert g.isfinite().all()
    assert statistics["normaliser"] >= 1e-6


def exact_velocity(toy: Toy, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity whose clean latent is 0."""
    a, b, _ = toy.process.schedule.rates(t, x)
    return a / b * x


def test_the_weight_is_not_cancelled_by_its_mean():
    """With one sample per rank, h / mean(h) of the rank is 1, whatever the divergence: that of reverse KL again."""
    toy, mean = Toy(size=1), WeightMean("softened_rkl")
    x0 = toy.batch.clean
    with torch.no_grad():
        toy.head.weight.mul_(-40)
    plain, softened = gradient(toy, x0, divergence="reverse_kl"), gradient(toy, x0)
    found = gradient(toy, x0, mean)
    torch.testing.assert_close(found, softened / 0.5)  # the mean begins at h(1) = 1 / 2
    assert not torch.allclose(found, plain, rtol=0.05)
    h = matching(toy).gradient(toy.networks, x0, toy.batch, Draws(0, 1))[2]["weight"].mean()
    mean.update(h)
    torch.testing.assert_close(gradient(toy, x0, mean), softened / float(0.99 * 0.5 + 0.01 * h), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"0\.9"):
        WeightMean("softened_rkl", 0.0)
    assert matching(toy).weight_mean is None


def test_the_student_gets_its_adversarial_gradient_through_the_trunk():
    toy, method = Toy(), StageOne(Toy().process, StageOneConfig())
    method.student_update(toy.networks, toy.batch, Draws(0, 1)).total.backward()
    assert toy.trunk.seen[-1][2]
    assert toy.gradients()["student"]
    # and the right one: against a finite difference
    slope, losses = toy.gradients()["student"], []
    for step in (1e-5, -1e-5):
        again = Toy()
        with torch.no_grad():
            again.student.weight.add_(step)
        losses.append(method.student_update(again.networks, again.batch, Draws(0, 1)).total.item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)


def test_updates_leave_requires_grad_alone():
    toy = Toy()
    for method in (StageOne(toy.process, StageOneConfig()), matching(toy)):
        method.student_update(toy.networks, toy.batch, Draws(0, 1))
        method.critic_update(toy.networks, toy.batch, Draws(0, 1))
    trained = [n.weight.requires_grad for n in (toy.student, toy.fake, toy.head, toy.teacher, toy.trunk)]
    assert trained == [True, True, True, False, False]


def test_ranks_leave_a_rollout_at_the_same_step():
    for shared in range(8):
        calls = []
        for own in range(4):
            toy = Toy()
            random = Draws(shared, own)
            random.seed()  # whatever a rank has drawn for itself before
            student_sample(toy.student, toy.process, toy.batch, STUDENT_TIMES, "rollout", random, gradient=True)
            calls.append(toy.student.seen)
        assert len({len(seen) for seen in calls}) == 1
        assert not torch.equal(calls[0][0][0], calls[1][0][0])  # but with their own noise


def test_drift_of_the_latents_is_in_the_statistics():
    toy = Toy()
    statistics = matching(toy).student_update(toy.networks, toy.batch, Draws(0, 1)).statistics
    x0 = student_sample(toy.student, toy.process, toy.batch, STUDENT_TIMES, "real", Draws(0, 1), gradient=False)
    assert statistics["latent_mean"].item() == pytest.approx(x0.mean().item(), rel=1e-5)
    assert statistics["latent_std"].item() == pytest.approx(x0.std().item(), rel=1e-5)


def test_random_numbers_resume():
    toy, random = Toy(), Draws(3, 4)
    method = matching(toy, inputs="rollout")
    method.critic_update(toy.networks, toy.batch, random)
    state = random.state_dict()
    first = method.student_update(toy.networks, toy.batch, random).total
    other = Draws(0, 0)
    other.load_state_dict(state)
    assert torch.equal(method.student_update(toy.networks, toy.batch, other).total, first)


def test_the_dynamic_rescale_is_divided_out():
    """A network that knows v of the clean clip gives the clean clip back, at every time, amplitude included."""
    toy = Toy()
    t = torch.tensor(STUDENT_TIMES)
    noisy = toy.process.noise(toy.batch.clean, t, 7, want_velocity=True)
    x0 = toy.process.clean(lambda *_: noisy.velocity, noisy.x_t, t, toy.batch)
    torch.testing.assert_close(x0, toy.batch.clean, rtol=1e-4, atol=1e-5)
    assert toy.process.tables[2, 249] < 0.82
