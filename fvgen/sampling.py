"""A model with its two samplers: renders in, latents and frames out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fvgen.codec import Conditioner, LatentCodec
from fvgen.diffusion.ddim import ddim_sample
from fvgen.diffusion.few_step import few_step_sample
from fvgen.diffusion.noise import NoiseSource, seeded_noise
from fvgen.diffusion.predict import StepCallback, unet_predictor
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.inference.clip import ClipEngine, ClipGraph, Conditioned
from fvgen.inference.parts import EngineCodec, engine_predictor
from fvgen.models.bundle import ModelBundle
from fvgen.models.spec import ModelIndex
from fvgen.types import Condition
from fvgen.utils.errors import UserError

SAMPLERS = {"few_step": 4, "teacher": 50}  # and the steps with a model that was made for the other one
_MADE_FOR = {"few_step": "few_step", "ddim": "teacher"}  # by the sampler in a model's index
GRAPHS = 2  # recorded clips that are kept: each holds the memory of a clip's activations


class ModelSampler:
    """Encodes, samples and decodes with one model, on the device where the model is.

    On a GPU the packed networks of :mod:`fvgen.inference` run in bfloat16; on the CPU the model's own, in its own precision.

    Args:
        bundle: the model.
        seed: of the sampling noise; every call begins with it again unless it is given a noise source.
        engine: the packed networks, False for the model's own (under bfloat16 autocast on a GPU), None to decide by the device.
        fast: every second few-step call approximates, see :class:`fvgen.inference.clip.ClipEngine`; on the CPU too.
        offload: the device to run on with a bundle that stays on the CPU, see :class:`fvgen.inference.clip.ClipEngine`.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        seed: int = 0,
        engine: ClipEngine | Literal[False] | None = None,
        fast: bool = False,
        offload: torch.device | str | None = None,
    ) -> None:
        self.device = next(bundle.unet.parameters()).device if offload is None else torch.device(offload)
        self.index = bundle.index
        self._seed = seed
        self._schedule = NoiseSchedule.create(bundle.index.base_scale)
        gpu = self.device.type == "cuda"
        if engine is None and (gpu or fast or offload is not None):
            engine = ClipEngine(bundle, torch.bfloat16 if gpu else torch.float32, fast, offload)
        self._engine = engine or None
        self._calls: dict[tuple[int, ...], int] = {}
        self._graphs: dict[tuple[int, ...], ClipGraph | None] = {}
        if self._engine is None:
            self.codec = LatentCodec(bundle.vae)
            towers = bundle.image_encoder, bundle.image_projector
            self._predict = unet_predictor(bundle.unet, torch.bfloat16 if gpu else None)
        else:
            self.codec = EngineCodec(bundle.vae, self._engine.vae)
            towers = self._engine.tower, nn.Identity()
            self._predict = engine_predictor(self._engine.unet)
        self._condition = Conditioner(self.codec, *towers, bundle.prompt, bundle.empty, bundle.index.fps)

    def graph(self, shape: Sequence[int], steps: int) -> ClipGraph | None:
        """The CUDA graph of whole clips of this shape, None without one.

        It is recorded when it is asked for a second time, where the memory suffices: a single clip is done before a graph pays.

        Args:
            shape: ``[B, T, 3, H, W]`` of the renders.
            steps: of the few-step sampler.
        """
        key = (*shape, steps)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._engine is None or self._engine.offloaded or self.device.type != "cuda" or self._calls[key] < 2:
            return None
        if key not in self._graphs:
            while len(self._graphs) >= GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            try:
                self._graphs[key] = ClipGraph(self._engine, shape, steps)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self._graphs[key] = None
        return self._graphs[key]

    def prepare(self, shape: Sequence[int]) -> None:
        """Compiles ahead what clips of this shape need, see :meth:`fvgen.inference.clip.ClipEngine.prepare`."""
        if self._engine is not None:
            self._engine.prepare(shape)

    def clip_noise(self, shape: Sequence[int], steps: int, noise: NoiseSource | None = None) -> Tensor:
        """The draws of one clip ``[S, B, C, T, h, w]``, in the order in which :meth:`few_step` takes them.

        Args:
            shape: ``[B, T, 3, H, W]`` of the renders.
            steps: S.
            noise: the source, None to begin with the seed.
        """
        b, frames, _, height, width = shape
        latent = (b, self.index.latent_channels, frames, height // self.codec.factor, width // self.codec.factor)
        source = noise or self.noise()
        return torch.stack([source(latent) for _ in range(steps)])

    def condition(self, renders: Tensor, guidance: bool = False) -> Condition:
        """The condition of render clips ``[B, T, 3, H, W]`` in [0, 1] whose first frame is the photo."""
        return self._condition(renders.to(self.device), guidance=guidance)

    def noise(self, seed: int | None = None) -> NoiseSource:
        """A noise source that begins with ``seed``, None for the sampler's own."""
        return seeded_noise(self._seed if seed is None else seed, self.device)

    def few_step(
        self, condition: Condition, steps: int = 4, noise: NoiseSource | None = None, callback: StepCallback | None = None
    ) -> Tensor:
        """Latents ``[B, C, T, h, w]`` after ``steps`` network calls; see :func:`fvgen.diffusion.few_step.few_step_sample`."""
        shape, source = condition.latents.shape, noise or self.noise()
        if self._engine is None:
            return few_step_sample(self._predict, self._schedule, condition, shape, source, steps, callback=callback)
        keys = self._engine.unet.keys(condition.context, shape[2])
        draws = torch.stack([source(shape) for _ in range(steps)])
        return self._engine.sample(Conditioned(condition.latents, keys), draws, callback)

    def ddim(
        self,
        condition: Condition,
        steps: int = 50,
        guidance_scale: float | None = None,
        noise: NoiseSource | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Latents after ``steps`` DDIM steps; None takes the model's own guidance scale."""
        index = self.index
        scale = index.guidance_scale if guidance_scale is None else guidance_scale
        return ddim_sample(
            self._predict,
            self._schedule,
            condition,
            condition.latents.shape,
            noise or self.noise(),
            steps,
            index.eta,
            scale,
            index.guidance_rescale,
            callback=callback,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` in [0, 1]."""
        return self.codec.decode(latents)

    def reconstruct(self, frames: Tensor) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` in [0, 1] through the VAE and back: the best any sampler could do."""
        return self.codec.decode(self.codec.encode(frames))


def choose_sampling(index: ModelIndex, sampler: str | None = None, steps: int | None = None) -> tuple[str, int]:
    """Sampler and steps of a clip: what is given, else what the model was made for.

    Args:
        index: of the model.
        sampler: "few_step" or "teacher"; None = the model's.
        steps: None = the model's with its own sampler, with the other one 4 ("few_step") or 50 ("teacher").

    Raises:
        UserError: an unknown sampler, or a number of steps that makes no sense.
    """
    own = _MADE_FOR.get(index.sampler)
    if own is None and sampler is None:
        raise UserError(f"the model was made for an unknown sampler {index.sampler!r}; choose {' or '.join(SAMPLERS)}")
    chosen = sampler or str(own)
    if chosen not in SAMPLERS:
        raise UserError(f"unknown sampler {chosen!r}; use {' or '.join(SAMPLERS)}")
    count = steps if steps is not None else index.steps if chosen == own else SAMPLERS[chosen]
    if not 1 <= count <= 1000:
        raise UserError(f"the number of steps must be between 1 and 1000, not {count}")
    return chosen, count
