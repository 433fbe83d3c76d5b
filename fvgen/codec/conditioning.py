"""From renders and prompt embeddings to what the network is conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fvgen.types import Condition

from .latents import LatentCodec, NoiseSource


@dataclass(frozen=True)
class Conditioner:
    """Builds a :class:`Condition`.

    Attributes:
        codec: encodes the render clip.
        image_encoder: ``[B, 3, H, W]`` in [-1, 1] to image tokens ``[B, L, W]``.
        image_projector: image tokens to context tokens ``[B, N, D]``.
        prompt: ``[77, D]`` text tokens of the fixed prompt.
        empty: ``[77, D]`` text tokens of the empty prompt.
        fps: frame rate handed to the network, the same for every clip.
    """

    codec: LatentCodec
    image_encoder: Callable[[Tensor], Tensor]
    image_projector: Callable[[Tensor], Tensor]
    prompt: Tensor
    empty: Tensor
    fps: int = 10

    @torch.no_grad()
    def __call__(
        self,
        rgb: Tensor,
        noise: NoiseSource | None = None,
        photo: Tensor | None = None,
        guidance: bool = False,
    ) -> Condition:
        """Condition for a render clip.

        Args:
            rgb: ``[T, 3, H, W]`` or ``[B, T, 3, H, W]`` renders in [0, 1], the first frame being the photo itself.
            noise: draws the VAE posterior's noise; None takes the mode.
            photo: ``[3, H, W]`` or ``[B, 3, H, W]`` in [0, 1] for the image tokens; None takes the first frame.
            guidance: also build the unconditional context.

        Returns:
            Latents of every frame (none is masked or repeated), context = text tokens then image tokens, and for guidance the
            context of the empty prompt and a mid-grey image. The latents have no unconditional counterpart.
        """
        clips = rgb[None] if rgb.ndim == 4 else rgb
        if photo is None:
            photo = clips[:, 0]
        image = 2 * (photo[None] if photo.ndim == 3 else photo) - 1
        latents = self.codec.encode(clips, noise)
        context = self.context(self.prompt, image)
        # Zero is mid-grey because the range is [-1, 1]; the image tokens themselves are not zero.
        uncond = self.context(self.empty, torch.zeros_like(image[:1])).expand_as(context) if guidance else None
        fps = torch.full((clips.shape[0],), self.fps, dtype=torch.int64, device=latents.device)
        return Condition(latents, context, uncond, fps)

    def context(self, text: Tensor, image: Tensor) -> Tensor:
        """``[B, 77 + N, D]`` from text tokens ``[77, D]`` and images ``[B, 3, H, W]`` in [-1, 1]."""
        tokens = self.image_projector(self.image_encoder(image))
        return torch.cat([text.to(tokens).expand(tokens.shape[0], -1, -1), tokens], dim=1)
