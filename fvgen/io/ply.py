"""Coloured point clouds as binary PLY."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
from torch import Tensor


def write_ply(path: str | PathLike[str], points: Tensor, rgb: Tensor) -> None:
    """Write ``points [P, 3]`` (world units) with ``rgb [P, 3]`` in [0, 1] as binary little-endian PLY with uchar colours."""
    if points.ndim != 2 or points.shape[1] != 3 or rgb.shape != points.shape:
        raise ValueError(f"write_ply needs points and rgb of shape [P, 3], got {tuple(points.shape)} and {tuple(rgb.shape)}")
    layout = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    rows = np.empty(points.shape[0], dtype=layout)
    colours = (rgb.detach().cpu().clamp(0, 1) * 255.0).round().byte().numpy()
    for column, axis in enumerate("xyz"):
        rows[axis] = points[:, column].detach().cpu().numpy()
    for column, channel in enumerate(("red", "green", "blue")):
        rows[channel] = colours[:, column]
    kinds = [f"property float {a}" for a in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *kinds, "end_header"]
    Path(path).write_bytes("\n".join(header).encode("ascii") + b"\n" + rows.tobytes())
