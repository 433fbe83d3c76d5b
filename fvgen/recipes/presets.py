"""Model presets: the teacher's two configurations and a small one with the same architecture."""

from __future__ import annotations

from collections.abc import Callable

from fvgen.models.spec import ModelIndex, ModelSpec
from fvgen.utils.errors import UserError


def viewcrafter_512() -> ModelSpec:
    """ViewCrafter at 320 x 512 pixels, 16 frames. Every network has its full size, which is the constructors' default."""
    return ModelSpec(ModelIndex("viewcrafter_512", height=320, width=512, frames=16, base_scale=0.7))


def viewcrafter_1024() -> ModelSpec:
    """ViewCrafter at 576 x 1024 pixels, 25 frames. Same weights' shapes; the projector still makes 16 x 16 tokens."""
    return ModelSpec(ModelIndex("viewcrafter_1024", height=576, width=1024, frames=25, base_scale=0.3))


def tiny() -> ModelSpec:
    """160 x 256 pixels (or 256 x 160), 16 frames, 5.8 million parameters in all: 11.6 MB in half precision."""
    return ModelSpec(
        ModelIndex("tiny", height=160, width=256, frames=16, latent_channels=8, base_scale=0.7, portrait=True, compositor="norm"),
        unet={
            "in_channels": 16,
            "out_channels": 8,
            "model_channels": 64,
            "channel_mult": (1, 1, 1),
            "layers_per_level": 1,
            "attention_resolutions": (1, 2, 4),
            "head_channels": 32,
            "context_dim": 64,
            "temporal_length": 16,
            "initial_temporal_heads": 2,
        },
        vae={
            "block_out_channels": (32, 64, 64, 64),
            "layers_per_block": 1,
            "latent_channels": 8,
            "norm_num_groups": 16,
            "scaling_factor": 1.0,
        },
        image_encoder={"patch_size": 32, "width": 64, "layers": 2, "heads": 2},
        image_projector={"input_dim": 64, "output_dim": 64, "dim": 64, "depth": 2, "heads": 2, "head_dim": 32, "ff_mult": 2},
        text_encoder={"vocab_size": 49408, "width": 64, "layers": 2, "heads": 2},
    )


PRESETS: dict[str, Callable[[], ModelSpec]] = {f.__name__: f for f in (tiny, viewcrafter_512, viewcrafter_1024)}


def get_preset(name: str) -> ModelSpec:
    """The preset of that name.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
