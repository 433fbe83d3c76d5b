"""Weights that stay in the processor's memory and visit the GPU while they are used."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fvgen.inference.towers import PackedImageTower

FRAMES_AT_ONCE = 4  # through the VAE: its activations, not its weights, are what is large


def on_device(packed: Any, device: torch.device | str) -> Any:
    """A copy of a packed network, or of a part of one, whose tensors are on ``device``; everything else is shared."""
    if isinstance(packed, Tensor):
        return packed.to(device)
    if isinstance(packed, list | tuple):
        return type(packed)(on_device(part, device) for part in packed)
    if not hasattr(packed, "__dict__"):
        return packed
    moved = copy.copy(packed)
    moved.__dict__ = {name: on_device(value, device) for name, value in vars(packed).items()}
    return moved


class VisitingTower:
    """A :class:`PackedImageTower` that is on the GPU for the moment of each call only.

    Args:
        packed: the tower; it is moved to the processor's memory.
    """

    def __init__(self, packed: PackedImageTower) -> None:
        self._packed = on_device(packed, "cpu")

    def __call__(self, photo: Tensor) -> Tensor:
        """See :class:`PackedImageTower`."""
        return on_device(self._packed, photo.device)(photo)
