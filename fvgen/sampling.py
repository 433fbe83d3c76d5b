"""A model with its two samplers: renders in, latents and frames out."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.codec import Conditioner, LatentCodec
from fvgen.diffusion.ddim import ddim_sample
from fvgen.diffusion.few_step import few_step_sample
from fvgen.diffusion.noise import NoiseSource, seeded_noise
from fvgen.diffusion.predict import StepCallback, unet_predictor
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.models.bundle import ModelBundle
from fvgen.types import Condition


class ModelSampler:
    """Encodes, samples and decodes with one model, on the device where the model is; bfloat16 autocast on a GPU.

    Args:
        bundle: the model.
        seed: of the sampling noise; every call begins with it again unless it is given a noise source.
    """

    def __init__(self, bundle: ModelBundle, seed: int = 0) -> None:
        self.device = next(bundle.unet.parameters()).device
        self.index = bundle.index
        self.codec = LatentCodec(bundle.vae)
        self._seed = seed
        self._condition = Conditioner(
            self.codec, bundle.image_encoder, bundle.image_projector, bundle.prompt, bundle.empty, bundle.index.fps
        )
        self._schedule = NoiseSchedule.create(bundle.index.base_scale)
        self._predict = unet_predictor(bundle.unet, torch.bfloat16 if self.device.type == "cuda" else None)

    def condition(self, renders: Tensor, guidance: bool = False) -> Condition:
        """The condition of render clips ``[B, T, 3, H, W]`` in [0, 1] whose first frame is the photo."""
        return self._condition(renders.to(self.device), guidance=guidance)

    def noise(self) -> NoiseSource:
        """A noise source that begins with the seed."""
        return seeded_noise(self._seed, self.device)

    def few_step(
        self, condition: Condition, steps: int = 4, noise: NoiseSource | None = None, callback: StepCallback | None = None
    ) -> Tensor:
        """Latents ``[B, C, T, h, w]`` after ``steps`` network calls; see :func:`fvgen.diffusion.few_step.few_step_sample`."""
        shape = condition.latents.shape
        return few_step_sample(self._predict, self._schedule, condition, shape, noise or self.noise(), steps, callback=callback)

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
