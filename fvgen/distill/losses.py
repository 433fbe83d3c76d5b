"""The losses of distillation. Pure functions of network outputs; each computes in at least float32 and returns a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def student_adversarial(fake: Tensor) -> Tensor:
    """``L_G = mean softplus(-l_fake)``: the student's side of eq. 5 as binary cross-entropy (arXiv 1406.2661, non-saturating).

    Args:
        fake: logits ``[B]`` of generated clips, with the graph back to the student.
    """
    return F.softplus(-_wide(fake)).mean()


def classifier_logistic(real: Tensor, fake: Tensor) -> Tensor:
    """``L_D = mean [softplus(-l_real) + softplus(l_fake)]``, real = 1.

    Its optimum is ``exp(l) = p_real / p_fake = r`` (eq. 7), for which real and generated clips must be equally many. Eq. 5 as
    printed, and hinge or relativistic losses, have no such optimum.

    Args:
        real, fake: logits ``[B]``.
    """
    if real.shape != fake.shape:
        raise ValueError(f"as many real as generated logits are needed, got {tuple(real.shape)} and {tuple(fake.shape)}")
    return (F.softplus(-_wide(real)) + F.softplus(_wide(fake))).mean()


def approximate_r1(real: Tensor, perturbed: Tensor) -> Tensor:
    """``mean (l(x) - l(x + sigma xi))^2``, about ``sigma^2 E |grad l|^2``: R1 without a second derivative (arXiv 2501.08316).

    Args:
        real, perturbed: logits ``[B]`` of real clips without and with a small Gaussian perturbation.
    """
    return (_wide(real) - _wide(perturbed)).square().mean()


def denoising(prediction: Tensor, velocity: Tensor) -> Tensor:
    """``mean |v_fake(x_tau) - v|^2`` (arXiv 2202.00512): the teacher's own loss, for the fake score on the student's samples.

    Args:
        prediction: ``[B, ...]`` of the fake score, without guidance.
        velocity: ``[B, ...]`` ``a eps - b s x0`` of the same noise; it is not differentiated.
    """
    return F.mse_loss(_wide(prediction), _wide(velocity.detach()))


def inject_gradient(x0: Tensor, gradient: Tensor) -> Tensor:
    """``1/2 mean |x0 - stopgrad(x0 - g)|^2``, whose derivative by ``x0`` is ``g / x0.numel()`` (eq. 8; arXiv 2311.18828, eq. 7).

    Args:
        x0: ``[B, ...]`` the student's clean latents.
        gradient: ``[B, ...]`` g, already divided by the normaliser m of each sample.
    """
    # in half precision x0 - (x0 - g) would round a small g away
    wide = _wide(x0)
    target = (wide - gradient.to(wide.dtype)).detach()
    return 0.5 * (wide - target).square().mean()


def regression(x0: Tensor, target: Tensor) -> Tensor:
    """``mean |G(x_t, t) - x0_ode|^2``: initialisation on pairs of the teacher's probability-flow ODE (arXiv 2412.07772).

    Args:
        x0: ``[B, ...]`` the student's clean latents.
        target: ``[B, ...]`` where the teacher's trajectory through x_t ends.
    """
    return F.mse_loss(_wide(x0), _wide(target.detach()))
