"""The distribution-matching gradient of the student, weighted by an f-divergence. Rules: README.md beside this file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fvgen.kernels.score_weighting.reference import DIVERGENCES, divergence_weight
from fvgen.kernels.score_weighting.spec import score_weighting_op

__all__ = ["DIVERGENCES", "Weighted", "divergence_weight", "score_weighting"]


class Weighted(NamedTuple):
    """The gradient ``[B, ...]`` and per-sample statistics ``[B]`` float32.

    Attributes:
        gradient: dL/dx0, in the dtype of x0.
        normaliser: m, mean absolute distance of x0 from the teacher's clean latent.
        weight: h(r).
        difference: root mean square of mu_fake - mu_real.
        size: root mean square of the gradient.
    """

    gradient: Tensor
    normaliser: Tensor
    weight: Tensor
    difference: Tensor
    size: Tensor


def score_weighting(
    x0: Tensor,
    x_tau: Tensor,
    v_real: Tensor,
    v_fake: Tensor,
    logits: Tensor,
    tau: Tensor,
    tables: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    rescale: float = 0.0,
    divergence: str = "softened_rkl",
    clip: float = 10.0,
) -> Weighted:
    """``g = h(r) (mu_fake(x_tau) - mu_real(x_tau)) / m`` per sample, with ``mu = (a x_tau - b v) / s`` and ``r = exp(logit)``.

    Args:
        x0: ``[B, ...]`` the student's clean latents. Nothing here is differentiated: use ``0.5 |x0 - (x0 - g).detach()|^2``.
        x_tau: ``[B, ...]`` the same noised to ``tau``.
        v_real, v_fake: ``[B, ...]`` velocities of the teacher (conditional) and of the fake score.
        logits: ``[B]`` float32 of the classifier, real = 1.
        tau: ``[B]`` int64; tables: ``[3, S]`` float32 a_t, b_t, s_t.
        v_uncond: ``[B, ...]`` unconditional velocity of the teacher; without it there is no guidance.
        guidance: ``v_uncond + guidance (v_real - v_uncond)``, so 1 is no guidance.
        rescale: 0 .. 1, how far the guided velocity's standard deviation is pulled back to the conditional one's.
        divergence: one of ``DIVERGENCES``: h = 1, sigmoid(-l), sigmoid(l), exp(l), exp(-l).
        clip: bound of the two exponentials.

    Sources: distribution matching (arXiv 2311.18828), f-divergence weights (arXiv 2502.15681), softened reverse KL (FVGen).

    Raises:
        ValueError: an unknown divergence. RuntimeError: shapes that do not fit together.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    uncond = x0.new_empty(0) if v_uncond is None else v_uncond.detach().contiguous()
    tensors = (x.detach().contiguous() for x in (x0, x_tau, v_real))
    gradient, statistics = score_weighting_op(
        *tensors, uncond, v_fake.detach().contiguous(), logits.detach(), tau, tables, guidance, rescale, divergence, clip
    )
    return Weighted(gradient, *statistics.unbind(1))
