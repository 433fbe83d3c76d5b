"""The classifier of real against generated clips: the frozen trunk of the teacher and a small trainable 3-D network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fvgen.models.unet import VideoUNet
from fvgen.types import Condition

Trunk = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class ClassifierConfig:
    """Size of the head. The paper says "3-D CNN" and no more; these sizes are this project's.

    Attributes:
        in_channels: channels C of the trunk's middle block: 1280 for both ViewCrafter models.
        width: channels of every convolution.
        layers: convolutions of 3 x 3 x 3. The first keeps T x h x w, each further one halves all three (rounded up).
        groups: of the GroupNorm after each convolution. Statistics are of one sample: a batch norm would mix real and generated
            clips, and r would depend on the rest of the batch.
    """

    in_channels: int = 1280
    width: int = 256
    layers: int = 3
    groups: int = 32

    def __post_init__(self) -> None:
        if self.layers < 1 or self.width % self.groups:
            raise ValueError(f"the head needs at least one layer and a width divisible by {self.groups}, got {self}")


class ClassifierHead(nn.Module):
    """Logit of a clip from the trunk's features; at the optimum of the logistic loss ``exp(logit) = p_real / p_fake`` (eq. 7).

    There is one logit per sample, from pooled features: a mean over logits of patches trained one by one would be no log ratio of
    clip densities. The time enters through the features, which the trunk made with its own time embedding. The last layer starts
    at zero, so r = 1 until the first update.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        stages: list[nn.Module] = []
        for i in range(config.layers):
            conv = nn.Conv3d(config.width if i else config.in_channels, config.width, 3, stride=2 if i else 1, padding=1)
            stages += [conv, nn.GroupNorm(config.groups, config.width), nn.SiLU()]
        self.body = nn.Sequential(*stages)
        self.out = nn.Linear(config.width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, T, h, w]`` of any float dtype to logits ``[B]`` in at least float32."""
        h = self.body(features.to(self.out.weight.dtype)).mean((2, 3, 4))
        logits = self.out(h)[:, 0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def unet_trunk(unet: VideoUNet, autocast: torch.dtype | None = None) -> Trunk:
    """``trunk(x, t, condition)``: features ``[B, C, T, h', w']`` after the middle block.

    The parameters should be frozen, but nothing here stops the gradient with respect to ``x``: it is all that the student gets
    from the adversarial loss.

    Args:
        unet: the teacher.
        autocast: run it under autocast of this dtype.
    """

    def trunk(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(unet.parameters()).dtype
        stacked = torch.cat([x, condition.latents.to(x.dtype)], dim=1).to(dtype)
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            return unet.trunk(stacked, t, condition.context.to(dtype), condition.fps)

    return trunk
