"""Spatial and temporal transformers on rows, with packed projections."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.inference.rows import Grid, Linear, Norm, Pending
from fvgen.kernels.cross_attention import cross_attention
from fvgen.kernels.layer_norm_residual import layer_norm_residual
from fvgen.kernels.linear_geglu import linear_geglu
from fvgen.kernels.temporal_attention import temporal_attention
from fvgen.models.attention import CrossAttention, GEGLUFeedForward, SelfAttention, SpatialBlock, TemporalBlock
from fvgen.models.blocks import SpatialTransformer, TemporalTransformer


class ContextKeys(NamedTuple):
    """Keys and values of a context for one cross-attention.

    Attributes:
        text: ``[B, 77, 2, heads, d]``.
        image: ``[B T, 16, 2, heads, d]``, ``[B, L, 2, heads, d]`` or None.
    """

    text: Tensor
    image: Tensor | None


class _LayerNorm:
    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.eps = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype), norm.eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return layer_norm_residual(x, self.weight, self.bias, residual, eps=self.eps)


class _SelfAttention:
    """Queries, keys and values in one product; over the pixels of a frame or over the frames at a pixel."""

    def __init__(self, attention: SelfAttention, dtype: torch.dtype) -> None:
        self.heads, self.causal = attention.heads, attention.causal
        self.qkv = Linear.pack(dtype, attention.to_q, attention.to_k, attention.to_v)
        self.out = Linear.pack(dtype, attention.to_out)
        self.tables: dict[str, Tensor] = {}
        if attention.max_distance is not None:
            tables = {"relative_key": attention.relative_key, "relative_value": attention.relative_value}
            self.tables = {name: table.detach().to(dtype) for name, table in tables.items()}

    def over_pixels(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self._project(x).unbind(2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def over_frames(self, x: Tensor, frames: int) -> Tensor:
        qkv = self._project(x).unflatten(0, (-1, frames))
        return self.out(temporal_attention(qkv, causal=self.causal, **self.tables).flatten(3).flatten(0, 1))

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(2, (3, self.heads, -1))  # [N, R, 3, heads, d]


class _CrossAttention:
    def __init__(self, attention: CrossAttention, dtype: torch.dtype) -> None:
        self.heads = attention.heads
        self.q, self.out = Linear.pack(dtype, attention.to_q), Linear.pack(dtype, attention.to_out)
        self.text = Linear.pack(dtype, attention.to_k, attention.to_v)
        self.image: Linear | None = None
        if attention.image_branch:
            self.image = Linear.pack(dtype, attention.to_k_image, attention.to_v_image)
            if attention.image_scale is not None:  # the output is linear in the values
                values = self.image.weight[self.image.weight.shape[0] // 2 :]
                values.mul_(attention.image_scale.detach().tanh() + 1)

    def keys(self, text: Tensor, image: Tensor | None) -> ContextKeys:
        shape = (2, self.heads, -1)
        seen = None if image is None or self.image is None else self.image(image).unflatten(2, shape)
        return ContextKeys(self.text(text).unflatten(2, shape), seen)

    def __call__(self, x: Tensor, context: ContextKeys) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1))
        return self.out(cross_attention(q, context.text, context.image).flatten(2))


class _FeedForward:
    def __init__(self, ff: GEGLUFeedForward, dtype: torch.dtype) -> None:
        self.proj_in, self.proj_out = Linear.pack(dtype, ff.proj_in), Linear.pack(dtype, ff.proj_out)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """``total`` plus the layer's output without its bias, in place."""
        return self.proj_out.add_to(total, linear_geglu(x, self.proj_in.weight, self.proj_in.bias))


class _Ends:
    """What both transformers begin and end with."""

    def __init__(self, transformer: SpatialTransformer | TemporalTransformer, dtype: torch.dtype) -> None:
        self.norm = Norm(transformer.norm, dtype, silu=False)
        self.proj_in = Linear.pack(dtype, transformer.proj_in)
        weight, bias, last = transformer.proj_out.weight, transformer.proj_out.bias, transformer.blocks[-1].ff.proj_out.bias
        self.proj_out = Linear(weight, bias + weight @ last, dtype)  # the feed-forward's bias passes through the last projection

    def finish(self, h: Tensor, x: Tensor) -> Pending:
        return Pending(self.proj_out(h), x)


class SpatialEngine:
    """:class:`fvgen.models.blocks.SpatialTransformer` on rows."""

    def __init__(self, transformer: SpatialTransformer, dtype: torch.dtype) -> None:
        self._ends = _Ends(transformer, dtype)
        self.blocks = [_SpatialBlock(block, dtype) for block in transformer.blocks]

    def keys(self, text: Tensor, image: Tensor | None) -> list[ContextKeys]:
        """Keys and values per block of text ``[B, 77, D]`` and image tokens as :meth:`VideoUNet.split_context` deals them."""
        return [block.cross_attn.keys(text, image) for block in self.blocks]

    def __call__(self, x: Pending, context: list[ContextKeys]) -> Pending:
        h, total = self._ends.norm(x, x.x.shape[0])
        h = self._ends.proj_in(h)
        for i, (block, keys) in enumerate(zip(self.blocks, context, strict=True)):
            h = block(h if i == 0 else h.add_(self.blocks[i - 1].ff.proj_out.bias), keys)
        return self._ends.finish(h, total)


class TemporalEngine:
    """:class:`fvgen.models.blocks.TemporalTransformer` on rows, which stay where they are: no transposition."""

    def __init__(self, transformer: TemporalTransformer, dtype: torch.dtype) -> None:
        self._ends = _Ends(transformer, dtype)
        self.blocks = [_TemporalBlock(block, dtype) for block in transformer.blocks]

    def __call__(self, x: Pending, grid: Grid) -> Pending:
        h, total = self._ends.norm(x, grid.batch)
        h = self._ends.proj_in(h)
        for i, block in enumerate(self.blocks):
            h = block(h if i == 0 else h.add_(self.blocks[i - 1].ff.proj_out.bias), grid.frames)
        return self._ends.finish(h, total)


class _SpatialBlock:
    def __init__(self, block: SpatialBlock, dtype: torch.dtype) -> None:
        self.norms = [_LayerNorm(norm, dtype) for norm in (block.norm_self, block.norm_cross, block.norm_ff)]
        self.self_attn, self.cross_attn = _SelfAttention(block.self_attn, dtype), _CrossAttention(block.cross_attn, dtype)
        self.ff = _FeedForward(block.ff, dtype)

    def __call__(self, x: Tensor, context: ContextKeys) -> Tensor:
        h, _ = self.norms[0](x)
        h, x = self.norms[1](self.self_attn.over_pixels(h), x)
        h, x = self.norms[2](self.cross_attn(h, context), x)
        return self.ff.add_to(x, h)


class _TemporalBlock:
    def __init__(self, block: TemporalBlock, dtype: torch.dtype) -> None:
        self.norms = [_LayerNorm(norm, dtype) for norm in (block.norm_1, block.norm_2, block.norm_ff)]
        self.attn_1, self.attn_2 = _SelfAttention(block.attn_1, dtype), _SelfAttention(block.attn_2, dtype)
        self.ff = _FeedForward(block.ff, dtype)

    def __call__(self, x: Tensor, frames: int) -> Tensor:
        h, _ = self.norms[0](x)
        h, x = self.norms[1](self.attn_1.over_frames(h, frames), x)
        h, x = self.norms[2](self.attn_2.over_frames(h, frames), x)
        return self.ff.add_to(x, h)
