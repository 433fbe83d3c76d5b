"""The methods: what one update of the student and one of its critics compute. Which are run when: ``comparison.py``.

All of them follow :class:`Method`. The critics (classifier head, fake score) are updated ``critic_updates`` times per update of
the student. Networks are never frozen or thawed here: what an update trains is in its ``losses``, and what it must not
differentiate runs without a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fvgen.diffusion.predict import stack_conditions, unconditional
from fvgen.distill import losses
from fvgen.distill.adversarial import adversarial_loss, classifier_loss, clip_logits, moments
from fvgen.distill.configs import MatchingConfig, RegressionConfig, StageOneConfig
from fvgen.distill.divergences import get_divergence
from fvgen.distill.networks import Batch, Draws, Networks, Update
from fvgen.distill.rollout import Process, student_sample
from fvgen.distill.weight_mean import WeightMean
from fvgen.kernels.score_weighting import score_weighting


class Method(Protocol):
    """What a trainer sees.

    Attributes:
        trained: names of the trained networks (fields of :class:`Networks`), the student first.
        critic_updates: updates of the critics per update of the student; 0 when there are none.
    """

    @property
    def trained(self) -> tuple[str, ...]: ...

    @property
    def critic_updates(self) -> int: ...

    def student_update(self, networks: Networks, batch: Batch, draws: Draws) -> Update:
        """Loss and statistics for the student."""
        ...

    def critic_update(self, networks: Networks, batch: Batch, draws: Draws) -> Update:
        """Losses and statistics for the other trained networks."""
        ...


@dataclass(frozen=True)
class StageOne:
    """Adversarial initialisation: student against classifier head (eq. 5)."""

    process: Process
    config: StageOneConfig

    trained = ("student", "head")

    @property
    def critic_updates(self) -> int:
        return self.config.critic_updates

    def student_update(self, networks: Networks, batch: Batch, draws: Draws) -> Update:
        """``L_G`` of the student's samples, noised to a time drawn per sample."""
        config = self.config
        x0 = student_sample(networks.student, self.process, batch, config.times, config.inputs, draws, gradient=True)
        t = draws.times(config.classifier_span, len(self.process), x0.shape[0], x0.device)
        loss, logit = adversarial_loss(networks, self.process, x0, t, batch, draws)
        return Update({"student": loss}, {"student_loss": loss.detach(), "logit_fake": logit, **moments(x0, batch.clean)})

    def critic_update(self, networks: Networks, batch: Batch, draws: Draws) -> Update:
        """``L_D`` and, where it has a weight, the approximate R1 penalty."""
        config = self.config
        x0 = student_sample(networks.student, self.process, batch, config.times, config.inputs, draws, gradient=False)
        loss, statistics, samples = classifier_loss(networks, self.process, x0, batch, draws, config)
        return Update({"head": loss}, {**statistics, **moments(x0, batch.clean)}, samples)


@dataclass(frozen=True)
class DistributionMatching:
    """Stage 2 (eqs. 6 to 8); by configuration also plain reverse KL and DMD2.

    Attributes:
        process, config: the forward process and the choices.
        weight_mean: divide h by its running mean, which the trainer keeps; None for not at all, the default.
    """

    process: Process
    config: MatchingConfig
    weight_mean: WeightMean | None = None

    @property
    def _uses_ratio(self) -> bool:
        return get_divergence(self.config.divergence).needs_classifier

    @property
    def trained(self) -> tuple[str, ...]:
        head = self._uses_ratio or self.config.adversarial_weight > 0
        return ("student", "fake", "head") if head else ("student", "fake")

    @property
    def critic_updates(self) -> int:
        return self.config.critic_updates

    def gradient(
        self, networks: Networks, x0: Tensor, batch: Batch, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """``g = h(r) (mu_fake - mu_real) / m`` (eq. 8) at ``x0 [B, C, T, h, w]``, in its dtype.

        Also its statistics, and the weight h and time ``[B]`` of every sample.
        """
        assert networks.teacher is not None
        assert networks.fake is not None
        config, condition = self.config, batch.condition
        with torch.no_grad():
            x0 = x0.detach()
            t = draws.times(config.score_span, len(self.process), x0.shape[0], x0.device)
            x = self.process.noise(x0, t, draws.seed()).x_t
            fake = networks.fake(x, t, condition).to(x0.dtype)
            if config.guidance == 1.0:
                real, uncond = networks.teacher(x, t, condition).to(x0.dtype), None
            else:
                both = stack_conditions(condition, unconditional(condition))
                real, uncond = networks.teacher(torch.cat([x, x]), t.repeat(2), both).to(x0.dtype).chunk(2)
            # a weight that does not depend on r takes any logit
            logits = clip_logits(networks, x, t, condition, False) if self._uses_ratio else x0.new_zeros(x0.shape[0]).float()
            found = score_weighting(
                *(x0, x, real, fake, logits, t, self.process.tables),
                v_uncond=uncond,
                guidance=config.guidance,
                rescale=config.rescale if uncond is not None else 0.0,
                divergence=config.divergence,
                clip=config.clip,
            )
            names = ("normaliser", "weight", "difference", "size")
            statistics = {name: getattr(found, name).mean() for name in names}
            samples = {"weight": found.weight, "time": t}
            if self.weight_mean is None:
                return found.gradient, statistics, samples
            return found.gradient / self.weight_mean.value.to(found.gradient.device), statistics, samples

    def student_update(self, networks: Networks, batch: Batch, draws: Draws) -> Update:
        """The loss whose gradient is g, and the adversarial one where it has a weight."""
        config = self.config
        x0 = student_sample(networks.student, self.process, batch, config.times, config.inputs, draws, gradient=True)
        gradient, statistics, samples = self.gradient(networks, x0, batch, draws)
        loss = losses.inject_gradient(x0, gradient)
        statistics = {"student_loss": loss.detach(), **statistics, **moments(x0, batch.clean)}
        if config.adversarial_weight:
            t = draws.times(config.classifier_span, len(self.process), x0.shape[0], x0.device)
            adversarial, statistics["logit_fake"] = adversarial_loss(networks, self.process, x0, t, batch, draws)
            statistics["adversarial_loss"] = adversarial.detach()
            loss = loss + config.adversarial_weight * adversarial
        return Update({"student": loss}, statistics, samples)

    def critic_update(self, networks: Networks, batch: Batch, draws: Draws) -> Update:
        """The fake score's denoising loss on the student's samples and, where the head is trained, its logistic loss."""
        assert networks.fake is not None
        config = self.config
        x0 = student_sample(networks.student, self.process, batch, config.times, config.inputs, draws, gradient=False)
        t = draws.times(config.fake_span, len(self.process), x0.shape[0], x0.device)
        noisy = self.process.noise(x0, t, draws.seed(), want_velocity=True)
        assert noisy.velocity is not None
        parts = {"fake": losses.denoising(networks.fake(noisy.x_t, t, batch.condition), noisy.velocity)}
        statistics = {"fake_loss": parts["fake"].detach(), **moments(x0, batch.clean)}
        if "head" in self.trained:
            parts["head"], more, samples = classifier_loss(networks, self.process, x0, batch, draws, config)
            return Update(parts, statistics | more, samples)
        return Update(parts, statistics)


@dataclass(frozen=True)
class OdeRegression:
    """Initialisation on trajectories of the teacher (CausVid-type); there is no critic."""

    process: Process
    config: RegressionConfig

    trained = ("student",)
    critic_updates = 0

    def student_update(self, networks: Networks, batch: Batch, draws: Draws) -> Update:
        """Squared distance between ``G(x_t, t)`` and the end of the trajectory, at one of its states per sample."""
        if batch.ode_states is None or batch.ode_clean is None:
            raise ValueError("the regression needs batches with ode_states and ode_clean")
        states, times = batch.ode_states, self.config.times
        if states.shape[1] != len(times):
            raise ValueError(f"{len(times)} ODE states per clip are needed, one per time of the student, got {states.shape[1]}")
        pick, t = draws.choice(times, states.shape[0], states.device)
        x = states[torch.arange(states.shape[0], device=states.device), pick]
        x0 = self.process.clean(networks.student, x, t, batch)
        loss = losses.regression(x0, batch.ode_clean)
        return Update({"student": loss}, {"student_loss": loss.detach(), **moments(x0, batch.clean)})

    def critic_update(self, networks: Networks, batch: Batch, draws: Draws) -> Update:
        """Not called: ``critic_updates`` is 0."""
        raise NotImplementedError("the regression has no critic")
