"""The image tower and the image projector with packed weights, from a photo to context tokens.

A single photo is bound by reading the weights and by the number of kernels, so layers run as few large ones: residual sums
inside the norm that follows, one projection for queries, keys and values, and the projector's keys and values of the image
for all its layers at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.kernels.layer_norm_residual import layer_norm_residual
from fvgen.models.clip import ClipVisionTower
from fvgen.models.clip_preprocess import clip_preprocess
from fvgen.models.image_projector import ImageProjector


def _pack(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy."""
    return values.detach().to(dtype, copy=True).contiguous()


def _row(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors of norms stay in at least float32."""
    return _pack(values, torch.promote_types(dtype, torch.float32))


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention between ``[B, Lq, D]`` and ``[B, Lk, D]``, which may be slices of a packed projection; ``[B, Lq, D]``."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Linear:
    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        self.weight = _pack(linear.weight, dtype)
        self.bias = None if linear.bias is None else _pack(linear.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Norm:
    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.eps = _row(norm.weight, dtype), _row(norm.bias, dtype), norm.eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normalised sum and the sum itself."""
        return layer_norm_residual(x, self.weight, self.bias, residual, eps=self.eps)


class _FeedForward:
    def __init__(self, norm: nn.LayerNorm, linear_1: nn.Linear, linear_2: nn.Linear, dtype: torch.dtype) -> None:
        self.norm = _Norm(norm, dtype)
        self.linear_1, self.linear_2 = _Linear(linear_1, dtype), _Linear(linear_2, dtype)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is to be added to the second result; the sum of x and the residual."""
        normal, total = self.norm(x, residual)
        return self.linear_2(F.gelu(self.linear_1(normal))), total


class _TowerBlock:
    """Eight kernels: norm, projection, attention, projection, norm, linear, GELU, linear."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        self.heads, self.norm = block.heads, _Norm(block.norm_1, dtype)
        self.to_qkv, self.to_out = _Linear(block.to_qkv, dtype), _Linear(block.to_out, dtype)
        self.feed_forward = _FeedForward(block.norm_2, block.linear_1, block.linear_2, dtype)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normal, total = self.norm(x, residual)
        attended = self.to_out(_attend(*self.to_qkv(normal).chunk(3, dim=-1), self.heads))
        return self.feed_forward(attended, total)


class _Tower:
    """``ClipVisionTower``, the patch embedding as a matrix product onto the position embedding."""

    def __init__(self, tower: ClipVisionTower, dtype: torch.dtype) -> None:
        self.image_size, self.patch = tower.config.image_size, tower.config.patch_size
        self.patch_embedding = _pack(tower.patch_embedding.weight.flatten(1).t(), dtype)
        start = tower.position_embedding.double().clone()
        start[0] += tower.class_embedding.double()
        self.start = _pack(start, dtype)
        self.norm_in = _Norm(tower.norm_in, dtype)
        self.blocks = [_TowerBlock(block, dtype) for block in tower.blocks]

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        pixels = clip_preprocess(image.float(), self.image_size).to(self.start.dtype)
        b, side = pixels.shape[0], self.image_size // self.patch
        pixels = pixels[..., : side * self.patch, : side * self.patch]
        patches = pixels.unflatten(3, (side, -1)).unflatten(2, (side, -1)).permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, -1)
        x = self.start.repeat(b, 1, 1)
        x[:, 1:].baddbmm_(patches, self.patch_embedding.expand(b, -1, -1))
        x, residual = self.norm_in(x)[0], None
        for block in self.blocks:
            x, residual = block(x, residual)
        return x, residual


class _ProjectorLayer:
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention = layer.attn
        self.heads, self.norm = attention.heads, _Norm(attention.norm_queries, dtype)
        self.to_qkv = _pack(torch.cat([attention.to_q.weight, attention.to_kv.weight]), dtype)
        self.to_out = _Linear(attention.to_out, dtype)
        self.feed_forward = _FeedForward(layer.ff.norm, layer.ff.linear_1, layer.ff.linear_2, dtype)

    def __call__(self, image_kv: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normal, total = self.norm(x, residual)
        q, own_kv = F.linear(normal, self.to_qkv).tensor_split((self.to_qkv.shape[0] // 3,), dim=-1)
        k, v = torch.cat([image_kv, own_kv], dim=1).chunk(2, dim=-1)
        return self.feed_forward(self.to_out(_attend(q, k, v, self.heads)), total)


class _Projector:
    """``ImageProjector``. The norms of the image differ between layers in weight and bias only, which go into the projections."""

    def __init__(self, projector: ImageProjector, dtype: torch.dtype) -> None:
        attentions: list[Any] = [layer.attn for layer in projector.layers]
        (self.eps,) = {attention.norm_image.eps for attention in attentions}
        weights = [attention.to_kv.weight.double() for attention in attentions]
        norms = [attention.norm_image for attention in attentions]
        self.weight = _pack(torch.cat([w * n.weight.double() for w, n in zip(weights, norms, strict=True)]), dtype)
        self.bias = _pack(torch.cat([w @ n.bias.double() for w, n in zip(weights, norms, strict=True)]), dtype)
        self.one, self.zero = _row(torch.ones_like(norms[0].weight), dtype), _row(torch.zeros_like(norms[0].bias), dtype)
        self.queries = _pack(projector.queries, dtype)
        self.proj_in, self.proj_out = _Linear(projector.proj_in, dtype), _Linear(projector.proj_out, dtype)
        self.norm_out = _Norm(projector.norm_out, dtype)
        self.layers = [_ProjectorLayer(layer, dtype) for layer in projector.layers]

    def __call__(self, tokens: Tensor) -> Tensor:
        normal, _ = layer_norm_residual(self.proj_in(tokens), self.one, self.zero, eps=self.eps)
        projected = F.linear(normal, self.weight, self.bias).chunk(len(self.layers), dim=-1)
        x, residual = self.queries.expand(tokens.shape[0], -1, -1), None
        for layer, image_kv in zip(self.layers, projected, strict=True):
            x, residual = layer(image_kv, x, residual)
        return self.norm_out(self.proj_out(x + residual))[0]


class PackedImageTower:
    """``projector(tower(photo))`` for inference: same results, weights copied, no gradients, recordable in a CUDA graph.

    Args:
        tower, projector: on the device to be used. They are left alone; later changes of their weights do not show here.
        dtype: of weights and activations; vectors of norms stay in at least float32.
    """

    @torch.no_grad()
    def __init__(self, tower: ClipVisionTower, projector: ImageProjector, dtype: torch.dtype) -> None:
        self._tower = _Tower(tower, dtype)
        self._projector = _Projector(projector, dtype)

    @torch.no_grad()
    def __call__(self, photo: Tensor) -> Tensor:
        """Context tokens ``[B, L, D]`` in the packed dtype of photos ``[B, 3, H, W]`` in [-1, 1], of any size and dtype."""
        x, residual = self._tower(photo)
        return self._projector(x if residual is None else x + residual)
