"""The method on mixtures whose densities, scores and density ratio are known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fvgen.diffusion.parameterisation import v_from_x0
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.configs import MatchingConfig, StageOneConfig
from fvgen.distill.divergences import DIVERGENCES
from fvgen.distill.losses import inject_gradient
from fvgen.distill.methods import DistributionMatching, StageOne
from fvgen.distill.networks import Batch, Draws, Networks
from fvgen.distill.rollout import Process
from fvgen.kernels.score_weighting import divergence_weight
from fvgen.types import Condition

from .mixture import Mixture
from .test_divergences import GENERATORS

SCHEDULE = NoiseSchedule.create()
PROCESS = Process.create(SCHEDULE)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of operations on a few numbers each: waiting for a second thread takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_of(clean: Tensor) -> Batch:
    none = torch.zeros(clean.shape[0], 1, 1)
    return Batch(clean.detach(), Condition(none, none, None, none))


def exact(real: Mixture, fake: Mixture) -> Networks:
    """Optimal teacher, fake score and classifier."""

    def log_ratio(x: Tensor, t: Tensor, _: Condition) -> Tensor:
        return (real.log_density(x, t) - fake.log_density(x, t)).reshape(-1, 1, 1, 1, 1)

    return Networks(fake.velocity, real.velocity, fake.velocity, log_ratio, lambda f: f.mean((1, 2, 3, 4)).float())


def ring(count: int, radius: float) -> Tensor:
    angle = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weighted_scores_are_the_gradient_of_the_divergence(name):
    """d/ds E_q[f(p / q)] for q shifted by s equals E_q[h (score_q - score_p)], by quadrature on a line."""
    x = torch.linspace(-14, 14, 20001, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)

    def normal(mean: Tensor | float, sigma: float) -> Tensor:
        return -((x - mean) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))

    log_p = torch.logaddexp(normal(-1.0, 1.0), normal(1.5, 1.0)) - math.log(2)
    log_q = normal(shift, 0.95)
    value = torch.trapezoid(log_q.exp() * GENERATORS[name]((log_p - log_q).exp()), x.detach())
    (slope,) = torch.autograd.grad(value, shift, retain_graph=True)
    score_p, score_q = (torch.autograd.grad(l.sum(), x, retain_graph=True)[0] for l in (log_p, log_q))
    h = divergence_weight((log_p - log_q).detach(), name, clip=1e30).double()
    expected = torch.trapezoid(log_q.exp() * h * (score_q - score_p), x).detach()
    assert abs(slope.item()) > 2e-3
    assert slope.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nothing_moves_at_the_optimum(name):
    p = Mixture(SCHEDULE, ring(4, 2.0), 0.3)
    x0 = p.sample(64, torch.Generator().manual_seed(0))
    method = DistributionMatching(PROCESS, MatchingConfig(guidance=1.0, divergence=name))
    g, *_ = method.gradient(exact(p, p), x0, batch_of(x0), Draws(0, 0))
    assert g.abs().max() < 1e-9


class Head(nn.Module):
    """Logit of features ``[B, 4, 1, 1, 1]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)).double()

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.flatten(1))[:, 0]


def place_and_rates(x: Tensor, t: Tensor, _: Condition | None = None) -> Tensor:
    a, b, s = SCHEDULE.rates(t, x)
    return torch.cat([x, a * s, b], 1)


def test_the_classifier_is_calibrated():
    """After a short training: mean error of h = 1 / (1 + r) below 0.03, and real clips as frequent as the logits say."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    p = Mixture(SCHEDULE, ring(3, 1.5), 0.5, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    q = Mixture(SCHEDULE, torch.tensor([[0.0, 0.0], [1.5, 1.0]], dtype=torch.float64), 0.8)
    head, method = Head(), StageOne(PROCESS, StageOneConfig())

    def student(x: Tensor, t: Tensor, _: Condition) -> Tensor:
        return v_from_x0(SCHEDULE, x, q.sample(x.shape[0], generator), torch.clamp(t, max=998))

    networks = Networks(student, trunk=place_and_rates, head=head)
    steps, draws = 600, Draws(0, 0)
    optimiser = torch.optim.Adam(head.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        loss = method.critic_update(networks, batch_of(p.sample(256, generator)), draws).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    t = draws.times((0.0, 1.0), 1000, 8000, torch.device("cpu"))
    real, fake = (PROCESS.noise(m.sample(8000, generator), t, draws.seed()).x_t for m in (p, q))
    x, both = torch.cat([real, fake]), torch.cat([t, t])
    with torch.no_grad():
        logits = head(place_and_rates(x, both))
    truth = p.log_density(x, both) - q.log_density(x, both)
    error = (torch.sigmoid(-logits) - torch.sigmoid(-truth)).abs().mean().item()
    print(f"\nmean error of h: {error:.4f}")  # docs/distillation.md
    assert error < 0.03
    is_real = (torch.arange(16000) < 8000).double()
    for low, high in ((0.0, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 1.0)):
        chosen = (torch.sigmoid(logits) >= low) & (torch.sigmoid(logits) < high)
        assert chosen.sum() > 300
        assert is_real[chosen].mean().item() == pytest.approx(torch.sigmoid(logits)[chosen].mean().item(), abs=0.04)


def match(divergence: str, seed: int, radius: float, start: float, steps: int = 160, size: int = 64) -> tuple[int, float, float]:
    """A mixture with trained means pulled to a ring of eight modes; modes found, reverse KL before and after."""
    generator = torch.Generator().manual_seed(seed)
    p = Mixture(SCHEDULE, ring(8, radius), 0.3)
    centre = torch.tensor([radius / 2, 0.0], dtype=torch.float64)
    means = (centre + start * torch.randn(8, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    method = DistributionMatching(PROCESS, MatchingConfig(guidance=1.0, divergence=divergence))
    q, draws = Mixture(SCHEDULE, means, 0.3), Draws(0, seed)
    now = torch.zeros(2000, dtype=torch.long)

    def reverse_kl() -> float:
        x = q.sample(2000, torch.Generator().manual_seed(0)).detach()
        return (q.log_density(x, now) - p.log_density(x, now)).mean().item()

    before = reverse_kl()
    optimiser = torch.optim.Adam([means], 0.05)
    for _ in range(steps):
        x0 = q.sample(size, generator)
        g, *_ = method.gradient(exact(p, q), x0, batch_of(x0), draws)
        optimiser.zero_grad()
        inject_gradient(x0, g).backward()
        optimiser.step()
    found = torch.cdist(p.means, means.detach()).min(1).values < 0.6
    return int(found.sum()), before, reverse_kl()


def test_both_reverse_kls_converge_and_the_softened_one_covers_no_more_modes():
    """With exact scores and an exact ratio, over 5 seeds from the same starts.

    The softened weight falls with r: samples on the side where real mass is missed move least. So it is the more mode-seeking of
    the two (33 and 21 of 40 modes when this was written), and a gain in coverage cannot come from the divergence alone.
    """
    plain, softened = ([match(name, seed, 5.0, 0.5) for seed in range(5)] for name in ("reverse_kl", "softened_rkl"))
    for _, before, after in plain + softened:
        assert after < before / 5
    modes = [sum(r[0] for r in results) for results in (plain, softened)]
    assert modes[0] >= modes[1]
    assert min(modes) > 10


def apart(p: Mixture, q: Mixture) -> float:
    """Mean of |p - q| / (p + q) over points of both: 0 for equal densities, 1 where they do not meet."""
    points = [m.sample(4000, torch.Generator().manual_seed(i)).detach() for i, m in enumerate((p, q))]
    now = torch.zeros(8000, dtype=torch.long)
    log_ratio = p.log_density(torch.cat(points), now) - q.log_density(torch.cat(points), now)
    return torch.tanh(log_ratio / 2).abs().mean().item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_driven_to_its_optimum(name: str, seed: int):
    """Eight trained means, each begun near a mode, so that q = p can be reached: the optimum of every one of them.

    Forward KL's and Neyman's weights are clipped at 10, as in a run (with seed 0 that is reached). That bends the way there, not
    its end, where h(1) = 1.
    """
    generator = torch.Generator().manual_seed(seed)
    modes = ring(8, 2.0)
    means = (modes + 0.5 * torch.randn(8, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    p, q = Mixture(SCHEDULE, modes, 0.3), Mixture(SCHEDULE, means, 0.3)
    method, draws = DistributionMatching(PROCESS, MatchingConfig(guidance=1.0, divergence=name)), Draws(0, seed)
    before, largest, steps = apart(p, q), 0.0, 200
    optimiser = torch.optim.Adam([means], 0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x0 = q.sample(64, generator)
        g, _, samples = method.gradient(exact(p, q), x0, batch_of(x0), draws)
        largest = max(largest, samples["weight"].max().item())
        optimiser.zero_grad()
        inject_gradient(x0, g).backward()
        optimiser.step()
        decay.step()
    assert before > 0.4
    assert apart(p, q) < 0.05
    assert 1.5 < largest <= 10.0 if name in ("forward_kl", "neyman") else largest <= 1.0
