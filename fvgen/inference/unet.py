"""The video UNet as an engine for inference: packed weights, channels-last rows, fused operators; no gradients.

It computes what :class:`fvgen.models.unet.VideoUNet` computes. What stays the same for a clip (keys and values of the context) or
for a model (embeddings of the sampler's time steps) is computed once, outside of :meth:`UNetEngine.__call__`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.inference.residual import Downsample, ResidualEngine, Upsample
from fvgen.inference.rows import Grid, Norm, Pending
from fvgen.inference.transformers import ContextKeys, SpatialEngine, TemporalEngine
from fvgen.kernels.image_conv import conv_from_image, conv_to_image, pack_from_image, pack_to_image
from fvgen.models.blocks import ResBlock
from fvgen.models.unet import UNetLayer, VideoUNet

Shifts = list[Tensor]
Keys = list[list[ContextKeys]]


class _Layer(NamedTuple):
    """The parts of a layer, and which of the shifts and keys are its own."""

    res: ResidualEngine
    shift: int
    spatial: SpatialEngine | None = None
    temporal: TemporalEngine | None = None
    key: int = 0


class _Given(NamedTuple):
    shifts: Shifts
    keys: Keys


class UNetEngine:
    """Predicts ``v`` like the network it is made from.

    Args:
        unet: the network; its weights are copied.
        dtype: of weights and activations; sums, statistics and the result are float32.
    """

    def __init__(self, unet: VideoUNet, dtype: torch.dtype = torch.bfloat16) -> None:
        self._unet, self.dtype = unet, dtype
        self._attending: list[SpatialEngine] = []
        self._shifts: list[tuple[Tensor, Tensor]] = []  # weight and bias of every block's embedding, float32
        self._conv_in = _FromLatents(unet.conv_in, dtype)
        self._temporal_in = None if unet.temporal_in is None else TemporalEngine(unet.temporal_in, dtype)
        self._down = [[self._layer(layer) for layer in level.layers] for level in unet.down_levels]
        self._mid = self._layer(unet.mid.layer)
        self._mid_out = _Layer(*self._residual(unet.mid.res_out))
        self._up = [[self._layer(layer) for layer in level.layers] for level in unet.up_levels]
        # by the level above the change, highest resolution first
        self._leave_down = [Downsample(level.resample.conv, dtype) for level in unet.down_levels if level.resample]
        self._leave_up = [Upsample(level.resample.conv, dtype) for level in unet.up_levels if level.resample][::-1]
        self._norm_out, self._conv_out = Norm(unet.norm_out, dtype), _ToLatents(unet.conv_out, dtype)
        self._weights = torch.cat([weight for weight, _ in self._shifts])
        self._biases = torch.cat([bias for _, bias in self._shifts])

    @property
    def most_left_out(self) -> int:
        """The largest ``left_out`` of :meth:`with_lower`: all layers on the way up of the highest resolution but the last."""
        return len(self._up[-1]) - 1

    @torch.inference_mode()
    def shifts(self, timesteps: Tensor, fps: Tensor, frames: int) -> Shifts:
        """What the time adds in every residual block, for :meth:`__call__`: ``[C]`` for one clip, else ``[B T, C]``.

        Args:
            timesteps, fps: ``[B]``.
            frames: T.
        """
        unet = self._unet
        emb = torch.nn.functional.silu(unet.embed(timesteps, fps).to(self._weights))
        rows = torch.addmm(self._biases, emb, self._weights.t()).to(self.dtype)
        rows = rows[0] if len(rows) == 1 else rows.repeat_interleave(frames, 0)
        return [part.contiguous() for part in rows.split([len(bias) for _, bias in self._shifts], dim=-1)]

    @torch.inference_mode()
    def keys(self, context: Tensor, frames: int) -> Keys:
        """Keys and values of a context ``[B, 77 + N, D]``, per spatial transformer in the order in which they run."""
        text, image = self._unet.split_context(context.to(self.dtype), frames)
        return [spatial.keys(text, image) for spatial in self._attending]

    @staticmethod
    def stack(x: Tensor, latents: Tensor) -> Tensor:
        """The network's input: noisy latents, then those of the condition, ``[B, C, T, h, w]`` each."""
        return torch.cat([x, latents.to(x.dtype)], dim=1)

    @torch.inference_mode()
    def __call__(self, x: Tensor, shifts: Shifts, keys: Keys) -> Tensor:
        """``v [B, C, T, h, w]`` float32.

        Args:
            x: ``[B, in_channels, T, h, w]`` noisy latents, then condition latents.
            shifts, keys: see there.
        """
        return self.with_lower(x, shifts, keys)[0]

    @torch.inference_mode()
    def with_lower(
        self, x: Tensor, shifts: Shifts, keys: Keys, lower: Pending | None = None, left_out: int = 0
    ) -> tuple[Tensor, Pending | None]:
        """``v`` and what the lower resolutions hand back to the highest one, None where there is only one.

        Given the latter from an earlier call, they are left out, about half of the work: from one step to the next these features
        change least (DeepCache, arXiv 2312.00858).

        Args:
            x, shifts, keys: as of :meth:`__call__`.
            lower: from an earlier call with the same ``left_out``.
            left_out: so many layers on the way up of the highest resolution, and those on the way down whose results only they
                take, belong to what is left out too.
        """
        batch, _, frames, height, width = x.shape
        grid = Grid(batch, frames, height, width)
        h = Pending(self._conv_in(x))
        if self._temporal_in is not None:
            h = self._temporal_in(h, grid)
        h, lower = self._level(0, h, _Given(shifts, keys), grid, lower, left_out)
        out, _ = self._norm_out(h, batch * frames)
        return self._conv_out(out, grid), lower

    def _level(
        self, level: int, h: Pending, given: _Given, grid: Grid, lower: Pending | None = None, left_out: int = 0
    ) -> tuple[Pending, Pending | None]:
        """A resolution on the way down, all below it, and the same resolution on the way up; the rest of it given ``lower``."""
        skips: list[Tensor] = []
        down, up = self._down[level], self._up[len(self._down) - 1 - level]
        for layer in down[: len(down) - left_out] if lower is not None else down:
            h, total = self._run(layer, h, given, grid)
            skips.append(total)
        if level == len(self._down) - 1:
            h, total = self._run(self._mid, h, given, grid)
            skips.append(total)
            h, _ = self._mid_out.res(h, given.shifts[self._mid_out.shift], grid)
        else:
            skips.append(h.total())
            if lower is None:
                below, smaller = self._leave_down[level](skips[-1], grid)
                below, _ = self._level(level + 1, below, given, smaller)
                h, _ = self._leave_up[level](below.total(), smaller)
                for layer in up[:left_out]:
                    h, _ = self._run(layer, h, given, grid, skips.pop())
                lower = h
            h, up = lower, up[left_out:]
        for layer in up:
            h, _ = self._run(layer, h, given, grid, skips.pop())
        return h, lower

    @staticmethod
    def _run(layer: _Layer, x: Pending, given: _Given, grid: Grid, skip: Tensor | None = None) -> tuple[Pending, Tensor]:
        h, total = layer.res(x, given.shifts[layer.shift], grid, skip)
        if layer.spatial is not None:
            h = layer.spatial(h, given.keys[layer.key])
        return (h if layer.temporal is None else layer.temporal(h, grid)), total

    def _layer(self, layer: UNetLayer) -> _Layer:
        key = len(self._attending)
        spatial = None if layer.spatial is None else SpatialEngine(layer.spatial, self.dtype)
        if spatial is not None:
            self._attending.append(spatial)
        temporal = None if layer.temporal is None else TemporalEngine(layer.temporal, self.dtype)
        return _Layer(*self._residual(layer.res), spatial, temporal, key)

    def _residual(self, block: ResBlock) -> tuple[ResidualEngine, int]:
        exact = torch.promote_types(self.dtype, torch.float32)
        weight, bias, conv_bias = (x.detach().to(exact) for x in (*block.embedding.parameters(), block.conv_1.bias))
        self._shifts.append((weight, bias + conv_bias))
        return ResidualEngine(block, self.dtype), len(self._shifts) - 1


class _FromLatents:
    """The first convolution."""

    def __init__(self, conv: torch.nn.Conv2d, dtype: torch.dtype) -> None:
        self.weight, self.bias = pack_from_image(conv.weight.detach().to(dtype)), conv.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, C_in, T, h, w]`` to rows ``[B T, h w, C]``."""
        return conv_from_image(x.transpose(1, 2).flatten(0, 1), self.weight, self.bias).flatten(1, 2)


class _ToLatents:
    """The last convolution."""

    def __init__(self, conv: torch.nn.Conv2d, dtype: torch.dtype) -> None:
        self.weight, self.bias = pack_to_image(conv.weight.detach().to(dtype)), conv.bias.detach()

    def __call__(self, rows: Tensor, grid: Grid) -> Tensor:
        """Rows ``[B T, h w, C]`` to ``[B, C_out, T, h, w]`` float32."""
        out = conv_to_image(rows.unflatten(1, (grid.height, grid.width)), self.weight, self.bias)
        return out.float().unflatten(0, (grid.batch, grid.frames)).transpose(1, 2)
