"""The weighted gradient against its definition, its conventions one by one, and the kernels in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from fvgen.kernels.score_weighting import DIVERGENCES, divergence_weight, score_weighting
from tests.processes import interpret

F_SECOND = {  # f''(r) of each divergence E_fake[f(r)]
    "reverse_kl": lambda r: 1 / r**2,  # f = -log r
    "softened_rkl": lambda r: 1 / (r**2 * (r + 1)),  # f = (r + 1) log(1 + 1 / r)
    "jensen_shannon": lambda r: 1 / (r * (r + 1)),  # f = r log r - (r + 1) log(r + 1)
    "forward_kl": lambda r: 1 / r,  # f = r log r
    "neyman": lambda r: 1 / r**3,  # f = 1 / (2 r)
}


def inputs(batch: int = 3, shape: tuple[int, ...] = (2, 4, 5)) -> dict:
    random = torch.Generator().manual_seed(0)
    names = ("x0", "x_tau", "v_real", "v_fake", "v_uncond")
    values = torch.randn((5, batch, *shape), generator=random, dtype=torch.float64).unbind(0)
    tables = 0.2 + 0.8 * torch.rand(3, 9, generator=random)
    logits = torch.randn(batch, generator=random)
    return {**dict(zip(names, values, strict=True)), "logits": logits, "tau": torch.tensor([0, 8, 3][:batch]), "tables": tables}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weight_is_r_squared_times_second_derivative(divergence):
    logits = torch.tensor([-4.0, -0.5, 0.0, 1.0, 3.0])
    r = logits.double().exp()
    found = divergence_weight(logits, divergence, clip=1e9).double()
    torch.testing.assert_close(found, r**2 * F_SECOND[divergence](r), rtol=2e-6, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weight_is_finite_for_extreme_logits(divergence):
    found = divergence_weight(torch.tensor([-1e4, -90.0, 90.0, 1e4]), divergence, clip=7.0)
    assert found.isfinite().all()
    assert found.max() <= 7.0


def test_gradient_by_its_definition():
    given = inputs()
    out = score_weighting(**given, guidance=3.0)
    a, b, s = (given["tables"][i, given["tau"]].double()[:, None, None, None] for i in range(3))
    real = given["v_uncond"] + 3.0 * (given["v_real"] - given["v_uncond"])
    mu_real, mu_fake = ((a * given["x_tau"] - b * v) / s for v in (real, given["v_fake"]))
    for i in range(3):
        normaliser = (given["x0"][i] - mu_real[i]).abs().mean() + 1e-6
        expected = torch.sigmoid(-given["logits"][i].double()) * (mu_fake[i] - mu_real[i]) / normaliser
        torch.testing.assert_close(out.gradient[i], expected, rtol=1e-6, atol=1e-9)
        assert out.normaliser[i].item() == pytest.approx(normaliser.item(), rel=1e-6)
        assert out.size[i].item() == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-6)


def test_samples_are_normalised_on_their_own():
    given = inputs()
    alone = {k: v if k == "tables" else v[1:2] for k, v in given.items()}
    together = score_weighting(**given, guidance=2.0, rescale=0.5)
    torch.testing.assert_close(together.gradient[1:2], score_weighting(**alone, guidance=2.0, rescale=0.5).gradient)


def test_guidance_one_is_no_guidance():
    given = inputs()
    without = {k: v for k, v in given.items() if k != "v_uncond"}
    torch.testing.assert_close(score_weighting(**given, guidance=1.0).gradient, score_weighting(**without).gradient)


def test_full_rescale_gives_the_conditional_spread():
    """With mu_fake = 0 velocity and a = 0, the gradient is proportional to the rescaled guided velocity."""
    given = inputs()
    given["tables"] = torch.tensor([[0.0], [1.0], [1.0]]).expand(3, 9)
    given["v_fake"] = torch.zeros_like(given["v_fake"])
    out = score_weighting(**given, guidance=5.0, rescale=1.0, divergence="reverse_kl")
    velocity = out.gradient * out.normaliser[:, None, None, None]
    torch.testing.assert_close(velocity.std((1, 2, 3)), given["v_real"].std((1, 2, 3)), rtol=1e-6, atol=0)


def test_equal_scores_give_no_gradient_and_perfect_samples_no_infinity():
    given = inputs()
    given["v_fake"] = given["v_real"]
    del given["v_uncond"]
    assert (score_weighting(**given).gradient == 0).all()
    a, b, s = (given["tables"][i, given["tau"]].double()[:, None, None, None] for i in range(3))
    given["x0"] = (a * given["x_tau"] - b * given["v_real"]) / s
    assert score_weighting(**given).gradient.isfinite().all()


def test_gradient_carries_no_graph():
    given = inputs()
    given["x0"].requires_grad_()
    assert not score_weighting(**given).gradient.requires_grad


def test_unknown_divergence_is_named():
    with pytest.raises(ValueError, match="softened_rkl"):
        score_weighting(**inputs(), divergence="hinge")


def test_softened_reverse_kl_is_a_bounded_sigmoid():
    assert divergence_weight(torch.tensor([0.0]), "softened_rkl", 1.0).item() == 0.5
    assert divergence_weight(torch.tensor([math.log(3.0)]), "softened_rkl", 1.0).item() == pytest.approx(0.25, rel=1e-6)


_INTERPRETED = """
import torch
from fvgen.kernels.score_weighting import reference, spec, triton
for case in spec.SPEC.cases:
    args = case.make("cpu", torch.float32)
    for expected, found in zip(reference.score_weighting(*args), triton.score_weighting(*args)):
        assert (expected - found).abs().max() <= 2e-6 * expected.abs().max(), case.name
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)
