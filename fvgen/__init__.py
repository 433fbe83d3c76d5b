"""FVGen: photographs to novel-view video with a four-step video diffusion model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# A checkout keeps the kernels beside the package; an installed package has them inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "__init__.py").is_file() and not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(_root))

_LAZY = {
    "FVGenPipeline": "fvgen.pipeline",
    "render_points": "fvgen.render",
}
__all__ = ["FVGenPipeline", "__version__", "render_points"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fvgen' has no attribute {name!r}")
