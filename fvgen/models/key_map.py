"""Names of the reference checkpoint's weights for each of our networks.

Every function returns ``{our name: reference name}`` for one component, without the component's prefix. Shapes agree up to
trailing ones: kernels of size 1 in the reference are plain matrices here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fvgen.utils.errors import UserError

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.model.",
    "image_encoder": "embedder.model.",
    "image_projector": "image_proj_model.",
}

_NAMED = 3  # in a message
_MLP = {"linear_1": "0", "linear_2": "2"}
_ATTENTION = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
    "relative_key": "relative_position_k.embeddings_table",
    "relative_value": "relative_position_v.embeddings_table",
    "to_k_image": "to_k_ip",
    "to_v_image": "to_v_ip",
    "image_scale": "alpha",
}
_FEED_FORWARD = {"ff.proj_in": "ff.net.0.proj", "ff.proj_out": "ff.net.2"}
_NORMS = {"norm_self": "norm1", "norm_1": "norm1", "norm_cross": "norm2", "norm_2": "norm2", "norm_ff": "norm3"}
_RES_BLOCK = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "skip": "skip_connection",
}
_CLIP_BLOCK = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "linear_1": "mlp.c_fc",
    "linear_2": "mlp.c_proj",
    "to_out": "attn.out_proj",
    "to_qkv.weight": "attn.in_proj_weight",
    "to_qkv.bias": "attn.in_proj_bias",
}


def _rename(module: nn.Module, table: dict[str, str]) -> dict[str, str]:
    """Replace the longest prefix of each parameter name found in ``table``; a name with none is an error in the table."""
    names = {}
    for name in module.state_dict():
        prefix = max((p for p in table if name == p or name.startswith(p + ".")), key=len, default=None)
        if prefix is None:
            raise KeyError(f"no reference name for {name} of {type(module).__name__}")
        names[name] = table[prefix] + name[len(prefix) :]
    return names


def transformer_key_map(module: nn.Module) -> dict[str, str]:
    """Of a ``SpatialTransformer`` or ``TemporalTransformer``."""
    table = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}
    for i in range(len(module.blocks)):  # type: ignore[arg-type]
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        table |= {ours + k: theirs + v for k, v in (_FEED_FORWARD | _NORMS).items()}
        for attention, number in (("self_attn", 1), ("cross_attn", 2), ("attn_1", 1), ("attn_2", 2)):
            table |= {f"{ours}{attention}.{k}": f"{theirs}attn{number}.{v}" for k, v in _ATTENTION.items()}
    return _rename(module, table)


def temporal_conv_key_map(module: nn.Module) -> dict[str, str]:
    """Of a ``TemporalConv``. From its second stage on a dropout shifts the index of the convolution by one."""
    table: dict[str, str] = {}
    for i in range(4):
        table |= {f"norms.{i}": f"conv{i + 1}.0", f"convs.{i}": f"conv{i + 1}.{3 if i else 2}"}
    return _rename(module, table)


def res_block_key_map(module: nn.Module) -> dict[str, str]:
    """Of a ``ResBlock``. The reference spells its temporal convolution ``temopral_conv``."""
    table = dict(_RES_BLOCK)
    if module.temporal_conv is not None:
        names = temporal_conv_key_map(module.temporal_conv)  # type: ignore[arg-type]
        table |= {f"temporal_conv.{k}": f"temopral_conv.{v}" for k, v in names.items()}
    return _rename(module, table)


def _layer_modules(layer: Any) -> list[tuple[str, nn.Module]]:
    """Parts of a layer that exist, in the order in which the reference numbers them."""
    parts = [(name, getattr(layer, name)) for name in ("res", "spatial", "temporal")]
    return [(name, part) for name, part in parts if part is not None]


def unet_key_map(unet: Any) -> dict[str, str]:
    """Of a ``VideoUNet``. The reference numbers all blocks of a half in one list."""
    table = {f"time_embedding.{k}": f"time_embed.{v}" for k, v in _MLP.items()}
    table |= {f"fps_embedding.{k}": f"fps_embedding.{v}" for k, v in _MLP.items()}
    table |= {"conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}

    def add(ours: str, theirs: str, part: nn.Module) -> None:
        names = res_block_key_map(part) if ours.endswith(("res", "res_out")) else transformer_key_map(part)
        table.update({f"{ours}.{k}": f"{theirs}.{v}" for k, v in names.items()})

    if unet.temporal_in is not None:
        add("temporal_in", "init_attn.0", unet.temporal_in)
    block = 1
    for i, level in enumerate(unet.down_levels):
        for j, layer in enumerate(level.layers):
            for k, (name, part) in enumerate(_layer_modules(layer)):
                add(f"down_levels.{i}.layers.{j}.{name}", f"input_blocks.{block}.{k}", part)
            block += 1
        if level.resample is not None:
            table[f"down_levels.{i}.resample.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    mid = _layer_modules(unet.mid.layer)
    for k, (name, part) in enumerate(mid):
        add(f"mid.layer.{name}", f"middle_block.{k}", part)
    add("mid.res_out", f"middle_block.{len(mid)}", unet.mid.res_out)
    block = 0
    for i, level in enumerate(unet.up_levels):
        for j, layer in enumerate(level.layers):
            parts = _layer_modules(layer)
            for k, (name, part) in enumerate(parts):
                add(f"up_levels.{i}.layers.{j}.{name}", f"output_blocks.{block}.{k}", part)
            if level.resample is not None and j + 1 == len(level.layers):
                table[f"up_levels.{i}.resample.conv"] = f"output_blocks.{block}.{len(parts)}.conv"
            block += 1
    return _rename(unet, table)


def image_projector_key_map(projector: Any) -> dict[str, str]:
    """Of an ``ImageProjector``."""
    table = {"queries": "latents", "proj_in": "proj_in", "proj_out": "proj_out", "norm_out": "norm_out"}
    for i in range(len(projector.layers)):
        attn, ff = f"layers.{i}.0.", f"layers.{i}.1."
        table |= {f"layers.{i}.attn.{k}": attn + k for k in ("to_q", "to_kv", "to_out")}
        table |= {f"layers.{i}.attn.norm_image": attn + "norm1", f"layers.{i}.attn.norm_queries": attn + "norm2"}
        table |= {f"layers.{i}.ff.{k}": ff + v for k, v in {"norm": "0", "linear_1": "1", "linear_2": "3"}.items()}
    return _rename(projector, table)


def image_encoder_key_map(tower: Any) -> dict[str, str]:
    """Of a ``ClipVisionTower``."""
    table = {
        "patch_embedding": "visual.conv1",
        "class_embedding": "visual.class_embedding",
        "position_embedding": "visual.positional_embedding",
        "norm_in": "visual.ln_pre",
    }
    return _rename(tower, table | _clip_blocks(tower, "visual.transformer"))


def text_encoder_key_map(tower: Any) -> dict[str, str]:
    """Of a ``ClipTextTower``."""
    table = {"token_embedding": "token_embedding", "position_embedding": "positional_embedding", "norm_out": "ln_final"}
    return _rename(tower, table | _clip_blocks(tower, "transformer"))


def _clip_blocks(tower: Any, theirs: str) -> dict[str, str]:
    blocks = range(len(tower.blocks))
    return {f"blocks.{i}.{k}": f"{theirs}.resblocks.{i}.{v}" for i in blocks for k, v in _CLIP_BLOCK.items()}


def vae_key_map(vae: Any) -> dict[str, str]:
    """Of a diffusers ``AutoencoderKL``. The reference counts decoder levels from the full size, diffusers from the lowest."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    resnet = {"norm1": "norm1", "norm2": "norm2", "conv1": "conv1", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    levels = len(vae.config.block_out_channels)
    for half, ours, theirs, sampler in (("encoder", "down", "down", "downsample"), ("decoder", "up", "up", "upsample")):
        table |= {f"{half}.{k}": f"{half}.{k}" for k in ("conv_in", "conv_out")}
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        table |= {f"{half}.mid_block.attentions.0.{k}": f"{half}.mid.attn_1.{v}" for k, v in attention.items()}
        for i in range(2):
            table |= {f"{half}.mid_block.resnets.{i}.{k}": f"{half}.mid.block_{i + 1}.{v}" for k, v in resnet.items()}
        for i in range(levels):
            level = i if half == "encoder" else levels - 1 - i
            for j in range(vae.config.layers_per_block + (half == "decoder")):
                block = f"{half}.{theirs}.{level}.block.{j}."
                table |= {f"{half}.{ours}_blocks.{i}.resnets.{j}.{k}": block + v for k, v in resnet.items()}
            table[f"{half}.{ours}_blocks.{i}.{sampler}rs.0.conv"] = f"{half}.{theirs}.{level}.{sampler}.conv"
    return _rename(vae, table)


KEY_MAPS = {
    "unet": unet_key_map,
    "vae": vae_key_map,
    "text_encoder": text_encoder_key_map,
    "image_encoder": image_encoder_key_map,
    "image_projector": image_projector_key_map,
}


SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "scale_arr",
)
_POOLED = ("text_projection", "logit_scale")  # of a text tower
_TEXT_SIDE = (*_POOLED, "positional_embedding", "token_embedding.weight", "ln_final.weight", "ln_final.bias")
_POOLED_IMAGE = ("visual.ln_post.weight", "visual.ln_post.bias", "visual.proj")
_TEXT_BLOCK = re.compile(re.escape(PREFIXES["text_encoder"]) + r"transformer\.resblocks\.(\d+)\.")
_REASONS = {
    "schedule buffer: computed, and compared with the checkpoint when one is converted": SCHEDULE_BUFFERS,
    "pooled text output is not used": [PREFIXES["text_encoder"] + name for name in _POOLED],
    "image tokens are taken before the final norm and the projection": [PREFIXES["image_encoder"] + k for k in _POOLED_IMAGE],
    "text side of the image tower's CLIP model": [PREFIXES["image_encoder"] + name for name in _TEXT_SIDE],
}
_IGNORED = {name: reason for reason, names in _REASONS.items() for name in names}


def ignored_reason(key: str, text_blocks: int = 23) -> str | None:
    """Why a reference key (with its prefix) belongs to no network here, or None when it has to be used or is not known.

    Args:
        key: full name in the reference state dict.
        text_blocks: blocks of the text tower that run; later ones are not kept.
    """
    block = _TEXT_BLOCK.match(key)
    if block and int(block[1]) >= text_blocks:
        return "the penultimate layer is used, so the last text block does not run"
    return _IGNORED.get(key)


def reference_shapes(modules: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key of a reference checkpoint with its shape, those that no network here uses included.

    Args:
        modules: the four components and ``text_encoder``; meta weights do.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        state = module.state_dict()
        for ours, theirs in KEY_MAPS[name](module).items():
            shapes[PREFIXES[name] + theirs] = tuple(state[ours].shape) + (1,) * _kernel_sides(name, ours, state[ours])
    text, image = PREFIXES["text_encoder"], PREFIXES["image_encoder"]
    config, width = modules["text_encoder"].config, modules["image_encoder"].config.width
    last, size = len(modules["text_encoder"].blocks) - 1, config.width
    for key in [key for key in shapes if key.startswith(f"{text}transformer.resblocks.{last}.")]:
        for block in range(last + 1, config.layers):
            shapes[key.replace(f".{last}.", f".{block}.", 1)] = shapes[key]
    side = {
        "text_projection": (size, size),
        "logit_scale": (),
        "positional_embedding": (config.context_length, size),
        "token_embedding.weight": (config.vocab_size, size),
        "ln_final.weight": (size,),
        "ln_final.bias": (size,),
    }
    shapes |= {text + name: side[name] for name in _POOLED} | {image + name: side[name] for name in _TEXT_SIDE}
    shapes |= dict(zip((image + name for name in _POOLED_IMAGE), ((width,), (width,), (width, size)), strict=True))
    return shapes | {name: (1400,) if name == "scale_arr" else (1000,) for name in SCHEDULE_BUFFERS}


def _kernel_sides(component: str, name: str, value: Tensor) -> int:
    """Sides of 1 that the reference's kernel has where ours is a matrix, or a kernel with fewer axes."""
    if component == "vae":
        return 2 if "attentions" in name and value.ndim == 2 else 0
    if component == "unet" and name.endswith(".weight"):
        return 1 if ".temporal_conv.convs." in name or name.startswith("temporal_in.proj_") else 0
    return 0


def convert_keys(state: dict[str, Tensor], names: dict[str, str], module: nn.Module) -> dict[str, Tensor]:
    """Rename reference weights (prefix removed) for ``module``.

    Args:
        state: reference tensors of one component.
        names: ``{our name: reference name}``.
        module: tells the shapes.

    Raises:
        UserError: a weight is missing, left over, or has another shape.
    """
    ours = module.state_dict()
    check_fit(state, {theirs: tuple(ours[name].shape) for name, theirs in names.items()})
    return {name: state[theirs].reshape(ours[name].shape) for name, theirs in names.items()}


def check_fit(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes; sides of 1 at the end of a shape do not count.

    Raises:
        UserError: they differ; the message names the first few weights that are missing, not known, or of another shape.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    misshapen = [
        f"{name} has {_sides(found[name].shape)} instead of {_sides(shape)}"
        for name, shape in expected.items()
        if name in found and _without_ones(found[name].shape) != _without_ones(shape)
    ]
    kinds = {"missing": missing, "not known": unknown, "of another shape": misshapen}
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise UserError(
            f"the checkpoint does not fit this model: of its weights {'; '.join(problems)}; it may be of another version or "
            "damaged, so get the original file"
        )


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    sides = tuple(shape)
    while sides and sides[-1] == 1:
        sides = sides[:-1]
    return sides


def _sides(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def component_keys(keys: Iterable[str], component: str) -> Iterator[str]:
    """The names in ``keys`` under a component's prefix, without it, that are not ignored."""
    prefix = PREFIXES[component]
    return (k[len(prefix) :] for k in keys if k.startswith(prefix) and ignored_reason(k) is None)
