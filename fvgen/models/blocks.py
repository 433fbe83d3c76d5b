"""Building blocks of the video UNet. Activations are ``[B * T, C, H, W]``, frame index fastest, between blocks."""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.kernels.temporal_conv import pack, temporal_conv

from . import fused
from .attention import SpatialBlock, TemporalBlock

Module = TypeVar("Module", bound=nn.Module)


def zero_init(module: Module) -> Module:
    """Set every parameter to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class SpatialTransformer(nn.Module):
    """Attention over the pixels of each frame, with cross-attention to text and image tokens; residual.

    GroupNorm (eps 1e-6) is taken per frame. The inner width is ``heads * head_dim``.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        context_dim: int,
        depth: int = 1,
        image_branch: bool = True,
        learnable_image_scale: bool = False,
        groups: int = 32,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.blocks = nn.ModuleList(
            SpatialBlock(inner, heads, head_dim, context_dim, image_branch, learnable_image_scale) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(inner, channels))

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """``x [N, C, H, W]``; ``text [M, 77, D]`` and ``image [M', L, D]`` with N a multiple of M and M'."""
        if fused.applies(x):
            rows = fused.to_rows(x)
            h = self.proj_in(fused.group_norm(self.norm, rows, silu=False))
            for block in self.blocks:
                h = block.fused(h, text, image)
            return fused.to_image(rows + self.proj_out(h), x.shape[2])
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            h = block(h, text, image)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class TemporalTransformer(nn.Module):
    """Attention over the frames at each pixel; residual. GroupNorm (eps 1e-6) statistics span frames and pixels.

    Args:
        channels: input and output channels; the inner width ``heads * head_dim`` may differ.
        causal: both self-attentions look at the past only.
        max_distance: relative-position tables up to this many frames, None for none.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        depth: int = 1,
        causal: bool = False,
        max_distance: int | None = None,
        groups: int = 32,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.blocks = nn.ModuleList(TemporalBlock(inner, heads, head_dim, causal, max_distance) for _ in range(depth))
        self.proj_out = zero_init(nn.Linear(inner, channels))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """``x [B * frames, C, H, W]``."""
        if fused.applies(x):
            rows = fused.to_rows(x)
            clips = rows.unflatten(0, (-1, frames)).flatten(1, 2)  # [B, T H W, C]
            h = self.proj_in(fused.group_norm(self.norm, clips, silu=False).view(rows.shape))
            for block in self.blocks:
                h = block.fused(h, frames)
            return fused.to_image(rows + self.proj_out(h), x.shape[2])
        clip = x.unflatten(0, (-1, frames))  # [B, T, C, H, W]
        b, _, _, height, width = clip.shape
        h = self.norm(clip.transpose(1, 2)).permute(0, 3, 4, 2, 1).flatten(0, 2)  # [B*H*W, T, C]
        h = self.proj_in(h)
        for block in self.blocks:
            h = block(h)
        h = self.proj_out(h).unflatten(0, (b, height, width))
        return (clip + h.permute(0, 3, 4, 1, 2)).flatten(0, 1)


class TemporalConv(nn.Module):
    """Four stages of GroupNorm, SiLU and a convolution over three frames, with one residual around all of them.

    The convolution has the extent (3, 1, 1) in (t, h, w); it is run as a 2-D one over (t, h * w).
    """

    def __init__(self, channels: int, dropout: float = 0.0, groups: int = 32) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels, eps=1e-5) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        zero_init(self.convs[-1])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """``x [B * frames, C, H, W]``."""
        clip = x.unflatten(0, (-1, frames)).flatten(3)  # [B, T, C, H*W]
        h = clip.transpose(1, 2)
        for stage, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            h = F.silu(norm(h))
            h = conv(self.dropout(h) if stage else h)
        return (clip + h.transpose(1, 2)).reshape(x.shape)

    def fused(self, rows: Tensor, residual: Tensor, bias: Tensor, frames: int) -> Tensor:
        """The same for ``rows + residual + bias``: ``[B * frames, R, C]`` twice, and ``[C]``."""
        clips = rows.unflatten(0, (-1, frames))  # [B, T, R, C]
        h, total = fused.group_norm_sum(self.norms[0], clips.flatten(1, 2), residual.view(clips.flatten(1, 2).shape), bias)
        for stage, conv in enumerate(self.convs):
            weight, added, last = pack(conv.weight.to(h.dtype)), conv.bias.to(h.dtype), stage == len(self.convs) - 1
            h = (self.dropout(h) if stage else h).view(clips.shape)
            h = temporal_conv(h, weight, added, residual=total.view(clips.shape) if last else None)
            h = h if last else fused.group_norm(self.norms[stage + 1], h.flatten(1, 2))
        return h.view(rows.shape)


class ResBlock(nn.Module):
    """Residual block with the time embedding added between its two convolutions, then an optional temporal convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        dropout: float = 0.0,
        temporal_conv: bool = True,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, out_channels)
        self.norm_2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.temporal_conv = TemporalConv(out_channels, dropout, groups) if temporal_conv else None

    def forward(self, x: Tensor, emb: Tensor, frames: int | None = None) -> Tensor:
        """``x [N, C, H, W]``; ``emb [M, E]``, each row for N / M successive rows of x; no temporal part if frames is None."""
        if fused.applies(x):
            return self._fused(x, emb, frames)
        h = self.conv_1(F.silu(self.norm_1(x)))
        shift = self.embedding(F.silu(emb)).repeat_interleave(x.shape[0] // emb.shape[0], dim=0)
        h = self.norm_2(h + shift[:, :, None, None])
        h = self.skip(x) + self.conv_2(self.dropout(F.silu(h)))
        if self.temporal_conv is not None and frames is not None:
            h = self.temporal_conv(h, frames)
        return h

    def _fused(self, x: Tensor, emb: Tensor, frames: int | None) -> Tensor:
        rows, height = fused.to_rows(x), x.shape[2]
        h = fused.convolution(fused.group_norm(self.norm_1, rows), height, self.conv_1)
        shift = self.embedding(F.silu(emb)).to(h.dtype) + self.conv_1.bias.to(h.dtype)
        shift = shift.repeat_interleave(x.shape[0] // emb.shape[0], dim=0)
        h = self.dropout(fused.group_norm(self.norm_2, h, emb=shift))
        h = fused.convolution(h, height, self.conv_2)
        if not isinstance(self.skip, nn.Identity):
            rows = F.linear(rows, self.skip.weight.flatten(1), self.skip.bias)
        if self.temporal_conv is None or frames is None:
            return fused.to_image(h + rows + self.conv_2.bias.to(h.dtype), height)
        return fused.to_image(self.temporal_conv.fused(h, rows, self.conv_2.bias, frames), height)


class Downsample(nn.Module):
    """3x3 convolution with stride 2 and symmetric padding 1: H to ceil(H / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
