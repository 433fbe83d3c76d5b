"""Reads a DUSt3R checkpoint file: its weights, and the sizes that it states as the text of a constructor call."""

from __future__ import annotations

import ast
import math
import os
import re
from typing import Any

import torch
from torch import Tensor

from fvgen.models.key_map import check_fit, convert_keys
from fvgen.models.weights_file import read_weights
from fvgen.utils.errors import UserError

from .key_map import check_second_names, dust3r_key_map, reference_shapes, standard_state
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
_LARGEST, _DEEPEST = 2**16, 256  # of any size, and of a number of layers
_ROPE = re.compile(r"RoPE[1-9]\d{0,8}", re.ASCII)
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
    return sides if sides and all(_is_size(side) for side in sides) else ()


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def _is_ratio(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 < value <= _LARGEST


def _fits(name: str, value: Any) -> bool:
    if name == "mlp_ratio":
        return _is_ratio(value)
    return _is_size(value) and (value <= _DEEPEST or not name.endswith("depth"))


def network_arguments(constructor: Any) -> dict[str, Any]:
    """Arguments of ``Dust3rNetwork`` for the constructor call in a checkpoint's ``args.model``, which is read, not run.

    Raises:
        UserError: the text is no call of the DUSt3R model, or asks for a variant that is not implemented.
    """
    try:
        if not isinstance(constructor, str):
            raise TypeError
        call = ast.parse(constructor.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func).split(".")[-1] != _CLASS or call.args:
            raise ValueError("not a call of the model with keyword arguments")
        given = {str(k.arg): _literal(k.value) for k in call.keywords}
    except (SyntaxError, TypeError, ValueError, AttributeError, RecursionError, MemoryError):
        said = str(constructor)[:80]
        raise UserError(f"the checkpoint describes its model as {said!r}; only {_CLASS}(...) is supported") from None
    ours: dict[str, Any] = {}
    for name, value in given.items():
        if name in _SIZES and _fits(name, value):
            ours[_SIZES[name]] = value
        elif name == "img_size" and _sides(value):
            ours["image_size"] = max(_sides(value))
        elif name == "pos_embed" and _ROPE.fullmatch(str(value)):
            ours["rope_base"] = float(value[4:])
        elif name not in _WITHOUT_EFFECT and value not in _FIXED.get(name, ()):
            raise UserError(f"the DUSt3R model argument {name}={value!r} is not supported; use a 512 checkpoint with a DPT head")
    return ours


def read_dust3r_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    """``(weights under reference names, constructor call)`` of a checkpoint, the former mapped into memory.

    A file with nothing but weights has no call (None).

    Raises:
        UserError: the file is missing, is no checkpoint, or holds objects that could run code.
    """
    file = read_weights(path, "dust3r")
    return file.tensors, getattr(file.rest.get("args"), "model", None)


def convert_dust3r(state: dict[str, Tensor], dtype: torch.dtype | None = torch.float32, **arguments: Any) -> Dust3rNetwork:
    """A network with the weights of a reference state dict.

    Args:
        state: under reference names.
        dtype: of the weights; None keeps the tensors as they are, of which one may then be two weights.
        arguments: of ``Dust3rNetwork``.

    Raises:
        UserError: a weight is missing, unknown, or has another shape; or there is no network with these arguments.
    """
    try:
        with torch.device("meta"):
            network = Dust3rNetwork(**arguments)
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        sizes = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise UserError(f"the checkpoint describes a network that cannot be built ({sizes}); get the original file") from error
    check_fit(state, reference_shapes(network, state))
    check_second_names(state)
    weights = convert_keys(standard_state(state), dust3r_key_map(network), network)
    if dtype is not None:  # where one decoder stands for both, each gets weights of its own
        one = not any(key.startswith("dec_blocks2.") for key in state)
        weights = {k: v.to(dtype, copy=one and k.startswith("decoder_2.")) for k, v in weights.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def load_dust3r(path: str | os.PathLike[str], **arguments: Any) -> Dust3rNetwork:
    """The network of a checkpoint file. Sizes come from ``arguments``, then from the file, then from the 512 model with DPT head.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    state, constructor = read_dust3r_checkpoint(path)
    stated = network_arguments(constructor) if constructor is not None else {}
    return convert_dust3r(state, **(stated | arguments))
