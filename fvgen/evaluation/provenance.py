"""Where and with what a figure was measured."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from fvgen import envs

_UNKNOWN = "unknown"


def provenance(command: str) -> dict[str, str]:
    """GPU, driver, versions, commit and command for a record of results.

    Args:
        command: how to repeat the measurement.

    Returns:
        strings ``gpu`` ("none" without one), ``driver``, ``torch``, ``cuda``, ``commit`` (``FVGEN_COMMIT`` overrides that of the
        checkout; "unknown" outside of one), ``command``.
    """
    has_gpu = torch.cuda.is_available()
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "driver": _ask(*query) if has_gpu else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": _commit(),
        "command": command,
    }


@cache
def versions() -> dict[str, str]:
    """Of FVGen, Python and PyTorch, and the commit; those that are known."""
    try:
        own = metadata.version("fvgen")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        own = _UNKNOWN
    found = {"fvgen": own, "python": platform.python_version(), "torch": torch.__version__, "commit": _commit()}
    return {name: version for name, version in found.items() if version != _UNKNOWN}


def _commit() -> str:
    return envs.commit() or _ask("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return _UNKNOWN
