"""The two CLIP towers (OpenCLIP ViT-H/14 at full size): image tokens and text tokens.

Source: Radford et al. 2021 (arXiv 2103.00020); Cherti et al. 2022 (arXiv 2212.07143). Both use exact GELU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .clip_preprocess import clip_preprocess


class ClipBlock(nn.Module):
    """Pre-norm transformer block with one fused projection for q, k and v."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(mlp_ratio * width)
        self.norm_1 = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = self.to_qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))
        return x + self.linear_2(F.gelu(self.linear_1(self.norm_2(x))))


class ClipVisionTower(ModelMixin, ConfigMixin):
    """Image to tokens: the class token and every patch token after the last block, without final norm or projection.

    Args:
        image_size: side of the square the image is squashed to.
        patch_size: side of a patch; there are ``(image_size // patch_size)^2`` of them.
        width, layers, heads, mlp_ratio: transformer size.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        width: int = 1280,
        layers: int = 32,
        heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.position_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ClipBlock(width, heads, mlp_ratio) for _ in range(layers))

    def forward(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [-1, 1], any size, to ``[B, 1 + patches, width]``."""
        pixels = clip_preprocess(image.float(), self.config.image_size).to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.norm_in(torch.cat([first, patches], dim=1) + self.position_embedding)
        for block in self.blocks:
            x = block(x)
        return x


class ClipTextTower(ModelMixin, ConfigMixin):
    """Token ids to text tokens: all but the last block (the penultimate layer), then the final LayerNorm on every token.

    Args:
        vocab_size, context_length: table size and fixed number of tokens.
        width, layers, heads, mlp_ratio: transformer size; ``layers`` counts the skipped last block, whose weights are not kept.
        skip_last: blocks left out at the end: 1 = penultimate, 0 = all of them run.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 49408,
        context_length: int = 77,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        skip_last: int = 1,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.blocks = nn.ModuleList(ClipBlock(width, heads, mlp_ratio) for _ in range(layers - skip_last))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """``[B, context_length]`` int64 to ``[B, context_length, width]``."""
        x = self.token_embedding(token_ids) + self.position_embedding
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm_out(x)
