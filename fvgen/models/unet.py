"""The video UNet of ViewCrafter: a 2-D UNet per frame with temporal transformers and temporal convolutions in between.

Sources: ViewCrafter (arXiv 2409.02048), DynamiCrafter (arXiv 2310.12190), VideoCrafter1 (arXiv 2310.19512).
Shapes: B = batch, T = frames, h and w = latent size, D = context width, E = embedding width, C = channels of a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, cat, channels_last, is_grad_enabled, nn

from . import fused
from .blocks import Downsample, ResBlock, SpatialTransformer, TemporalTransformer, Upsample, zero_init
from .embeddings import EmbeddingMLP, sinusoidal_embedding


class UNetLayer(nn.Module):
    """A residual block, then attention within and between frames where the level has it. The unit of checkpointing."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, res: ResBlock, spatial: SpatialTransformer | None, temporal: TemporalTransformer | None) -> None:
        super().__init__()
        self.res, self.spatial, self.temporal = res, spatial, temporal

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, image: Tensor | None, frames: int) -> Tensor:
        if self.gradient_checkpointing and self.training and is_grad_enabled():
            return self._gradient_checkpointing_func(self._forward, x, emb, text, image, frames)
        return self._forward(x, emb, text, image, frames)

    def _forward(self, x: Tensor, emb: Tensor, text: Tensor, image: Tensor | None, frames: int) -> Tensor:
        x = self.res(x, emb, frames)
        if self.spatial is not None:
            x = self.spatial(x, text, image)
        if self.temporal is not None:
            x = self.temporal(x, frames)
        return x


class UNetLevel(nn.Module):
    """The layers at one resolution and the resampling that leaves it."""

    def __init__(self, layers: list[UNetLayer], resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resample = resample


class MidBlock(nn.Module):
    """A full layer and one more residual block, at the lowest resolution."""

    def __init__(self, layer: UNetLayer, res_out: ResBlock) -> None:
        super().__init__()
        self.layer, self.res_out = layer, res_out

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, image: Tensor | None, frames: int) -> Tensor:
        return self.res_out(self.layer(x, emb, text, image, frames), emb, frames)


class VideoUNet(ModelMixin, ConfigMixin):
    """Predicts ``v`` from noisy latents stacked on condition latents.

    Args:
        in_channels: noisy plus condition latent channels.
        out_channels: channels of the prediction.
        model_channels: channels of the first level.
        channel_mult: channels per level as multiples of ``model_channels``, highest resolution first.
        layers_per_level: residual blocks per level on the way down; one more on the way up.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which there is attention; the middle always has it.
        head_channels: width of an attention head.
        context_dim: width of the context tokens.
        temporal_length: frames the relative-position tables reach; without them any number of frames may be given.
        transformer_depth: blocks per transformer.
        dropout: in the residual blocks and temporal convolutions.
        text_tokens, image_tokens_per_frame: how a context splits (see :meth:`split_context`).
        image_cross_attention: attend to image tokens; otherwise they are ignored.
        learnable_image_scale: weigh the image branch with ``tanh(alpha) + 1``.
        fps_condition: add an embedding of the frame rate to the one of the time.
        default_fps: frame rate when ``forward`` gets none.
        initial_temporal_heads: heads of the temporal transformer after the first convolution; 0 leaves it out.
        temporal_attention, temporal_convolution: temporal transformers, temporal convolutions in residual blocks.
        relative_position, causal: variants of the temporal attention; the one after the first convolution is never causal.
        norm_groups: groups of every GroupNorm.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("UNetLayer",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: Sequence[float] = (1, 2, 4, 4),
        layers_per_level: int = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        head_channels: int = 64,
        context_dim: int = 1024,
        temporal_length: int = 16,
        transformer_depth: int = 1,
        dropout: float = 0.0,
        text_tokens: int = 77,
        image_tokens_per_frame: int = 16,
        image_cross_attention: bool = True,
        learnable_image_scale: bool = False,
        fps_condition: bool = True,
        default_fps: int = 10,
        initial_temporal_heads: int = 8,
        temporal_attention: bool = True,
        temporal_convolution: bool = True,
        relative_position: bool = False,
        causal: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        embedding_dim = 4 * model_channels
        max_distance = temporal_length if relative_position else None

        def spatial(channels: int) -> SpatialTransformer:
            heads = channels // head_channels
            return SpatialTransformer(
                channels,
                heads,
                head_channels,
                context_dim,
                transformer_depth,
                image_cross_attention,
                learnable_image_scale,
                norm_groups,
            )

        def temporal(channels: int, heads: int, causal: bool = causal) -> TemporalTransformer:
            return TemporalTransformer(channels, heads, head_channels, transformer_depth, causal, max_distance, norm_groups)

        def res(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, embedding_dim, dropout, temporal_convolution, norm_groups)

        def layer(c_in: int, c_out: int, attend: bool) -> UNetLayer:
            between = temporal(c_out, c_out // head_channels) if attend and temporal_attention else None
            return UNetLayer(res(c_in, c_out), spatial(c_out) if attend else None, between)

        self.time_embedding = EmbeddingMLP(model_channels, embedding_dim)
        self.fps_embedding = EmbeddingMLP(model_channels, embedding_dim) if fps_condition else None
        self.conv_in = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        heads = initial_temporal_heads
        self.temporal_in = temporal(model_channels, heads, causal=False) if heads else None

        widths = [round(model_channels * mult) for mult in channel_mult]
        last = len(widths) - 1
        down, skips, current = [], [model_channels], model_channels
        for level, width in enumerate(widths):
            attend = 2**level in attention_resolutions
            layers = []
            for _ in range(layers_per_level):
                layers.append(layer(current, width, attend))
                current = width
                skips.append(width)
            if level != last:
                skips.append(width)
            down.append(UNetLevel(layers, Downsample(width) if level != last else None))
        self.down_levels = nn.ModuleList(down)
        self.mid = MidBlock(layer(current, current, True), res(current, current))
        up = []
        for level in range(last, -1, -1):
            attend = 2**level in attention_resolutions
            layers = []
            for _ in range(layers_per_level + 1):
                layers.append(layer(current + skips.pop(), widths[level], attend))
                current = widths[level]
            up.append(UNetLevel(layers, Upsample(current) if level else None))
        self.up_levels = nn.ModuleList(up)
        self.norm_out = nn.GroupNorm(norm_groups, current, eps=1e-5)
        self.conv_out = zero_init(nn.Conv2d(current, out_channels, 3, padding=1))
        if self.fps_embedding is not None:
            zero_init(self.fps_embedding.linear_2)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, fps: Tensor | None = None) -> Tensor:
        """Predict ``v``.

        Args:
            x: ``[B, in_channels, T, h, w]``, noisy latents first, then condition latents; h and w divisible by 2^(levels - 1).
            timesteps: ``[B]`` diffusion times in 0 .. 999.
            context: ``[B, text_tokens + N, D]`` text tokens, then N >= 0 image tokens.
            fps: ``[B]`` frame rates, None for the default.

        Returns:
            ``[B, out_channels, T, h, w]``.
        """
        h, skips, args = self._down(x, timesteps, context, fps)
        h = self.mid(h, *args)
        for level in self.up_levels:
            for layer in level.layers:
                h = layer(cat([h, skips.pop()], dim=1), *args)
            h = h if level.resample is None else level.resample(h)
        if fused.applies(h):
            h = fused.to_image(fused.group_norm(self.norm_out, fused.to_rows(h)), h.shape[2])
        else:
            h = F.silu(self.norm_out(h))
        return self.conv_out(h).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def trunk(self, x: Tensor, timesteps: Tensor, context: Tensor, fps: Tensor | None = None) -> Tensor:
        """The features after the middle block, ``[B, C, T, h', w']``: what a discriminator head looks at."""
        h, _, args = self._down(x, timesteps, context, fps)
        return self.mid(h, *args).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def split_context(self, context: Tensor, frames: int) -> tuple[Tensor, Tensor | None]:
        """Text tokens ``[B, 77, D]`` and image tokens: ``[B * T, 16, D]``, ``[B, N, D]`` or None.

        Exactly 16 image tokens per frame are dealt out frame by frame; with any other number every frame sees all of them (a
        16-frame projector in a 25-frame network does that). Without an image branch, they are dropped.
        """
        n_text, per_frame = self.config.text_tokens, self.config.image_tokens_per_frame
        if context.shape[1] < n_text:
            raise ValueError(f"the context has {context.shape[1]} tokens; the first {n_text} must be text tokens")
        text, image = context[:, :n_text], context[:, n_text:]
        if image.shape[1] == 0 or not self.config.image_cross_attention:
            return text, None
        if image.shape[1] == per_frame * frames:
            image = image.reshape(-1, per_frame, image.shape[2])
        return text, image

    def embed(self, timesteps: Tensor, fps: Tensor | None = None) -> Tensor:
        """Embedding ``[B, E]`` of times ``[B]`` and frame rates ``[B]``."""
        dim, dtype = self.config.model_channels, self.conv_in.weight.dtype
        emb = self.time_embedding(sinusoidal_embedding(timesteps, dim).to(dtype))
        if self.fps_embedding is not None:
            if fps is None:
                fps = timesteps.new_full(timesteps.shape, self.config.default_fps)
            emb = emb + self.fps_embedding(sinusoidal_embedding(fps, dim).to(dtype))
        return emb

    def _down(self, x: Tensor, timesteps: Tensor, context: Tensor, fps: Tensor | None) -> tuple[Tensor, list[Tensor], Any]:
        b, channels, frames, height, width = x.shape
        factor = 2 ** (len(self.down_levels) - 1)
        if channels != self.config.in_channels or height % factor or width % factor:
            raise ValueError(
                f"the input must be [B, {self.config.in_channels}, T, h, w] with h and w multiples of {factor}, "
                f"got {tuple(x.shape)}"
            )
        h = self.conv_in(x.transpose(1, 2).flatten(0, 1))
        text, image = self.split_context(context.to(h.dtype), frames)  # under autocast every layer would cast it
        args = (self.embed(timesteps.expand(b), fps), text, image, frames)
        if fused.applies(h):
            h = h.contiguous(memory_format=channels_last)
        if self.temporal_in is not None:
            h = self.temporal_in(h, frames)
        skips = [h]
        for level in self.down_levels:
            for layer in level.layers:
                h = layer(h, *args)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        return h, skips, args
