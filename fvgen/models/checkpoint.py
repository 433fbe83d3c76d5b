"""Reads a ViewCrafter checkpoint file and turns it into a model bundle."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fvgen.utils.errors import UserError

from .bundle import ModelBundle, build_component
from .key_map import KEY_MAPS, PREFIXES, check_fit, convert_keys, reference_shapes
from .prompts import embed
from .spec import COMPONENTS, ModelSpec
from .tokenizer import PROMPT, tokenize
from .weights_file import read_weights

_DEEPSPEED_PREFIX = len("_forward_module.")


def read_reference_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a checkpoint file under today's reference names, mapped into memory.

    Understood are the reference's two kinds of files by its own rules. In a file with a ``state_dict``, and in one of nothing but
    weights, the older name ``framestride_embed`` is the frame-rate embedding. In a DeepSpeed file with a ``module`` the first 16
    characters of every name are cut off, whatever they are.

    Raises:
        UserError: the file is missing, damaged, or holds none of these.
    """
    file = read_weights(path, "viewcrafter")
    if file.holder == "module":
        names = {key: key[_DEEPSPEED_PREFIX:] for key in file.tensors}
    else:
        names = {key: key.replace("framestride_embed", "fps_embedding") for key in file.tensors}
    if len(set(names.values())) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names.values() if name in seen or seen.add(name))
        raise UserError(f"{path} has two weights for {twice!r}; get the original file")
    return {names[key]: value for key, value in file.tensors.items()}


def convert_reference(state: dict[str, Tensor], spec: ModelSpec, keep_text_tower: bool = False) -> ModelBundle:
    """A bundle with the weights of a reference state dict, as they are there. Prompt embeddings come from its text tower.

    Args:
        state: under today's reference names.
        spec: sizes of the networks.
        keep_text_tower: whether the bundle has it, too, for other prompts.

    Raises:
        UserError: a weight is missing, unknown, or has a shape that ``spec`` does not expect.
    """
    from .clip import ClipTextTower

    with torch.device("meta"):
        tower: Any = ClipTextTower(**spec.text_encoder)
        parts: dict[str, Any] = {name: build_component(name, getattr(spec, name)) for name in COMPONENTS}
    modules = {**parts, "text_encoder": tower}
    check_fit(state, reference_shapes(modules))
    for name, module in modules.items():
        names = KEY_MAPS[name](module)
        weights = {theirs: state[PREFIXES[name] + theirs] for theirs in names.values()}
        module.load_state_dict(convert_keys(weights, names, module), strict=True, assign=True)
        module.eval()
    prompt, empty = embed(tower, [tokenize(PROMPT), tokenize("")])
    return ModelBundle(spec.index, prompt=prompt, empty=empty, **parts, text_encoder=tower if keep_text_tower else None)
