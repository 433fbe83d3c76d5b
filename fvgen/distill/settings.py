"""The settings of a training run, and what the presets start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from fvgen.distill.classifier import ClassifierConfig
from fvgen.distill.configs import STUDENT_TIMES
from fvgen.distill.divergences import DIVERGENCES
from fvgen.utils.errors import UserError


def _positive(x: float) -> bool:
    return x > 0


def _span(x: tuple[float, ...]) -> bool:
    return len(x) == 2 and 0 <= x[0] < x[1] <= 1


def _times(x: tuple[int, ...]) -> bool:
    return len(x) > 0 and x[0] == 999 and list(x) == sorted(set(x), reverse=True) and x[-1] > 0


_LIMITS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("clip_norm", "clip", "guidance", "r1_sigma"), _positive, "above 0"),
    (("trajectories", "trajectory_steps", "critic_updates"), _positive, "at least 1"),
    (("lr", "fake_lr", "head_lr", "weight_decay"), lambda x: x >= 0, "at least 0"),
    (("adversarial_weight", "r1_weight", "lead", "warmup"), lambda x: x >= 0, "at least 0"),
    (("rescale",), lambda x: 0 <= x <= 1, "in 0 .. 1"),
    (("ema",), lambda x: 0 < x < 1, "between 0 and 1"),
    (("betas",), lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), "two numbers from 0 to below 1"),
    (("score_span", "fake_span", "classifier_span"), _span, "two rising fractions of the schedule in 0 .. 1"),
    (("times",), _times, "falling time steps that begin at 999 and end above 0"),
    (("inputs",), lambda x: x in ("real", "rollout"), "real or rollout"),
    (("divergence",), lambda x: x in DIVERGENCES, f"one of {', '.join(DIVERGENCES)}"),
    (("teacher_dtype",), lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16"),
)


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what a run computes.

    Attributes:
        recipe: preset of the teacher.
        run: a name of :data:`fvgen.distill.comparison.RUNS`.
        stages: which of the run's methods are trained, counted from 1.
        iterations: student updates per stage; of a recipe those of the full method, see :func:`~.comparison.stage_iterations`.
        batch: clips per update, over all GPUs.
        micro_batch: clips per forward call. ``batch / micro_batch`` calls are dealt out to the GPUs; each draws its own random
            numbers, so the number of GPUs changes nothing but the order of additions.
        lr, betas, weight_decay: of AdamW, for every network.
        fake_lr, head_lr: learning rates of the fake score and of the classifier's head, None for ``lr``.
        lead: iterations at the beginning of a stage in which only the critics learn. AdamW takes steps of full size whatever the
            gradient's size, so a student that starts together with an untrained head follows noise.
        warmup: iterations over which the learning rates rise from 0, each from where its network begins to learn.
        clip_norm: bound of each network's gradient norm.
        ema: decay of the student's running average.
        guidance, rescale: of the teacher in stage 2 and on its trajectories.
        divergence: of stage 2; None for the method's own.
        clip: bound of the weights h that have none of their own.
        normalise_weight: divide h by its running mean.
        adversarial_weight: of the student's adversarial loss beside the matching loss; None for the method's own.
        score_span, fake_span, classifier_span: times at which teacher and fake score are compared, the fake score is trained and
            the classifier is trained and asked, as fractions of the schedule.
        r1_weight, r1_sigma: of the classifier's approximate R1 penalty, and the deviation of its perturbation; 0 leaves it out.
        times: the student's time steps.
        inputs: what the student denoises in training: ``real`` (noisy real clips) or ``rollout`` (its own sampler's states).
        critic_updates: per update of the student; None for the method's own.
        head: size of the classifier's head; its input channels are the teacher's.
        checkpointing: keep only layer inputs for the backward pass and compute the rest again.
        graphs: replay network calls as CUDA graphs: training is otherwise bound by launching its kernels.
        repeatable: only algorithms whose additions have a fixed order; some are slower on a GPU.
        teacher_dtype: stored precision of the frozen teacher, "float32" or "bfloat16".
        trajectories: number of the teacher's trajectories that a regression trains on.
        trajectory_steps: DDIM steps of each.
        seed: of weights, order and noise.
    """

    recipe: str
    run: str = "fvgen"
    stages: tuple[int, ...] = (1, 2)
    iterations: tuple[int, ...] = (4000, 5000)
    batch: int = 4
    micro_batch: int = 1
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    fake_lr: float | None = None
    head_lr: float | None = None
    lead: int = 0
    warmup: int = 100
    clip_norm: float = 1.0
    ema: float = 0.999
    guidance: float = 7.5
    rescale: float = 0.0
    divergence: str | None = None
    clip: float = 10.0
    normalise_weight: bool = False
    adversarial_weight: float | None = None
    score_span: tuple[float, float] = (0.02, 0.98)
    fake_span: tuple[float, float] = (0.0, 1.0)
    classifier_span: tuple[float, float] = (0.0, 1.0)
    r1_weight: float = 0.0
    r1_sigma: float = 0.1
    times: tuple[int, ...] = STUDENT_TIMES
    inputs: str = "real"
    critic_updates: int | None = None
    head: ClassifierConfig = field(default_factory=ClassifierConfig)
    checkpointing: bool = False
    graphs: bool = False
    repeatable: bool = True
    teacher_dtype: str = "float32"
    trajectories: int = 1024
    trajectory_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch % self.micro_batch:
            raise UserError(f"a batch of {self.batch} cannot be cut into pieces of {self.micro_batch}; choose a divisor")
        for names, fits, words in _LIMITS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise UserError(f"{name} must be {words}, got {value!r}")

    def idle(self) -> str | None:
        """A sentence where the lead takes most of a stage, so that the student hardly learns."""
        shortest = min(self.iterations[stage - 1] for stage in self.stages if stage <= len(self.iterations))
        if 2 * self.lead < shortest or (self.run == "causvid" and self.stages == (1,)):
            return None
        learns = f"the student learns in {max(0, shortest - self.lead)} of {shortest} iterations"
        return f"{learns}, since the critics lead by {self.lead}; give more --iterations, or a smaller --lead"

    @property
    def lanes(self) -> int:
        """Forward calls per update, over all GPUs."""
        return self.batch // self.micro_batch

    def calls(self, world: int) -> int:
        """Forward calls per update of each of so many processes.

        Raises:
            UserError: they cannot be dealt out.
        """
        if self.lanes % world:
            calls, smaller = f"{self.lanes} forward calls of {self.micro_batch} clips", max(1, self.batch // world)
            raise UserError(f"{calls} cannot be dealt out to {world} processes; give another --batch, or --micro-batch {smaller}")
        return self.lanes // world

    def rate(self, network: str, iteration: int, alone: bool = False) -> float:
        """Learning rate of a network in an iteration of a stage, counted from 0.

        Args:
            network: ``student``, ``fake`` or ``head``.
            iteration: student updates before.
            alone: the stage has no critics, so that nobody leads.
        """
        own = {"fake": self.fake_lr, "head": self.head_lr}.get(network)
        learning = iteration + 1 - (self.lead if network == "student" and not alone else 0)
        return (self.lr if own is None else own) * min(1.0, max(learning, 0) / max(self.warmup, 1))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Cadence:
    """How often, in iterations.

    Attributes:
        log: statistics are fetched from the device, shown and judged by the guards.
        checkpoint, keep: a checkpoint is written; so many of the newest stay.
        minutes: a checkpoint is also written when the last one is older, once statistics are fetched.
        validate: validation clips are generated; 0 for never.
    """

    log: int = 20
    checkpoint: int = 500
    keep: int = 3
    validate: int = 500
    minutes: float = 15.0


# What may differ when a run is continued: how its work is dealt out and how long it lasts, not what it computes.
MAY_CHANGE = ("iterations", "micro_batch", "checkpointing", "graphs", "repeatable")


_LATER = ("clip", "adversarial_weight", "score_span", "fake_span", "classifier_span", "r1_weight", "r1_sigma")


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings that a continued run would have to keep, and does not.

    One that the run's version of FVGen did not have yet was then what is the default now.
    """
    known = {f.name: f.default for f in fields(TrainSettings) if f.default is not MISSING}
    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
    old = {**{k: v for k, v in defaults.items() if k in _LATER}, **before}
    return sorted(k for k in {*old, *now} - set(MAY_CHANGE) if old.get(k) != now.get(k))


def default_settings(recipe: str) -> TrainSettings:
    """What a preset is trained with unless told otherwise.

    Raises:
        UserError: there is no such preset.
    """
    full = TrainSettings(recipe, checkpointing=True, graphs=True, teacher_dtype="bfloat16")
    small = TrainSettings(
        recipe,
        iterations=(150, 100),
        batch=8,
        micro_batch=8,
        lr=5e-6,
        fake_lr=1e-4,
        head_lr=1e-3,
        lead=20,
        warmup=20,
        guidance=1.0,
        head=ClassifierConfig(width=64, groups=16),
        graphs=True,
    )
    known = {"tiny": small, "viewcrafter_512": full, "viewcrafter_1024": full}
    if recipe not in known:
        raise UserError(f"there is no recipe {recipe!r}; choose one of {', '.join(known)}")
    return known[recipe]
