"""Finds golden reference values. A group that is missing is skipped by name; its cases come from its own manifests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_DEFAULT = Path(__file__).resolve().parent.parent.parent / "shared" / "golden"


def root() -> Path:
    return Path(os.environ.get("FVGEN_GOLDEN", _DEFAULT))


def available(group: str, file: str) -> bool:
    return (root() / group / file).is_file()


def path(group: str, file: str) -> Path:
    """Path of a golden file; skips the test, naming group and file, when it is not there."""
    found = root() / group / file
    if not found.is_file():
        pytest.skip(f"no golden file {group}/{file} under {root()}; set FVGEN_GOLDEN to a folder that has it")
    return found
