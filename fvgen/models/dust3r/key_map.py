"""Names of the reference checkpoint's weights for the network of DUSt3R."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_ENCODER = {
    "norm_self": "norm1",
    "self_attn.to_qkv": "attn.qkv",
    "self_attn.to_out": "attn.proj",
    "norm_mlp": "norm2",
    "mlp.linear_1": "mlp.fc1",
    "mlp.linear_2": "mlp.fc2",
}
_DECODER = _ENCODER | {
    "norm_cross": "norm2",
    "norm_other": "norm_y",
    "cross_attn.to_q": "cross_attn.projq",
    "cross_attn.to_k": "cross_attn.projk",
    "cross_attn.to_v": "cross_attn.projv",
    "cross_attn.to_out": "cross_attn.proj",
    "norm_mlp": "norm3",
}
_STEM = {
    "patch_embedding": "patch_embed.proj",
    "encoder_norm": "enc_norm",
    "decoder_embedding": "decoder_embed",
    "decoder_norm": "dec_norm",
}
_UNIT = {"conv_1": "conv1", "conv_2": "conv2"}
_ALIAS = re.compile(r"(downstream_head[12]\.dpt\.scratch\.)layer_rn\.(\d)(\..+)")


def dust3r_key_map(network: Any) -> dict[str, str]:
    """``{our name: reference name}`` of every weight of a ``Dust3rNetwork``."""
    table = dict(_STEM)
    for ours, theirs, blocks, names in (
        ("encoder", "enc_blocks", network.encoder, _ENCODER),
        ("decoder_1", "dec_blocks", network.decoder_1, _DECODER),
        ("decoder_2", "dec_blocks2", network.decoder_2, _DECODER),
    ):
        table |= {f"{ours}.{i}.{k}": f"{theirs}.{i}.{v}" for i in range(len(blocks)) for k, v in names.items()}
    for number in (1, 2):
        table |= {f"head_{number}.{k}": f"downstream_head{number}.dpt.{v}" for k, v in _head().items()}
    owners = {name: name.rpartition(".")[0] for name in network.state_dict()}
    return {name: table[owner] + name.removeprefix(owner) for name, owner in owners.items()}


def _head() -> dict[str, str]:
    table = {f"conv_{i + 1}": f"head.{2 * i}" for i in range(3)}
    for i in range(4):
        table |= {f"projections.{i}": f"act_postprocess.{i}.0", f"resamplers.{i}": f"act_postprocess.{i}.1"}
        table |= {f"levels.{i}": f"scratch.layer{i + 1}_rn"}
        ours, theirs = f"fusions.{i}.", f"scratch.refinenet{i + 1}."
        table[f"{ours}conv_out"] = f"{theirs}out_conv"
        for unit, number in (("unit_level", 1), ("unit_out", 2)):
            table |= {f"{ours}{unit}.{k}": f"{theirs}resConfUnit{number}.{v}" for k, v in _UNIT.items()}
    return table


def unused_reason(key: str) -> str | None:
    """Why a reference key belongs to no weight of the network, or None when it has to be used."""
    if key == "mask_token":
        return "the mask token belongs to the pretraining of the encoder"
    if re.fullmatch(r"downstream_head[12]\.dpt\.scratch\.refinenet4\.resConfUnit1\..+", key):
        return "the coarsest level has no path to be added to, so its first residual unit does not run"
    return None


def standard_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The used weights under one name each.

    The input convolutions of a head are stored twice or under either of two names; a checkpoint of one decoder gives it to both.
    """
    used: dict[str, Tensor] = {}
    for key, value in state.items():
        alias = _ALIAS.fullmatch(key)
        if alias:
            key = f"{alias[1]}layer{int(alias[2]) + 1}_rn{alias[3]}"
            if key in state:
                continue
        if unused_reason(key) is None:
            used[key] = value
    if not any(key.startswith("dec_blocks2.") for key in used):
        used |= {key.replace("dec_blocks.", "dec_blocks2.", 1): v for key, v in used.items() if key.startswith("dec_blocks.")}
    return used
