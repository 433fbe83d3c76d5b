"""Frames to latents and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fvgen.utils.errors import UserError

NoiseSource = Callable[[Sequence[int]], Tensor]


def posterior(moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """A sample of the VAE's posterior, or its mode.

    Args:
        moments: ``[N, 2 C, h, w]`` mean and log-variance; the latter is clamped to [-30, 20].
        noise: ``[N, C, h, w]`` standard normal, None for the mode.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return mean if noise is None else mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise


class LatentCodec:
    """A VAE applied frame by frame.

    Args:
        vae: diffusers ``AutoencoderKL``.
        chunk: frames per call of the network, which bounds memory; the result does not depend on it.
        scaling_factor: latents are multiplied by it; None takes ``vae.config.scaling_factor``.
    """

    def __init__(self, vae: Any, chunk: int = 8, scaling_factor: float | None = None) -> None:
        self.vae = vae
        self.chunk = chunk
        self.scaling_factor = float(vae.config.scaling_factor if scaling_factor is None else scaling_factor)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels = int(vae.config.latent_channels)

    @torch.no_grad()
    def encode(self, rgb: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """Scaled latents ``[B, C, T, h, w]`` float32 of frames ``[B, T, 3, H, W]`` (or ``[T, 3, H, W]``, B = 1) in [0, 1].

        Args:
            rgb: H and W must be multiples of the reduction factor.
            noise: draws the posterior's noise, one ``[1, C, h, w]`` per frame in order; None takes the mode.

        Raises:
            UserError: a size the VAE cannot reduce.
        """
        clips = rgb[None] if rgb.ndim == 4 else rgb
        b, frames, _, height, width = clips.shape
        if height % self.factor or width % self.factor:
            raise UserError(f"frames of {height} x {width} pixels cannot be encoded; make both a multiple of {self.factor}")
        pixels = (2 * clips - 1).flatten(0, 1)
        latents = []
        for part in pixels.split(self.chunk):
            moments = self._moments(part)
            drawn = None
            if noise is not None:
                shape = (1, self.latent_channels, *moments.shape[2:])
                drawn = torch.cat([noise(shape) for _ in range(part.shape[0])]).to(moments)
            latents.append(posterior(moments, drawn) * self.scaling_factor)
        return torch.cat(latents).unflatten(0, (b, frames)).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` float32 of scaled latents ``[B, C, T, h, w]``; in [0, 1] when ``clamp`` is set."""
        b, _, frames, _, _ = latents.shape
        flat = (latents / self.scaling_factor).transpose(1, 2).flatten(0, 1)
        pixels = torch.cat([self._pixels(part) for part in flat.split(self.chunk)])
        rgb = ((pixels + 1) / 2).unflatten(0, (b, frames))
        return rgb.clamp(0, 1) if clamp else rgb

    @property
    def _parameter(self) -> Tensor:
        return next(self.vae.parameters())

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self._parameter.dtype)).sample.float()

    def _moments(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels.to(self._parameter)).latent_dist.parameters.float()
