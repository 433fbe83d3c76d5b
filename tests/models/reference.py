"""Reads the ViewCrafter golden files: tensors, manifests, weights under reference names, stated tolerances."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fvgen.models.key_map import convert_keys
from tests import golden

GROUP = "viewcrafter"
MISSING = "missing"


def manifest(name: str) -> dict[str, Any]:
    return json.loads(golden.path(GROUP, f"{name}.json").read_text())


def tensors(name: str, prefix: str = "") -> dict[str, Tensor]:
    """Tensors whose name starts with ``prefix``, without it; bfloat16 weights as float32."""
    found = {}
    with safe_open(golden.path(GROUP, f"{name}.safetensors"), "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            if key.startswith(prefix):
                value = file.get_tensor(key).to(golden.device())
                found[key[len(prefix) :]] = value.float() if value.dtype == torch.bfloat16 else value
    return found


def cases(name: str, suffix: str = "", prefix: str = "") -> list[str]:
    """Tensor names of a file that start with ``prefix`` and end with ``suffix``, without the latter, for parametrising.

    A file that is missing gives one placeholder, whose test then skips by the file's name.
    """
    if not golden.available(GROUP, f"{name}.safetensors"):
        return [MISSING]
    with safe_open(golden.path(GROUP, f"{name}.safetensors"), "pt") as file:
        return [k.removesuffix(suffix) for k in file.keys() if k.startswith(prefix) and k.endswith(suffix)]  # noqa: SIM118


def keys_of(name: str, *path: str) -> list[str]:
    """Keys at a place in a manifest, for parametrising; a placeholder as in :func:`cases`."""
    if not golden.available(GROUP, f"{name}.json"):
        return [MISSING]
    node = manifest(name)
    for part in path:
        node = node.get(part, {})
    return list(node)


def load(module: nn.Module, names: dict[str, str], weights: dict[str, Tensor]) -> nn.Module:
    """Strict load of reference weights."""
    module.load_state_dict(convert_keys(weights, names, module), strict=True)
    return module.eval().to(golden.device())


def tolerances(row: str) -> list[float]:
    """The numbers in the last column of the README's tolerance table, in the row whose first column contains ``row``."""
    text = golden.path(GROUP, "README.md").read_text()
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and row in cells[0]:
            return [float(x) for x in re.findall(r"\d+e-\d+", cells[2])]
    raise AssertionError(f"the README states no tolerance for {row}")


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)
