"""Folders with ``images`` and a COLMAP model (https://colmap.github.io/format.html)."""

from __future__ import annotations

from pathlib import Path

from fvgen.data.layouts.capture import Capture, Frame, find_images, in_order
from fvgen.io.cameras import read_entries
from fvgen.io.colmap import is_colmap_model

MODEL_FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0")


def colmap_capture(name: str, folder: Path, size: tuple[int, int]) -> Capture:
    """See :func:`fvgen.data.layouts.read_capture`; frames in the order of their file names."""
    model = next(folder / m for m in MODEL_FOLDERS if is_colmap_model(folder / m))
    entries = read_entries(model)
    images = find_images(folder, [f"images/{e.name}" for e in entries], size)
    frames = [Frame(image, entry) for entry, image in zip(entries, images, strict=True) if image is not None]
    frames.sort(key=lambda f: in_order(f.camera.name))
    return Capture(name, "colmap", model, tuple(frames), len(entries) - len(frames))
