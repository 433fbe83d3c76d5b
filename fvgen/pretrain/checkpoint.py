"""State of an unfinished run on disk: tensors and numbers in one safetensors file, which holds no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.io.durable import durable_file, remove_stale
from fvgen.utils.errors import UserError


def save_state(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Replaces ``path`` in one step, so that an interruption leaves the previous state; ``values`` must be plain JSON."""
    from safetensors.torch import save_file

    remove_stale(path.parent)
    stored = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with durable_file(path) as part:
        save_file(stored, part, metadata={"values": json.dumps(values)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_state` wrote, on the CPU.

    Raises:
        UserError: the file is damaged or is something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["values"])
            return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the state of a training run ({error}); delete it to start again") from error


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The module's state with prefixed names."""
    return {f"{prefix}.{name}": x for name, x in module.state_dict().items()}


def restore_module(prefix: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`module_tensors`, in place; every tensor must be there."""
    start = f"{prefix}."
    module.load_state_dict({name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)})


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts, named by the parameter's number."""
    state = optimiser.state_dict()["state"]
    return {f"optimiser.{number}.{name}": x for number, entry in state.items() for name, x in entry.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`optimiser_tensors`; the settings stay those of ``optimiser``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        if key.startswith("optimiser."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = x
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
