"""A model as evaluation uses it: renders in, frames out, with either sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.codec import Conditioner, LatentCodec
from fvgen.diffusion.ddim import ddim_sample
from fvgen.diffusion.few_step import few_step_sample
from fvgen.diffusion.noise import seeded_noise
from fvgen.diffusion.predict import unet_predictor
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.models.bundle import ModelBundle
from fvgen.types import Condition


class ModelSampler:
    """Encodes, samples and decodes with one model, on the device where the model is.

    Args:
        bundle: the model.
        seed: of the sampling noise; every call begins with it again.
    """

    def __init__(self, bundle: ModelBundle, seed: int = 0) -> None:
        self.device = next(bundle.unet.parameters()).device
        self.index = bundle.index
        self._seed = seed
        self._codec = LatentCodec(bundle.vae)
        self._condition = Conditioner(
            self._codec, bundle.image_encoder, bundle.image_projector, bundle.prompt, bundle.empty, bundle.index.fps
        )
        self._schedule = NoiseSchedule.create(bundle.index.base_scale)
        self._predict = unet_predictor(bundle.unet, torch.bfloat16 if self.device.type == "cuda" else None)

    def condition(self, renders: Tensor, guidance: bool = False) -> Condition:
        """The condition of render clips ``[B, T, 3, H, W]`` in [0, 1] whose first frame is the photo."""
        return self._condition(renders, guidance=guidance)

    def few_step(self, condition: Condition, steps: int = 4) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` in [0, 1] after ``steps`` network calls."""
        noise = seeded_noise(self._seed, self.device)
        latents = few_step_sample(self._predict, self._schedule, condition, condition.latents.shape, noise, steps)
        return self._codec.decode(latents)

    def ddim(self, condition: Condition, steps: int, guidance_scale: float | None = None) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` in [0, 1] after ``steps`` DDIM steps; None takes the model's own guidance scale."""
        index = self.index
        scale = index.guidance_scale if guidance_scale is None else guidance_scale
        latents = ddim_sample(
            self._predict,
            self._schedule,
            condition,
            condition.latents.shape,
            seeded_noise(self._seed, self.device),
            steps,
            index.eta,
            scale,
            index.guidance_rescale,
        )
        return self._codec.decode(latents)

    def reconstruct(self, frames: Tensor) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` in [0, 1] through the VAE and back: the best any sampler could do."""
        return self._codec.decode(self._codec.encode(frames))
