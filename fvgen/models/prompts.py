"""Text tokens of prompts, by the text tower of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.utils.errors import UserError

from .tensor_files import load_tensors
from .tokenizer import PROMPT, tokenize

FOLDER = "text_encoder"


@torch.no_grad()
def embed(tower: Any, ids: Sequence[list[int]]) -> list[Tensor]:
    """Text tokens ``[77, D]`` float32 of each list of 77 token ids; the tower is computed in float32 and stays as it is."""
    from .clip import ClipTextTower

    with torch.device("meta"):
        exact = ClipTextTower(**{name: value for name, value in tower.config.items() if not name.startswith("_")})
    exact.load_state_dict({name: value.detach().float() for name, value in tower.state_dict().items()}, assign=True)
    return [tokens.clone() for tokens in exact.eval()(torch.tensor(ids)).unbind(0)]


def check_prompt(directory: str | os.PathLike[str], prompt: str | None, vocabulary: str | os.PathLike[str] | None) -> None:
    """Raises UserError where :func:`embed_prompt` would, without loading the tower."""
    if prompt not in (None, PROMPT, ""):
        _tower_folder(Path(directory))
        tokenize(str(prompt), vocabulary)
    elif vocabulary is not None:
        raise UserError("a tokenizer is only for a prompt of your own; leave it out or give a prompt")


def embed_prompt(directory: str | os.PathLike[str], prompt: str, vocabulary: str | os.PathLike[str] | None = None) -> Tensor:
    """Text tokens ``[77, D]`` float32 of a prompt, by the tower in a model directory, which is loaded for that moment.

    Args:
        directory: of a model that was converted with ``--keep-text-tower``.
        prompt, vocabulary: see :func:`fvgen.models.tokenizer.tokenize`.

    Raises:
        UserError: the model has no text tower, or a damaged one; the prompt cannot be tokenised.
    """
    from safetensors import SafetensorError

    from .clip import ClipTextTower

    folder = _tower_folder(Path(directory))
    ids = tokenize(prompt, vocabulary)
    try:
        with torch.device("meta"):
            tower = ClipTextTower.from_config(ClipTextTower.load_config(folder))
        tower.load_state_dict(load_tensors(folder), strict=True, assign=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the text tower in {folder} cannot be loaded ({reason}); convert the checkpoint again") from error
    return embed(tower, [ids])[0]


def _tower_folder(root: Path) -> Path:
    if not (root / FOLDER / "config.json").is_file():
        raise UserError(
            f"the model {root} has no text tower, so that it knows only the prompt {PROMPT!r}; convert it with --keep-text-tower"
        )
    return root / FOLDER
