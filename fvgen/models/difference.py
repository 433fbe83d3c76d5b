"""A model that differs from another in its UNet alone, stored as that difference in 8 bits: half as large as the UNet itself.

model_index.json                of this model; ``base``: directory of the other, relative to this one
unet_difference.safetensors     int8 per parameter, and ``scales``: one float32 for each, in the order of their names
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fvgen.io.digests import write_sums
from fvgen.io.durable import whole_folder
from fvgen.utils.errors import UserError

if TYPE_CHECKING:
    from fvgen.models.bundle import ModelBundle

FILE, BASE, INDEX = "unet_difference.safetensors", "base", "model_index.json"
_SCALES = "scales"
_LEVELS = 127


def save_difference(model: ModelBundle, base: ModelBundle, base_directory: str, directory: str | os.PathLike[str]) -> None:
    """Writes ``model`` as its difference to ``base``; each weight comes back within 1/254 of its tensor's largest difference.

    Args:
        model, base: their UNets have the same parameters, their other parts are taken to be the same.
        base_directory: where ``base`` is stored, relative to ``directory``; its UNet as it is there, rounding included.
        directory: is created whole.

    Raises:
        UserError: the UNets do not fit each other, or the directory exists.
    """
    from safetensors.torch import save_file

    root = Path(directory)
    if root.exists():
        raise UserError(f"{root} exists and will not be overwritten; choose another place")
    ours, theirs = model.unet.state_dict(), base.unet.state_dict()
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise UserError("the two models have UNets of different shapes; a difference needs the same network")
    tensors: dict[str, Tensor] = {}
    scales = []
    for name in sorted(ours):
        difference = ours[name].detach().cpu().double() - theirs[name].detach().cpu().double()
        scale = (difference.abs().max() / _LEVELS).float()
        tensors[name] = (difference / scale if scale > 0 else difference).round().to(torch.int8)
        scales.append(scale)
    root.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(root) as new:
        new.mkdir()
        save_file({**tensors, _SCALES: torch.stack(scales)}, new / FILE)
        index = {"kind": "fvgen", **model.index.to_dict(), BASE: base_directory}
        (new / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        write_sums(new)


def base_directory(root: Path) -> Path:
    """Where the other model of a stored difference lies.

    Raises:
        UserError: the index does not say.
    """
    base = json.loads((root / INDEX).read_text()).get(BASE)
    if not isinstance(base, str):
        raise UserError(f"{root / INDEX} does not name the model that {FILE} is a difference to; save the model again")
    return (root / base).resolve()


@torch.no_grad()
def add_difference(unet: torch.nn.Module, root: Path) -> None:
    """Turns the base's UNet (float32) into the model's, in place.

    Raises:
        UserError: the file is damaged or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(root / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{root / FILE} cannot be loaded ({error}); install or save the model again") from error
    scales = found.pop(_SCALES, torch.empty(0))
    state = unet.state_dict()
    if set(found) != set(state) or len(scales) != len(state) or any(found[k].shape != state[k].shape for k in state):
        raise UserError(f"{root / FILE} is the difference of another network; save the model again")
    for name, scale in zip(sorted(state), scales, strict=True):
        state[name] += scale * found[name]
