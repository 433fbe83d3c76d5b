"""Networks: video UNet, image projector, CLIP towers, VAE; their presets, storage and checkpoint conversion.

Names are imported on first use because diffusers is slow to import.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "ClipTextTower": "clip",
    "ClipVisionTower": "clip",
    "ImageProjector": "image_projector",
    "ModelBundle": "bundle",
    "ModelIndex": "spec",
    "ModelSpec": "spec",
    "VideoUNet": "unet",
    "convert_reference": "checkpoint",
    "make_vae": "vae",
    "read_index": "bundle",
    "read_reference_checkpoint": "checkpoint",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
