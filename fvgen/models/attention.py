"""Attention layers of the video UNet, and the transformer blocks made of them.

Shapes: N = rows of a batch (frames or pixels), S = sequence, C = width, M = rows of a context with N a multiple of M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.kernels.cross_attention import cross_attention
from fvgen.kernels.geglu import geglu
from fvgen.kernels.temporal_attention import temporal_attention

from .fused import layer_norm, packed_linear

# CUDA grids hold at most 65535 blocks along the batch axis; temporal attention has one row per pixel and can exceed that.
_MAX_ROWS = 65535


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Scaled dot-product attention on ``[N, S, heads * d]`` queries and ``[N, L, heads * d]`` keys and values."""
    if q.shape[0] > _MAX_ROWS:
        parts = zip(q.split(_MAX_ROWS), k.split(_MAX_ROWS), v.split(_MAX_ROWS), strict=True)
        return torch.cat([multi_head_attention(*part, heads, causal) for part in parts])
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention ``[N, S, dim]``; no bias in q, k, v, one in the output.

    Args:
        dim: input and output width.
        heads, head_dim: inner width is their product.
        causal: a position sees itself and earlier ones only.
        max_distance: when set, relative-position tables (Shaw et al. 2018) of ``2 * max_distance + 1`` rows are added to keys
            and values; larger distances use the outermost row.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, causal: bool = False, max_distance: int | None = None) -> None:
        super().__init__()
        self.heads, self.causal, self.max_distance = heads, causal, max_distance
        inner = heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        if max_distance is not None:
            self.relative_key = nn.Parameter(torch.empty(2 * max_distance + 1, head_dim))
            self.relative_value = nn.Parameter(torch.empty(2 * max_distance + 1, head_dim))
            nn.init.xavier_uniform_(self.relative_key)
            nn.init.xavier_uniform_(self.relative_value)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.max_distance is None:
            return self.to_out(multi_head_attention(q, k, v, self.heads, self.causal))
        return self.to_out(self._relative_attention(q, k, v, self.max_distance))

    def over_pixels(self, x: Tensor) -> Tensor:
        """:meth:`forward` with one product for queries, keys and values; without positions and mask."""
        q, k, v = (y.transpose(1, 2) for y in self._packed(x).unbind(2))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def over_frames(self, x: Tensor, frames: int) -> Tensor:
        """:meth:`forward` along the frames of ``x [B * frames, R, dim]``, for every pixel."""
        tables = {}
        if self.max_distance is not None:
            tables = {"relative_key": self.relative_key.to(x.dtype), "relative_value": self.relative_value.to(x.dtype)}
        qkv = self._packed(x).unflatten(0, (-1, frames))  # [B, T, R, 3, heads, d]
        return self.to_out(temporal_attention(qkv, causal=self.causal, **tables).flatten(3).flatten(0, 1))

    def _packed(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.to_q, self.to_k, self.to_v).unflatten(2, (3, self.heads, -1))

    def _relative_attention(self, q: Tensor, k: Tensor, v: Tensor, max_distance: int) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))  # [N, S, heads, d]
        position = torch.arange(q.shape[1], device=q.device)
        distance = position[None, :] - position[:, None]  # key - query
        index = distance.clamp(-max_distance, max_distance) + max_distance
        logits = torch.einsum("nshd,nlhd->nhsl", q, k) + torch.einsum("nshd,sld->nhsl", q, self.relative_key[index])
        logits = logits * q.shape[-1] ** -0.5
        if self.causal:
            logits = logits.masked_fill(distance > 0, float("-inf"))
        weights = logits.softmax(dim=-1)
        out = torch.einsum("nhsl,nlhd->nshd", weights, v) + torch.einsum("nhsl,sld->nshd", weights, self.relative_value[index])
        return out.flatten(2)


class CrossAttention(nn.Module):
    """Attention to text tokens plus, separately, to image tokens; the two results are summed before the output projection.

    Each branch has keys, values and a softmax of its own and shares the queries (IP-Adapter, Ye et al. 2023).

    Args:
        dim, heads, head_dim: as in :class:`SelfAttention`.
        context_dim: width of the text and image tokens.
        image_branch: whether image tokens are used at all.
        learnable_image_scale: weighs the image branch with ``tanh(alpha) + 1`` instead of 1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        context_dim: int,
        image_branch: bool = True,
        learnable_image_scale: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.image_branch = heads, image_branch
        inner = heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        if image_branch:
            self.to_k_image = nn.Linear(context_dim, inner, bias=False)
            self.to_v_image = nn.Linear(context_dim, inner, bias=False)
        self.image_scale = nn.Parameter(torch.zeros(())) if image_branch and learnable_image_scale else None

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """``x [N, S, dim]``, ``text [M, 77, D]``, ``image [M', L, D]`` or None; N is a multiple of M and of M'."""
        q = self.to_q(x)
        out = self._attend(q, self.to_k(text), self.to_v(text))
        if self.image_branch and image is not None:
            seen = self._attend(q, self.to_k_image(image), self.to_v_image(image))
            out = out + (seen if self.image_scale is None else (self.image_scale.tanh() + 1) * seen)
        return self.to_out(out)

    def fused(self, x: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """:meth:`forward` with both softmaxes in one kernel."""
        q, shape = self.to_q(x).unflatten(2, (self.heads, -1)), (2, self.heads, -1)
        seen = None
        if self.image_branch and image is not None:
            seen = packed_linear(image, self.to_k_image, self.to_v_image).unflatten(2, shape).to(q.dtype)
            if self.image_scale is not None:  # the output is linear in the values
                key, value = seen.unbind(2)
                seen = torch.stack([key, (self.image_scale.tanh() + 1).to(q.dtype) * value], 2)
        context = packed_linear(text, self.to_k, self.to_v).unflatten(2, shape).to(q.dtype)
        return self.to_out(cross_attention(q, context, seen).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Rows that share a context are laid end to end as one longer query sequence: no copy of keys and values per frame.
        folded = q.reshape(k.shape[0], -1, q.shape[2])
        return multi_head_attention(folded, k, v, self.heads).view_as(q)


class GEGLUFeedForward(nn.Module):
    """``W2 (u * gelu(g)) + b2`` with ``[u, g] = W1 x + b1`` (Shazeer 2020), exact GELU."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * mult * dim)
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(self.dropout(value * F.gelu(gate)))

    def fused(self, x: Tensor) -> Tensor:
        """:meth:`forward` with the activation in one pass each way."""
        return self.proj_out(self.dropout(geglu(self.proj_in(x))))


class SpatialBlock(nn.Module):
    """Pre-norm block over the pixels of a frame: self-attention, cross-attention, feed-forward."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int, image_branch: bool, learnable_scale: bool) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, heads, head_dim)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, heads, head_dim, context_dim, image_branch, learnable_scale)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff = GEGLUFeedForward(dim)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.norm_self(x))
        x = x + self.cross_attn(self.norm_cross(x), text, image)
        return x + self.ff(self.norm_ff(x))

    def fused(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """:meth:`forward` with the sums inside the norms."""
        h, _ = layer_norm(self.norm_self, x)
        h, x = layer_norm(self.norm_cross, self.self_attn.over_pixels(h), x)
        h, x = layer_norm(self.norm_ff, self.cross_attn.fused(h, text, image), x)
        return x + self.ff.fused(h)


class TemporalBlock(nn.Module):
    """Pre-norm block over the frames of a pixel: two self-attentions (none sees the context), feed-forward."""

    def __init__(self, dim: int, heads: int, head_dim: int, causal: bool = False, max_distance: int | None = None) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.attn_1 = SelfAttention(dim, heads, head_dim, causal, max_distance)
        self.norm_2 = nn.LayerNorm(dim)
        self.attn_2 = SelfAttention(dim, heads, head_dim, causal, max_distance)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff = GEGLUFeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_1(self.norm_1(x))
        x = x + self.attn_2(self.norm_2(x))
        return x + self.ff(self.norm_ff(x))

    def fused(self, x: Tensor, frames: int) -> Tensor:
        """:meth:`forward` for ``[B * frames, R, dim]``: the rows stay where they are."""
        h, _ = layer_norm(self.norm_1, x)
        h, x = layer_norm(self.norm_2, self.attn_1.over_frames(h, frames), x)
        h, x = layer_norm(self.norm_ff, self.attn_2.over_frames(h, frames), x)
        return x + self.ff.fused(h)
