"""Folders with a ``transforms.json``: nerfstudio, instant-ngp, and DL3DV-10K, whose scenes are made with nerfstudio's tools.

Cameras: https://docs.nerf.studio/quickstart/data_conventions.html. ``depth_file_path`` of a frame names its z-depth: an image
whose values times ``depth_unit_scale_factor`` (0.001, that is 16-bit millimetres, where the file does not state it) are world
units, or an ``.npy`` array in world units (times the factor only where the file states it; nerfstudio itself takes the factor
from its command line and applies it to arrays too).

DL3DV-10K (arXiv 2312.16256): ``file_path`` says ``images/frame_00001.png`` and the intrinsics are those of the full resolution,
while ``images_4`` or ``images_8`` hold the files; the lens distortion is k1, k2, p1, p2.
"""

from __future__ import annotations

import json
from pathlib import Path

from fvgen.data.layouts.capture import Capture, Frame, find_images, in_order
from fvgen.io.cameras import read_entries
from fvgen.utils.errors import UserError

MILLIMETRES = 0.001


def transforms_capture(name: str, folder: Path, size: tuple[int, int]) -> Capture:
    """See :func:`fvgen.data.layouts.read_capture`."""
    file = folder / "transforms.json"
    entries = read_entries(file)
    data = json.loads(file.read_text(encoding="utf-8"))
    stated = data.get("depth_unit_scale_factor")
    if not (stated is None or (isinstance(stated, int | float) and stated > 0)):
        raise UserError(f"{file}: depth_unit_scale_factor must be a positive number, not {stated!r}; correct it")
    frames = []
    images = find_images(folder, [e.name for e in entries], size)
    for entry, image, values in zip(entries, images, data["frames"], strict=True):
        if image is not None:
            depth = values.get("depth_file_path")
            unit = stated or (1.0 if str(depth).endswith(".npy") else MILLIMETRES)
            frames.append(Frame(image, entry, folder / str(depth) if depth else None, float(unit)))
    frames.sort(key=lambda f: in_order(f.camera.name))
    return Capture(name, "transforms", file, tuple(frames), len(entries) - len(frames))
