"""The networks that the teacher run trains together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fvgen.models.clip import ClipVisionTower
from fvgen.models.image_projector import ImageProjector
from fvgen.models.spec import ModelSpec
from fvgen.models.unet import VideoUNet


class Networks(nn.Module):
    """Everything that is trained: the UNet and the image branch that feeds it.

    Args:
        spec: constructor arguments of the three networks, and the frame rate.
        prompt, empty: ``[77, D]`` fixed text tokens.
    """

    def __init__(self, spec: ModelSpec, prompt: Tensor, empty: Tensor) -> None:
        super().__init__()
        self.unet = VideoUNet(**spec.unet)
        self.image_encoder = ClipVisionTower(**spec.image_encoder)
        self.image_projector = ImageProjector(**spec.image_projector)
        self.register_buffer("prompt", prompt)
        self.register_buffer("empty", empty)
        self.fps = spec.index.fps

    def forward(self, x: Tensor, t: Tensor, render: Tensor, photo: Tensor, drop: Tensor) -> Tensor:
        """Predicted v ``[B, C, T, h, w]``.

        Args:
            x, render: ``[B, C, T, h, w]`` noisy latents and latents of the renders.
            t: ``[B]`` int64.
            photo: ``[B, 3, H, W]`` in [-1, 1].
            drop: ``[B]`` uniform in [0, 1); 5 % of the clips lose the prompt, 5 % prompt and photo, 5 % the photo, for guidance.
        """
        photo = torch.where(((drop >= 0.05) & (drop < 0.15))[:, None, None, None], torch.zeros_like(photo), photo)
        text = torch.where((drop < 0.10)[:, None, None], self.empty, self.prompt)
        context = torch.cat([text, self.image_projector(self.image_encoder(photo))], 1)
        fps = torch.full((x.shape[0],), self.fps, device=x.device)
        return self.unet(torch.cat([x, render], 1).to(context.dtype), t, context, fps)
