"""Every weight against its divergence: h(r) = r^2 f''(r) by automatic differentiation in float64, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from fvgen.distill.divergences import DIVERGENCES, get_divergence
from fvgen.kernels.score_weighting import DIVERGENCES as OPERATOR_NAMES
from fvgen.kernels.score_weighting import divergence_weight

GENERATORS = {
    "reverse_kl": lambda r: -r.log(),
    "softened_rkl": lambda r: (r + 1) * ((r + 1) / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "forward_kl": lambda r: r * r.log(),
    "neyman": lambda r: (r - 1) ** 2 / (2 * r),
}


def test_the_table_names_what_the_operator_offers():
    assert tuple(DIVERGENCES) == OPERATOR_NAMES


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_weight_is_the_second_derivative(name):
    r = torch.logspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    weight = divergence_weight(r.detach().log(), name, clip=1e6)
    torch.testing.assert_close(weight.double(), (r**2 * second).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_limits(name):
    entry, clip = get_divergence(name), 7.0
    weight = divergence_weight(torch.tensor([-80.0, 0.0, 80.0]), name, clip).tolist()
    expected = [min(x, clip) for x in (entry.at_zero, entry.at_one, entry.at_infinity)]
    assert weight == pytest.approx(expected, abs=1e-12)
    assert entry.bounded == all(math.isfinite(x) for x in (entry.at_zero, entry.at_infinity))
    assert entry.needs_classifier == (name != "reverse_kl")


def test_softened_reverse_kl_is_twice_the_kl_from_the_mixture():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    m = (p + q) / 2
    value = (q * GENERATORS["softened_rkl"](p / q)).sum()
    assert value.item() == pytest.approx((2 * (m * (m / p).log()).sum() + 2 * math.log(2)).item(), rel=1e-12)


def test_unknown_name():
    with pytest.raises(ValueError, match="softened_rkl"):
        get_divergence("kl")
