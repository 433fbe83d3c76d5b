"""The image VAE: diffusers' ``AutoencoderKL`` in the shape of the latent-diffusion one (arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def make_vae(
    block_out_channels: Sequence[int] = (128, 256, 512, 512),
    layers_per_block: int = 2,
    latent_channels: int = 4,
    norm_num_groups: int = 32,
    scaling_factor: float = 0.18215,
) -> AutoencoderKL:
    """A VAE with random weights that reduces each axis by ``2 ** (len(block_out_channels) - 1)``.

    Args:
        block_out_channels: channels per level, full resolution first.
        layers_per_block: residual blocks per encoder level; the decoder has one more.
        latent_channels: channels of the latent.
        norm_num_groups: groups of every GroupNorm.
        scaling_factor: latents are multiplied by it after encoding.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        scaling_factor=scaling_factor,
    )
