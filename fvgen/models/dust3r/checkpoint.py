"""Reads a DUSt3R checkpoint file: its weights, and the sizes that it states as the text of a constructor call."""

from __future__ import annotations

import argparse
import ast
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.models.key_map import convert_keys
from fvgen.utils.errors import UserError

from .key_map import dust3r_key_map, standard_state
from .network import Dust3rNetwork

_SIZES = {
    "patch_size": "patch_size",
    "enc_embed_dim": "encoder_width",
    "enc_depth": "encoder_layers",
    "enc_num_heads": "encoder_heads",
    "dec_embed_dim": "decoder_width",
    "dec_depth": "decoder_layers",
    "dec_num_heads": "decoder_heads",
    "mlp_ratio": "mlp_ratio",
}
_CLASS = "AsymmetricCroCo3DStereo"
_INF = float("inf")
_FIXED: dict[str, tuple[Any, ...]] = {
    "head_type": ("dpt",),
    "output_mode": ("pts3d",),
    "depth_mode": (("exp", -_INF, _INF),),
    "conf_mode": (("exp", 1, _INF),),
    "patch_embed_cls": ("PatchEmbedDust3R", "ManyAR_PatchEmbed"),
    "norm_im2_in_dec": (True,),
    "qkv_bias": (True,),
}
# Without effect on inference: orientation is an argument of the call, nothing is trained here.
_WITHOUT_EFFECT = {"landscape_only", "freeze"}


def _literal(node: ast.expr) -> Any:
    """Value of a constant expression in which the bare name ``inf`` is allowed."""
    if isinstance(node, ast.Name) and node.id == "inf":
        return _INF
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_literal(node.operand)
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(item) for item in node.elts)
    return ast.literal_eval(node)


def _sides(value: Any) -> tuple[int, ...]:
    """The sides of a stated image size, none if it is something else."""
    sides = value if isinstance(value, tuple) else (value,)
    return sides if sides and all(isinstance(side, int) and side > 0 for side in sides) else ()


def network_arguments(constructor: str) -> dict[str, Any]:
    """Arguments of ``Dust3rNetwork`` for the constructor call in a checkpoint's ``args.model``, which is read, not run.

    Raises:
        UserError: the text is no call of the DUSt3R model, or asks for a variant that is not implemented.
    """
    try:
        call = ast.parse(constructor.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func).split(".")[-1] != _CLASS or call.args:
            raise ValueError("not a call of the model with keyword arguments")
        given = {str(k.arg): _literal(k.value) for k in call.keywords}
    except (SyntaxError, TypeError, ValueError):
        raise UserError(f"the checkpoint describes its model as {constructor[:80]!r}; only {_CLASS}(...) is supported") from None
    ours: dict[str, Any] = {}
    for name, value in given.items():
        if name in _SIZES:
            ours[_SIZES[name]] = value
        elif name == "img_size" and _sides(value):
            ours["image_size"] = max(_sides(value))
        elif name == "pos_embed" and str(value).startswith("RoPE") and str(value)[4:].isdigit():
            ours["rope_base"] = float(value[4:])
        elif name not in _WITHOUT_EFFECT and value not in _FIXED.get(name, ()):
            raise UserError(f"the DUSt3R model argument {name}={value!r} is not supported; use a 512 checkpoint with a DPT head")
    return ours


def read_dust3r_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None]:
    """``(weights under reference names, constructor call)`` of a checkpoint; safetensors files have no call (None).

    Raises:
        UserError: the file is missing, is no checkpoint, or holds objects that could run code.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no DUSt3R checkpoint {file}; check the path")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file), None
        except SafetensorError as error:
            raise UserError(f"{file} is not a readable safetensors file ({error}); get the checkpoint again") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        objects = isinstance(error, pickle.UnpicklingError)
        reason = "it is no PyTorch file or holds other objects" if objects else str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as plain weights ({reason}); save its weights as safetensors") from None
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{file} holds no model weights; give the checkpoint file of DUSt3R")
    return state, getattr(content.get("args"), "model", None)


def convert_dust3r(state: dict[str, Tensor], **arguments: Any) -> Dust3rNetwork:
    """A network in float32 with the weights of a reference state dict; ``arguments`` of ``Dust3rNetwork``.

    Raises:
        UserError: a weight is missing, unknown, or has another shape.
    """
    with torch.device("meta"):
        network = Dust3rNetwork(**arguments)
    weights = convert_keys(standard_state(state), dust3r_key_map(network), network)
    # a copy: one decoder's weights may stand for both
    network.load_state_dict({k: v.float().clone() for k, v in weights.items()}, strict=True, assign=True)
    return network.eval()


def load_dust3r(path: str | os.PathLike[str], **arguments: Any) -> Dust3rNetwork:
    """The network of a checkpoint file. Sizes come from ``arguments``, then from the file, then from the 512 model with DPT head.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    state, constructor = read_dust3r_checkpoint(path)
    stated = network_arguments(constructor) if constructor else {}
    return convert_dust3r(state, **(stated | arguments))
