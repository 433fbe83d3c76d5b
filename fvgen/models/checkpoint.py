"""Reads a ViewCrafter checkpoint file and turns it into a model bundle."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.utils.errors import UserError

from .bundle import ModelBundle, build_component
from .key_map import KEY_MAPS, PREFIXES, check_complete, convert_keys, ignored_reason
from .spec import COMPONENTS, ModelSpec
from .tokenizer import PROMPT, tokenize

_DEEPSPEED_PREFIX = "_forward_module."


def read_reference_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a checkpoint file under today's reference names.

    Understood are safetensors files, files with a ``state_dict`` and DeepSpeed files with a ``module``. Older files call the
    frame-rate embedding ``framestride_embed``.

    Raises:
        UserError: the file is missing or holds none of these.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no checkpoint file {file}; check the path")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is not a readable safetensors file ({error}); get the checkpoint again") from None
    else:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            objects = isinstance(error, pickle.UnpicklingError)
            reason = "it is no PyTorch file or holds other objects" if objects else str(error).splitlines()[0]
            raise UserError(f"{file} cannot be read as plain weights ({reason}); save its weights as safetensors") from None
        state = content.get("state_dict", content.get("module")) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{file} holds neither a state_dict nor a module; give the checkpoint file of ViewCrafter")
    names = {key: key.removeprefix(_DEEPSPEED_PREFIX).replace("framestride_embed", "fps_embedding") for key in state}
    return {names[key]: value for key, value in state.items()}


def convert_reference(state: dict[str, Tensor], spec: ModelSpec) -> ModelBundle:
    """A bundle with the weights of a reference state dict. Prompt embeddings come from its text tower, which is not kept.

    Raises:
        UserError: a weight is missing, unknown, or has a shape that ``spec`` does not expect.
    """
    from .clip import ClipTextTower

    with torch.device("meta"):
        tower: Any = ClipTextTower(**spec.text_encoder)
        parts: dict[str, Any] = {name: build_component(name, getattr(spec, name)) for name in COMPONENTS}
    blocks = len(tower.blocks)
    used = [key for key in state if ignored_reason(key, blocks) is None]
    modules = {**parts, "text_encoder": tower}
    maps = {name: KEY_MAPS[name](module) for name, module in modules.items()}
    check_complete(used, [PREFIXES[name] + theirs for name, names in maps.items() for theirs in names.values()])
    for name, module in modules.items():
        prefix = PREFIXES[name]
        weights = {key.removeprefix(prefix): state[key] for key in used if key.startswith(prefix)}
        module.load_state_dict(convert_keys(weights, maps[name], module), strict=True, assign=True)
        module.float().eval()
    prompt, empty = embed_prompts(tower)
    return ModelBundle(spec.index, prompt=prompt, empty=empty, **parts)


@torch.no_grad()
def embed_prompts(tower: nn.Module) -> tuple[Tensor, Tensor]:
    """Text tokens ``[77, D]`` of the fixed prompt and of the empty one."""
    ids = torch.tensor([tokenize(PROMPT), tokenize("")])
    prompt, empty = tower(ids).unbind(0)
    return prompt.clone(), empty.clone()
