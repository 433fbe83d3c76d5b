"""Distribution-matching gradient with f-divergence weights, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the normaliser
# h(r) = r^2 f''(r) for the f-divergence E_fake[f(real / fake)], with r = exp(logit)
DIVERGENCES = ("reverse_kl", "softened_rkl", "jensen_shannon", "forward_kl", "neyman")


def divergence_weight(logits: Tensor, divergence: str, clip: float) -> Tensor:
    """``h(r)`` float32 of logits ``[B]``; only the two unbounded ones are clipped, at ``clip``."""
    l = logits.float()
    if divergence == "reverse_kl":
        return torch.ones_like(l)
    if divergence == "softened_rkl":
        return torch.sigmoid(-l)
    if divergence == "jensen_shannon":
        return torch.sigmoid(l)
    if divergence == "forward_kl":
        return l.exp().clamp(max=clip)
    if divergence == "neyman":
        return (-l).exp().clamp(max=clip)
    raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")


def score_weighting(
    x0: Tensor,
    x_tau: Tensor,
    v_real: Tensor,
    v_uncond: Tensor,
    v_fake: Tensor,
    logits: Tensor,
    tau: Tensor,
    tables: Tensor,
    guidance: float,
    rescale: float,
    divergence: str,
    clip: float,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x0.dtype, torch.float32)
    shape = (-1, *[1] * (x0.ndim - 1))
    axes = tuple(range(1, x0.ndim))
    a, b, s = (table.to(compute).reshape(shape) for table in tables[:, tau].unbind(0))
    clean, noisy, cond, fake = (x.to(compute) for x in (x0, x_tau, v_real, v_fake))
    real = cond
    if v_uncond.numel():
        uncond = v_uncond.to(compute)
        real = uncond + guidance * (cond - uncond)
        if rescale:
            ratio = cond.std(axes, keepdim=True) / real.std(axes, keepdim=True)
            real = real * (rescale * ratio + (1 - rescale))
    clean_real = (a * noisy - b * real) / s
    difference = b / s * (real - fake)  # mu_fake - mu_real
    normaliser = (clean - clean_real).abs().mean(axes) + EPSILON
    h = divergence_weight(logits, divergence, clip).to(compute)
    gradient = (h / normaliser).reshape(shape) * difference
    mean_square = difference.square().mean(axes)
    statistics = torch.stack([normaliser, h, mean_square.sqrt(), h / normaliser * mean_square.sqrt()], 1)
    return gradient.to(x0.dtype), statistics
