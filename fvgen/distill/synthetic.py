"""Endless training clips of the synthetic world, rendered and encoded while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fvgen.data.synthetic import synthetic_pairs
from fvgen.distill.networks import Batch
from fvgen.models.bundle import ModelBundle
from fvgen.types import Condition
from fvgen.utils.hash_random import HashRandom

FIRST_WORLD = 5 << 40  # beyond those of the teacher's own training and of the held-out clips
_STREAM = 11


@dataclass(frozen=True)
class Reuse:
    """How often an encoded clip is used.

    A window of ``window`` clips moves on by one clip every ``times`` samples; each sample is drawn from the window as it is
    then. So a clip is used ``times`` times on average, and memory holds ``window`` clips.

    Attributes:
        window: clips to draw from, per orientation; times: uses of each.
        block: clips that are made together, always the same ones, so that a clip does not depend on what was asked for.
        portrait_share: share of updates with height and width exchanged, where the model knows that.
    """

    window: int = 1024
    times: int = 16
    block: int = 8
    portrait_share: float = 0.25


class SyntheticSource:
    """Clips of the worlds from ``FIRST_WORLD`` on, as latents of the model's VAE and tokens of its image branch.

    Args:
        bundle: the model, on the device that does the work; its networks are only used, never changed.
        update: clips per update, which share one orientation.
        reuse: how often a clip is used.
        seed: of the worlds.
        compile: see :func:`fvgen.data.synthetic.synthetic_pairs`.
    """

    count = None

    def __init__(
        self, bundle: ModelBundle, update: int, reuse: Reuse | None = None, seed: int = 0, compile: bool = False
    ) -> None:
        self._bundle, self._update, self._reuse, self._compile = bundle, update, reuse or Reuse(), compile
        self._sizes = bundle.index.sizes()
        self._first = FIRST_WORLD + (seed % 2**16 << 32)
        self._device = bundle.prompt.device
        self._seed = seed % 2**16 << 40
        self._blocks: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        image = torch.zeros(1, 3, *self._sizes[0], device=self._device)
        self._uncond = torch.cat([bundle.empty[None], self._tokens(image)], 1).float()

    def read(self, indices: Sequence[int]) -> Batch:
        """Clips whose indices belong to one update, or to updates of one orientation."""
        worlds, portrait = zip(*(self._world(i) for i in indices), strict=True)
        if len(set(portrait)) > 1:
            raise ValueError("samples of one batch must have one orientation; read those of one update")
        lowest = min(i // self._reuse.times for i in indices) // self._reuse.block
        for key in [k for k in self._blocks if k[1] < lowest]:
            del self._blocks[key]
        parts = [[x[world % self._reuse.block] for x in self._block(portrait[0], world // self._reuse.block)] for world in worlds]
        clean, render, tokens = (torch.stack(x).float() for x in zip(*parts, strict=True))
        size = len(indices)
        context = torch.cat([self._bundle.prompt.float().expand(size, -1, -1), tokens], 1)
        fps = torch.full((size,), self._bundle.index.fps, dtype=torch.int64, device=self._device)
        return Batch(clean, Condition(render, context, self._uncond.expand(size, -1, -1).contiguous(), fps))

    def _world(self, index: int) -> tuple[int, int]:
        """Number of a sample's world and its orientation, 0 or 1."""
        pick = HashRandom(torch.tensor([index ^ self._seed]), _STREAM).integers(self._reuse.window, 1)
        turn = HashRandom(torch.tensor([index // self._update]), _STREAM + 1).uniform(1)
        portrait = len(self._sizes) > 1 and float(turn) < self._reuse.portrait_share
        return index // self._reuse.times + int(pick), int(portrait)

    def _block(self, portrait: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Target and render latents and image tokens of a block of worlds, half precision; made when first asked for."""
        key = (portrait, number)
        if key not in self._blocks:
            size, index = self._reuse.block, self._bundle.index
            seeds = self._first + portrait * (1 << 31) + number * size + torch.arange(size, device=self._device)
            clips = synthetic_pairs(seeds, self._sizes[portrait], index.frames, self._compile, index.compositor)
            photos = 2 * clips.target[:, 0] - 1
            made = (encode(self._bundle.vae, clips.target), encode(self._bundle.vae, clips.render), self._tokens(photos))
            self._blocks[key] = tuple(x.half() for x in made)  # type: ignore[assignment]
        return self._blocks[key]

    @torch.no_grad()
    def _tokens(self, photos: Tensor) -> Tensor:
        """Image tokens ``[B, N, D]`` of photos ``[B, 3, H, W]`` in [-1, 1]."""
        return self._bundle.image_projector(self._bundle.image_encoder(photos))


@torch.no_grad()
def encode(vae: nn.Module, clips: Tensor) -> Tensor:
    """``[B, T, 3, H, W]`` in [0, 1] to scaled latents ``[B, C, T, h, w]``: the posterior's mode."""
    frames = (2 * clips.flatten(0, 1) - 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
        latents = torch.cat([vae.encode(f).latent_dist.mean for f in frames.split(64)]).float()
    return (latents * vae.config.scaling_factor).unflatten(0, clips.shape[:2]).transpose(1, 2)
