"""Image projector: learned queries that turn image-tower tokens into context tokens (a Perceiver resampler)."""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, cat, nn, randn


class ProjectorAttention(nn.Module):
    """Queries attend to image tokens and to themselves, each side normalised on its own. No biases."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm_image = nn.LayerNorm(dim)
        self.norm_queries = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, image: Tensor, queries: Tensor) -> Tensor:
        image, queries = self.norm_image(image), self.norm_queries(queries)
        k, v = self.to_kv(cat([image, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(queries), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ProjectorFeedForward(nn.Module):
    """LayerNorm, Linear, exact GELU, Linear; no biases in the linear layers."""

    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear_1 = nn.Linear(dim, mult * dim, bias=False)
        self.linear_2 = nn.Linear(mult * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.norm(x))))


class ProjectorLayer(nn.Module):
    """The queries attend to the image and to themselves; then a feed-forward layer. Both are residual."""

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.attn = ProjectorAttention(dim, heads, head_dim)
        self.ff = ProjectorFeedForward(dim, ff_mult)

    def forward(self, image: Tensor, queries: Tensor) -> Tensor:
        queries = queries + self.attn(image, queries)
        return queries + self.ff(queries)


class ImageProjector(ModelMixin, ConfigMixin):
    """Image tokens ``[B, L, input_dim]`` to context tokens ``[B, num_queries * frames, output_dim]``, grouped by frame.

    Sources: Flamingo (arXiv 2204.14198) and IP-Adapter (arXiv 2308.06721), with queries per frame as in DynamiCrafter.

    Args:
        input_dim: width of the image tower.
        output_dim: width of the UNet's context.
        dim, depth, heads, head_dim, ff_mult: width, layers and heads inside.
        num_queries: context tokens per frame.
        frames: frames the queries are made for; None makes one set for the whole clip.
    """

    @register_to_config
    def __init__(
        self,
        input_dim: int = 1280,
        output_dim: int = 1024,
        dim: int = 1024,
        depth: int = 4,
        heads: int = 12,
        head_dim: int = 64,
        ff_mult: int = 4,
        num_queries: int = 16,
        frames: int | None = 16,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(randn(1, num_queries * (frames or 1), dim) * dim**-0.5)
        self.proj_in = nn.Linear(input_dim, dim)
        self.layers = nn.ModuleList(ProjectorLayer(dim, heads, head_dim, ff_mult) for _ in range(depth))
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)

    def forward(self, image_tokens: Tensor) -> Tensor:
        image = self.proj_in(image_tokens)
        queries = self.queries.expand(image.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(image, queries)
        return self.norm_out(self.proj_out(queries))
