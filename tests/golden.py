"""Finds golden reference values. A group that is missing is skipped by name; its cases come from its own manifests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_DEFAULT = Path(__file__).resolve().parent.parent.parent / "shared" / "golden"
_device = "cpu"


def root() -> Path:
    return Path(os.environ.get("FVGEN_GOLDEN", _DEFAULT))


def device() -> str:
    """Where the readers put what they read."""
    return _device


@contextmanager
def on(where: str) -> Iterator[None]:
    """Reference values and the networks made of them are on this device inside the block, and float32 is not rounded to TF32."""
    global _device
    import torch

    before = _device, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    _device, torch.backends.cudnn.allow_tf32 = where, False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        _device, torch.backends.cudnn.allow_tf32 = before[:2]
        torch.set_float32_matmul_precision(before[2])


def available(group: str, file: str) -> bool:
    return (root() / group / file).is_file()


def path(group: str, file: str) -> Path:
    """Path of a golden file; skips the test, naming group and file, when it is not there."""
    found = root() / group / file
    if not found.is_file():
        pytest.skip(f"no golden file {group}/{file} under {root()}; set FVGEN_GOLDEN to a folder that has it")
    return found
