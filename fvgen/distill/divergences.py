"""The f-divergences between real ``p`` and generated ``q`` whose weight ``h(r)`` the score-weighting operator computes.

Minimising ``E_q[f(r)]`` with ``r = p / q`` moves a sample by ``h(r) (mu_real - mu_fake)`` with ``h(r) = r^2 f''(r)`` (arXiv
2502.15681).

Every one of them is least at p = q. They differ in which samples move: a weight that falls with r moves samples that lie where
there is too much generated mass; one that rises with r moves samples that lie where there is too little, and ignores the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvgen.kernels.score_weighting import DIVERGENCES as OPERATOR_NAMES


@dataclass(frozen=True)
class Divergence:
    """What is known of one weighting. It is computed by :func:`fvgen.kernels.score_weighting.divergence_weight` alone.

    Attributes:
        name: as the operator calls it.
        generator: f, up to a constant and a multiple of r - 1, which change nothing.
        weight: h of r and of the logit l = log r.
        at_zero, at_one, at_infinity: h for r -> 0 (no real mass), r = 1 (the optimum) and r -> infinity; ``inf`` is clipped.
        effect: which samples move.
    """

    name: str
    generator: str
    weight: str
    at_zero: float
    at_one: float
    at_infinity: float
    effect: str

    @property
    def bounded(self) -> bool:
        """Whether the operator's clip is never reached."""
        return max(self.at_zero, self.at_infinity) < float("inf")

    @property
    def needs_classifier(self) -> bool:
        """Whether h depends on r at all."""
        return not self.at_zero == self.at_one == self.at_infinity


_INF = float("inf")
_TABLE = (
    Divergence("reverse_kl", "-log r", "1", 1.0, 1.0, 1.0, "all alike; plain distribution matching (arXiv 2311.18828)"),
    Divergence(
        "softened_rkl",
        "(r + 1) log((r + 1) / r), which is 2 KL((p + q) / 2 | p) + 2 log 2",
        "1 / (r + 1) = sigmoid(-l)",
        1.0,
        0.5,
        0.0,
        "those where generated mass exceeds real mass move as under reverse KL, those where it is short of it stay",
    ),
    Divergence(
        "jensen_shannon",
        "r log r - (r + 1) log((r + 1) / 2)",
        "r / (r + 1) = sigmoid(l)",
        0.0,
        0.5,
        1.0,
        "those among real mass; one far from any real mass hardly moves at all",
    ),
    Divergence("forward_kl", "r log r", "r = exp(l), clipped", 0.0, 1.0, _INF, "those where real mass is missed most"),
    Divergence(
        "neyman",
        "(r - 1)^2 / (2 r)",
        "1 / r = exp(-l), clipped",
        _INF,
        1.0,
        0.0,
        "those far from real mass most, without bound: eq. 8 as printed, of which softened_rkl is the derived form",
    ),
)
DIVERGENCES: dict[str, Divergence] = {d.name: d for d in _TABLE}


def get_divergence(name: str) -> Divergence:
    """The divergence of that name.

    Raises:
        ValueError: the operator does not offer it.
    """
    if name not in OPERATOR_NAMES:
        raise ValueError(f"divergence must be one of {', '.join(OPERATOR_NAMES)}, got {name!r}")
    return DIVERGENCES[name]
