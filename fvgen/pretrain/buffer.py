"""The newest synthetic clips as latents, for a training loop to draw from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fvgen.data.synthetic import synthetic_pairs
from fvgen.pretrain.common import to_bytes


class PairBuffer:
    """Clips of one orientation, refilled a few at a time; the oldest make room.

    Args:
        vae: encodes the clips, on ``device``.
        size: (H, W); frames: T; capacity: clips kept.
        pairs: clips per refill.
        compositor: how the points of the renders are blended.
        compile: see :func:`fvgen.data.synthetic.synthetic_pairs`.
    """

    def __init__(
        self,
        vae: nn.Module,
        size: tuple[int, int],
        frames: int,
        capacity: int,
        pairs: int,
        device: str,
        compositor: str = "norm",
        compile: bool = False,
    ) -> None:
        self.size, self.frames, self.pairs = size, frames, pairs
        self._vae, self._compositor, self._compile = vae, compositor, compile
        shape = (capacity, vae.config.latent_channels, frames, size[0] // 8, size[1] // 8)
        self.target = torch.empty(shape, dtype=torch.float16, device=device)
        self.render = torch.empty(shape, dtype=torch.float16, device=device)
        self.photo = torch.empty(capacity, 3, *size, dtype=torch.uint8, device=device)
        self.filled = 0
        self._refills: deque[int] = deque(maxlen=-(-capacity // pairs) + 1)

    def add(self, first_world: int) -> None:
        """Makes and stores the worlds ``first_world .. first_world + pairs - 1``."""
        seeds = torch.arange(first_world, first_world + self.pairs, device=self.photo.device)
        clips = synthetic_pairs(seeds, self.size, self.frames, self._compile, self._compositor)
        at = torch.arange(self.filled, self.filled + self.pairs, device=seeds.device) % len(self.photo)
        self.target[at] = self._encode(clips.target).half()
        self.render[at] = self._encode(clips.render).half()
        self.photo[at] = to_bytes(clips.target[:, 0])
        self.filled += self.pairs
        self._refills.append(first_world)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random clips: target and render latents ``[B, C, T, h, w]`` and the first photo ``[B, 3, H, W]`` in [-1, 1]."""
        available = min(self.filled, len(self.photo))
        pick = torch.randint(available, (count,), device=self.photo.device, generator=generator)
        return self.target[pick].float(), self.render[pick].float(), self.photo[pick].float() / 127.5 - 1

    def history(self) -> list[int]:
        """What it takes to make the content again: the number of clips ever added, then the first worlds of the last refills."""
        return [self.filled, *self._refills]

    def restore(self, history: Sequence[int]) -> None:
        """Makes again what a buffer with that :meth:`history` held."""
        filled, *refills = history
        self.filled = filled - self.pairs * len(refills)
        for first_world in refills:
            self.add(first_world)

    def _encode(self, clips: Tensor) -> Tensor:
        """``[B, T, 3, H, W]`` in [0, 1] to scaled latents ``[B, C, T, h, w]``."""
        frames = (2 * clips.flatten(0, 1) - 1).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
            latents = torch.cat([self._vae.encode(f).latent_dist.mean for f in frames.split(64)])
        return (latents * self._vae.config.scaling_factor).unflatten(0, clips.shape[:2]).transpose(1, 2)
