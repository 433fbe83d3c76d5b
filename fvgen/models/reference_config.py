"""Constructor arguments of the reference implementation, translated into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fvgen.utils.errors import UserError

_UNET = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "layers_per_level",
    "attention_resolutions": "attention_resolutions",
    "num_head_channels": "head_channels",
    "context_dim": "context_dim",
    "temporal_length": "temporal_length",
    "transformer_depth": "transformer_depth",
    "dropout": "dropout",
    "image_cross_attention": "image_cross_attention",
    "image_cross_attention_scale_learnable": "learnable_image_scale",
    "fs_condition": "fps_condition",
    "default_fs": "default_fps",
    "temporal_attention": "temporal_attention",
    "temporal_conv": "temporal_convolution",
    "use_relative_position": "relative_position",
    "use_causal_attention": "causal",
}
# What the reference assumes when an argument is absent and our default differs.
_UNET_ABSENT = {"image_cross_attention": False, "fps_condition": False, "temporal_convolution": False, "relative_position": True}
# Arguments without effect here: kernels of size 1 are always matrices, checkpointing is switched on a built model.
_UNET_WITHOUT_EFFECT = {"use_linear", "use_checkpoint", "use_fp16", "dims"}
_UNET_FIXED = {"temporal_selfatt_only": True, "tempspatial_aware": False, "use_scale_shift_norm": False, "resblock_updown": False}


def unet_arguments(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``VideoUNet`` for a reference configuration.

    Raises:
        UserError: an argument is unknown, or asks for a variant that is not implemented.
    """
    ours: dict[str, Any] = dict(_UNET_ABSENT)
    for name, value in reference.items():
        if name in _UNET:
            ours[_UNET[name]] = value
        elif name == "addition_attention":
            ours["initial_temporal_heads"] = 8 if value else 0
        elif name in _UNET_FIXED:
            if value != _UNET_FIXED[name]:
                raise UserError(f"the UNet argument {name}={value!r} is not supported; only {_UNET_FIXED[name]!r} is")
        elif name not in _UNET_WITHOUT_EFFECT:
            raise UserError(f"the UNet argument {name} is not known; remove it or use a ViewCrafter configuration")
    ours.setdefault("initial_temporal_heads", 0)
    return ours


def vae_arguments(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``make_vae`` for a reference ``ddconfig``.

    Raises:
        UserError: attention at a resolution other than the lowest, which is not implemented.
    """
    if reference.get("attn_resolutions"):
        raise UserError("a VAE with attention outside its middle block is not supported; use attn_resolutions = []")
    return {
        "block_out_channels": tuple(reference["ch"] * m for m in reference["ch_mult"]),
        "layers_per_block": reference["num_res_blocks"],
        "latent_channels": reference["z_channels"],
    }


def image_projector_arguments(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``ImageProjector`` for a reference resampler configuration."""
    names = {"dim_head": "head_dim", "embedding_dim": "input_dim", "video_length": "frames"}
    return {names.get(k, k): v for k, v in reference.items()}


def image_encoder_arguments(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``ClipVisionTower`` for an OpenCLIP ``vision_cfg``."""
    names = ("image_size", "patch_size", "width", "layers", "mlp_ratio")
    return {k: reference[k] for k in names if k in reference} | {"heads": reference["width"] // reference.get("head_width", 64)}


def text_encoder_arguments(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``ClipTextTower`` for an OpenCLIP ``text_cfg``."""
    return {k: reference[k] for k in ("vocab_size", "context_length", "width", "layers", "heads", "mlp_ratio") if k in reference}
