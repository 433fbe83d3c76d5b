"""The choices of the methods. Defaults are the paper's; where it is silent, the field says that the value is this project's."""

from __future__ import annotations

from dataclasses import dataclass

STUDENT_TIMES = (999, 749, 499, 249)  # trailing spacing, as the sampler visits them


def _check_span(name: str, span: tuple[float, float]) -> None:
    if not 0.0 <= span[0] < span[1] <= 1.0:
        raise ValueError(f"{name} must be two rising fractions of the schedule in 0..1, got {span}")


@dataclass(frozen=True)
class StageOneConfig:
    """Stage 1.

    Attributes:
        times: the student's time steps.
        inputs: ``real``: noisy real clips; ``rollout``: the student's own sampler (see :func:`student_sample`).
        classifier_span: range of the classifier's times, as fractions of the schedule.
        critic_updates: updates of the head per update of the student (this project's).
        r1_weight, r1_sigma: weight of the approximate R1 penalty (0 leaves it out) and standard deviation of its perturbation of
            the noisy real latents (this project's).
    """

    times: tuple[int, ...] = STUDENT_TIMES
    inputs: str = "real"
    classifier_span: tuple[float, float] = (0.0, 1.0)
    critic_updates: int = 5
    r1_weight: float = 0.0
    r1_sigma: float = 0.1

    def __post_init__(self) -> None:
        _check_span("classifier_span", self.classifier_span)


@dataclass(frozen=True)
class MatchingConfig:
    """Stage 2 and its variants.

    Attributes:
        times, inputs, critic_updates, r1_weight, r1_sigma: as in :class:`StageOneConfig`.
        score_span: range of the times at which teacher and fake score are compared.
        fake_span: range of the times at which the fake score is trained: all, as the teacher was (this project's).
        classifier_span: range of the times at which the classifier is trained; it should contain ``score_span``.
        guidance: of the teacher, ``uncond + w (cond - uncond)``: 1 is none. 7.5 is the teacher's own for sampling.
        rescale: guidance rescale of the teacher, 0 .. 1 (this project's).
        divergence: a name of ``divergences.DIVERGENCES``.
        clip: bound of the weights that have none.
        adversarial_weight: of the student's adversarial loss beside the matching loss; 0 leaves it out.
    """

    times: tuple[int, ...] = STUDENT_TIMES
    inputs: str = "real"
    score_span: tuple[float, float] = (0.02, 0.98)
    fake_span: tuple[float, float] = (0.0, 1.0)
    classifier_span: tuple[float, float] = (0.0, 1.0)
    guidance: float = 7.5
    rescale: float = 0.0
    divergence: str = "softened_rkl"
    clip: float = 10.0
    adversarial_weight: float = 0.0
    critic_updates: int = 5
    r1_weight: float = 0.0
    r1_sigma: float = 0.1

    def __post_init__(self) -> None:
        for name in ("score_span", "fake_span", "classifier_span"):
            _check_span(name, getattr(self, name))


@dataclass(frozen=True)
class RegressionConfig:
    """Regression on the teacher's trajectories.

    Attributes:
        times: the student's time steps, at which the trajectories were recorded, in this order.
    """

    times: tuple[int, ...] = STUDENT_TIMES
