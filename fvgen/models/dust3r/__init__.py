"""DUSt3R: two images to two point maps in the frame of the first. Wang et al., arXiv 2312.14132.

Names are imported on first use because diffusers is slow to import.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Dust3rNetwork": "network",
    "Features": "network",
    "PointMap": "head",
    "convert_dust3r": "checkpoint",
    "key_report": "stored",
    "load_dust3r": "checkpoint",
    "network_arguments": "checkpoint",
    "read_dust3r": "stored",
    "read_dust3r_checkpoint": "checkpoint",
    "verify_dust3r": "stored",
    "write_dust3r": "stored",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
