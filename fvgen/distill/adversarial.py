"""The adversarial parts that several methods share: logits of clips, the student's loss and the classifier's."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.diffusion.predict import stack_conditions
from fvgen.distill import losses
from fvgen.distill.configs import MatchingConfig, StageOneConfig
from fvgen.distill.networks import Batch, Draws, Networks
from fvgen.distill.rollout import Process
from fvgen.types import Condition

SATURATED = 4.0  # standard deviations of the real latents; 6e-5 of a normal distribution lie beyond


def moments(x0: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of the student's latents and of the real ones: a drift comes before visible damage.

    ``saturation`` is the share of the student's latents that lie beyond ``SATURATED`` standard deviations of the real ones.
    """
    x, real = x0.detach().float(), clean.float()
    mean, std = real.mean(), real.std()
    beyond = ((x - mean).abs() > SATURATED * std).float().mean()
    return {"latent_mean": x.mean(), "latent_std": x.std(), "real_mean": mean, "real_std": std, "saturation": beyond}


def clip_logits(networks: Networks, x: Tensor, t: Tensor, condition: Condition, through_trunk: bool) -> Tensor:
    """Logits ``[B]``; a critic's own update needs no gradient through the trunk, the student's gets all of its through it."""
    assert networks.trunk is not None
    assert networks.head is not None
    with torch.set_grad_enabled(through_trunk and torch.is_grad_enabled()):
        features = networks.trunk(x, t, condition)
    return networks.head(features)


def adversarial_loss(
    networks: Networks, process: Process, x0: Tensor, t: Tensor, batch: Batch, draws: Draws
) -> tuple[Tensor, Tensor]:
    """The student's adversarial loss (eq. 5) on its samples ``x0``, and the mean logit."""
    logits = clip_logits(networks, process.noise(x0, t, draws.seed()).x_t, t, batch.condition, through_trunk=True)
    return losses.student_adversarial(logits), logits.detach().mean()


def classifier_loss(
    networks: Networks, process: Process, x0: Tensor, batch: Batch, draws: Draws, config: StageOneConfig | MatchingConfig
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logistic loss of the head (eqs. 5 and 7): real and generated clips at the same times, under the same noise.

    Returns:
        the loss, its statistics, and the logits ``[B]`` of every sample.
    """
    t = draws.times(config.classifier_span, len(process), x0.shape[0], x0.device)
    seed, condition = draws.seed(), batch.condition
    x_real, x_fake = (process.noise(x, t, seed).x_t for x in (batch.clean.to(x0.dtype), x0))
    # in one call: half as many kernels are launched, and the trunk's weights are read once
    both = stack_conditions(condition, condition)
    real, fake = clip_logits(networks, torch.cat([x_real, x_fake]), t.repeat(2), both, through_trunk=False).chunk(2)
    loss = losses.classifier_logistic(real, fake)
    statistics = {"head_loss": loss.detach(), "logit_real": real.detach().mean(), "logit_fake": fake.detach().mean()}
    if config.r1_weight:
        generator = torch.Generator(x_real.device).manual_seed(draws.seed())
        noise = torch.randn(x_real.shape, generator=generator, device=x_real.device, dtype=x_real.dtype)
        moved = clip_logits(networks, x_real + config.r1_sigma * noise, t, condition, through_trunk=False)
        penalty = losses.approximate_r1(real, moved)
        loss = loss + config.r1_weight * penalty
        statistics["r1"] = penalty.detach()
    return loss, statistics, {"logit_real": real.detach(), "logit_fake": fake.detach()}
