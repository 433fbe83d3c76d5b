"""Losses against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fvgen.distill import losses


def test_logistic_losses_at_known_logits():
    real, fake = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([0.0, -3.0], dtype=torch.float64)
    expected = (2 * math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-3))) / 2
    assert losses.classifier_logistic(real, fake).item() == pytest.approx(expected, rel=1e-12)
    assert losses.student_adversarial(fake).item() == pytest.approx((math.log(2) + math.log1p(math.exp(3))) / 2, rel=1e-12)


def test_logistic_optimum_is_the_log_ratio():
    """On a discrete space the minimiser of the expected loss is log(p / q), point by point."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.7, 0.2, 0.1], [0.2, 0.2, 0.6]))
    logits = (p / q).log().requires_grad_()
    never = torch.full((1,), -60.0, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for l, a, b in zip(logits, p, q, strict=True):
        loss = loss + a * losses.classifier_logistic(l[None], never) + b * losses.classifier_logistic(-never, l[None])
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope.abs().max() < 1e-12


def test_directions():
    """The critic raises real logits and lowers generated ones; the student raises generated ones. All losses are >= 0."""
    real, fake = torch.randn(2, 5, dtype=torch.float64).requires_grad_().unbind(0)
    d_real, d_fake = torch.autograd.grad(losses.classifier_logistic(real, fake), (real, fake))
    (g_fake,) = torch.autograd.grad(losses.student_adversarial(fake), fake)
    assert (d_real < 0).all()
    assert (d_fake > 0).all()
    assert (g_fake < 0).all()
    far = torch.full((3,), 1e4)
    assert losses.classifier_logistic(far, -far) == 0
    assert losses.classifier_logistic(-far, far).isfinite()


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="as many"):
        losses.classifier_logistic(torch.zeros(2), torch.zeros(3))


def test_approximate_r1_of_a_linear_logit():
    generator = torch.Generator().manual_seed(0)
    slope, sigma = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), 0.1
    x = torch.randn(200_000, 3, dtype=torch.float64, generator=generator)
    noisy = x + sigma * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    assert losses.approximate_r1(x @ slope, noisy @ slope).item() == pytest.approx(sigma**2 * 14, rel=0.02)


def test_injected_gradient():
    x0 = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    loss = losses.inject_gradient(x0, g)
    loss.backward()
    torch.testing.assert_close(x0.grad, g / g.numel())
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item(), rel=1e-12)


def test_a_small_gradient_survives_half_precision():
    x0 = torch.full((1, 4), 8.0, dtype=torch.bfloat16, requires_grad=True)
    losses.inject_gradient(x0, torch.full((1, 4), 1e-2, dtype=torch.bfloat16)).backward()
    torch.testing.assert_close(x0.grad.float(), torch.full((1, 4), 1e-2 / 4), rtol=1e-2, atol=0)


@pytest.mark.parametrize("loss", [losses.denoising, losses.regression])
def test_squared_errors_do_not_move_the_target(loss):
    x, y = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_().unbind(0)
    value = loss(x, y)
    assert value.item() == pytest.approx((x - y).square().mean().item())
    assert torch.autograd.grad(value, y, allow_unused=True) == (None,)
    assert loss(x.bfloat16(), y.bfloat16()).dtype == torch.float32
