"""Names of the reference checkpoint's weights for the network of DUSt3R."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fvgen.utils.errors import UserError

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
_FIRST_UNIT = re.compile(r"downstream_head[12]\.dpt\.scratch\.refinenet4\.resConfUnit1\.conv[12]\.(weight|bias)")


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
    if _FIRST_UNIT.fullmatch(key):
        return "the coarsest level has no path to be added to, so its first residual unit does not run"
    return None


def reference_shapes(network: Any, keys: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Every key of a reference checkpoint with its shape, second names and unused weights included.

    Args:
        network: a ``Dust3rNetwork``; meta weights do.
        keys: of the checkpoint at hand. It may have one decoder for both, one of the two names of a head's input convolutions,
            and may lack what is not used.
    """
    state, names = network.state_dict(), dust3r_key_map(network)
    shapes = {theirs: tuple(state[ours].shape) for ours, theirs in names.items()}
    shapes["mask_token"] = (1, 1, network.config["decoder_width"])
    second, wide = {}, network.config["feature_width"]
    for number in (1, 2):
        scratch = f"downstream_head{number}.dpt.scratch."
        second |= {f"{scratch}layer_rn.{i}.weight": f"{scratch}layer{i + 1}_rn.weight" for i in range(4)}
        for n in (1, 2):
            unit = f"{scratch}refinenet4.resConfUnit1.conv{n}."
            shapes |= {f"{unit}weight": (wide, wide, 3, 3), f"{unit}bias": (wide,)}
    shapes |= {alias: shapes[name] for alias, name in second.items()}
    found = set(keys)
    if not found:
        return shapes
    spare = {key for key in shapes if unused_reason(key)}
    for alias, name in second.items():
        spare |= {name} if alias in found else {alias} if name in found else set()
    if not any(key.startswith("dec_blocks2.") for key in found):
        spare |= {key for key in shapes if key.startswith("dec_blocks2.")}
    return {key: shape for key, shape in shapes.items() if key in found or key not in spare}


def check_second_names(state: dict[str, Tensor]) -> None:
    """Raises UserError where two names of a weight stand for different values."""
    for key, value in state.items():
        alias = _ALIAS.fullmatch(key)
        first = _first_name(alias) if alias else key
        if first != key and first in state and not torch.equal(state[first], value):
            raise UserError(f"the weights {first} and {key} differ and must be the same tensor; get the original file")


def _first_name(alias: re.Match[str]) -> str:
    return f"{alias[1]}layer{int(alias[2]) + 1}_rn{alias[3]}"


def standard_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The used weights under one name each.

    The input convolutions of a head are stored twice or under either of two names; a checkpoint of one decoder gives it to both.
    """
    used: dict[str, Tensor] = {}
    for key, value in state.items():
        alias = _ALIAS.fullmatch(key)
        if alias:
            key = _first_name(alias)
            if key in state:
                continue
        if unused_reason(key) is None:
            used[key] = value
    if not any(key.startswith("dec_blocks2.") for key in used):
        used |= {key.replace("dec_blocks.", "dec_blocks2.", 1): v for key, v in used.items() if key.startswith("dec_blocks.")}
    return used
