"""What makes a clip from renders, stage by stage: the seam at which different samplers are measured with the same code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fvgen.codec import Conditioner
from fvgen.diffusion.noise import seeded_noise
from fvgen.diffusion.parameterisation import add_noise, x0_from_v
from fvgen.diffusion.predict import unet_predictor
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.diffusion.timesteps import make_timesteps
from fvgen.models.bundle import ModelBundle
from fvgen.sampling import ModelSampler


class ClipRunner(Protocol):
    """A sampler as the benchmark drives it.

    ``decode(step(... step(start(c, seed), 0, c) ..., steps - 1, c))`` with ``c = encode(renders)`` is ``clip(renders, seed)``.

    Attributes:
        label: for the records.
        steps: network calls per clip.
        graph_memory: bytes that the recording of the last clip holds, None where nothing is recorded.
        fast: whether clips are made in fast mode, may be set between clips; None where there is no such mode.
    """

    label: str
    steps: int
    graph_memory: int | None
    fast: bool | None

    def encode(self, renders: Tensor) -> Any:
        """What the network is conditioned on, from renders ``[B, T, 3, H, W]`` in [0, 1]."""

    def encode_parts(self, renders: Tensor) -> dict[str, Callable[[], Any]]:
        """The parts of :meth:`encode`, ``vae_encode`` and ``image_tower``, as calls to be timed; empty where it is one piece."""

    def start(self, condition: Any, seed: int) -> Any:
        """State before the first step: the noise."""

    def forward(self, state: Any, number: int, condition: Any) -> Any:
        """The network alone, as :meth:`step` calls it."""

    def step(self, state: Any, number: int, condition: Any) -> Any:
        """State after step ``number`` (from 0); after the last one the clean latents ``[B, C, T, h, w]``."""

    def decode(self, latents: Tensor) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` in [0, 1]."""

    def clip(self, renders: Tensor, seed: int) -> Tensor:
        """Renders to frames, as users call it."""

    def release(self) -> None:
        """Gives back what is kept between calls (recorded graphs), before another batch is measured."""


class Teacher(Protocol):
    """A guided sampler, of which only whole clips are measured; ``label`` and ``steps`` as above."""

    label: str
    steps: int

    def clip(self, renders: Tensor, seed: int, steps: int | None = None) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` from renders of that shape, both in [0, 1]; ``steps`` replaces those of the runner."""

    def release(self) -> None:
        """As above."""


class Runners(NamedTuple):
    """Both samplers of one kind.

    Attributes:
        student: makes a :class:`ClipRunner` of a bundle.
        teacher: makes a :class:`Teacher` of a bundle, steps and guidance scale.
    """

    student: Callable[[ModelBundle], ClipRunner]
    teacher: Callable[[ModelBundle, int, float], Teacher]


RUNNERS = ("engine", "modules")


def find_runners(name: str) -> Runners:
    """The samplers of a kind in ``RUNNERS``: the inference engine with CUDA graphs, or the modules themselves."""
    if name == "modules":
        return Runners(ModelRunner, TeacherRunner)
    from fvgen.bench.engine import EngineRunner, EngineTeacherRunner

    return Runners(EngineRunner, EngineTeacherRunner)


class ModelRunner:
    """:class:`fvgen.sampling.ModelSampler` on the model's own networks, with the few-step sampler.

    Args:
        bundle: the model, on its device.
        steps: network calls per clip.
    """

    label = "modules"
    graph_memory: int | None = None
    fast: bool | None = None

    def __init__(self, bundle: ModelBundle, steps: int = 4) -> None:
        self.steps = steps
        self._model = ModelSampler(bundle, engine=False)
        self.device = self._model.device
        self._schedule = NoiseSchedule.create(bundle.index.base_scale).to(self.device)
        self._predict = unet_predictor(bundle.unet, torch.bfloat16 if self.device.type == "cuda" else None)
        self._times = make_timesteps(steps, "trailing", len(self._schedule))
        self._conditioner = Conditioner(
            self._model.codec, bundle.image_encoder, bundle.image_projector, bundle.prompt, bundle.empty, bundle.index.fps
        )

    def encode(self, renders: Tensor) -> Any:
        return self._model.condition(renders)

    def encode_parts(self, renders: Tensor) -> dict[str, Callable[[], Any]]:
        conditioner, photo = self._conditioner, 2 * renders[:, 0] - 1
        return {
            "vae_encode": lambda: conditioner.codec.encode(renders),
            "image_tower": lambda: conditioner.context(conditioner.prompt, photo),
        }

    def start(self, condition: Any, seed: int) -> Any:
        noise = seeded_noise(seed, self.device)
        return noise(condition.latents.shape), noise

    def forward(self, state: Any, number: int, condition: Any) -> Any:
        x, _ = state
        return self._predict(x, torch.full((x.shape[0],), self._times[number], device=x.device), condition)

    def step(self, state: Any, number: int, condition: Any) -> Any:
        x, noise = state
        t = torch.full((x.shape[0],), self._times[number], device=x.device)
        x0 = x0_from_v(self._schedule, x, self.forward(state, number, condition), t)
        if number + 1 == self.steps:
            return x0
        return add_noise(self._schedule, x0, noise(x.shape), torch.full_like(t, self._times[number + 1])), noise

    def decode(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents)

    def clip(self, renders: Tensor, seed: int) -> Tensor:
        condition = self._model.condition(renders)
        return self._model.decode(self._model.few_step(condition, self.steps, seeded_noise(seed, self.device)))

    def release(self) -> None:
        pass


class TeacherRunner:
    """The guided DDIM sampler: two network calls per step. Only whole clips are measured of it.

    Args:
        bundle: the model, on its device.
        steps: DDIM steps.
        guidance_scale: 1 switches guidance off.
    """

    label = "modules, DDIM"

    def __init__(self, bundle: ModelBundle, steps: int = 50, guidance_scale: float = 7.5) -> None:
        self.steps, self.guidance_scale = steps, guidance_scale
        self._model = ModelSampler(bundle, engine=False)

    def clip(self, renders: Tensor, seed: int, steps: int | None = None) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` from renders of that shape, both in [0, 1]; ``steps`` replaces those of the runner."""
        condition = self._model.condition(renders, guidance=self.guidance_scale != 1.0)
        noise = seeded_noise(seed, self._model.device)
        return self._model.decode(self._model.ddim(condition, steps or self.steps, self.guidance_scale, noise))

    def release(self) -> None:
        pass
