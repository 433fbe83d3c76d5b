"""Clips with cameras in a folder, whichever way they are laid out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fvgen.data.layouts.capture import Capture, Frame
from fvgen.data.layouts.colmap import MODEL_FOLDERS, colmap_capture
from fvgen.data.layouts.realestate import is_realestate, realestate_capture
from fvgen.data.layouts.transforms import transforms_capture
from fvgen.io.colmap import is_colmap_model
from fvgen.utils.errors import UserError

__all__ = ["Capture", "Found", "Frame", "find_captures", "locate", "read_capture"]

_READERS = {"transforms": transforms_capture, "colmap": colmap_capture, "realestate10k": realestate_capture}


@dataclass(frozen=True)
class Found:
    """A capture that has not been read.

    Attributes:
        name: its path below the searched folder; the folder's own name where that is the capture.
        layout: a key of the readers.
        path: file or folder to read.
    """

    name: str
    layout: str
    path: Path


def find_captures(folder: Path) -> list[Found]:
    """All captures at or below ``folder``, sorted by name.

    A folder is a capture if it holds a ``transforms.json`` (nerfstudio, instant-ngp; DL3DV-10K keeps one per scene beside
    ``images_4`` or ``images_8``), otherwise if it holds ``images`` and a COLMAP model in ``sparse/0``, ``sparse`` or
    ``colmap/sparse/0``; nothing below it is looked at. A text file of RealEstate10K is one if a folder of its name lies
    beside it.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the clips")
    found = sorted(_walk(folder, folder, set()), key=lambda f: f.name)
    if not found:
        raise UserError(
            f"{folder} holds no clips with cameras; there must be a transforms.json, a COLMAP model (sparse/0 beside images) or "
            "RealEstate10K files (NAME.txt beside a folder NAME with its frames)"
        )
    return found


def locate(folder: Path, name: str, layout: str) -> Found:
    """What :func:`find_captures` found in ``folder`` under this name, without a search."""
    if layout == "realestate10k":
        return Found(name, layout, folder / f"{name}.txt")
    return Found(name, layout, folder if _layout(folder) else folder / name)


def read_capture(found: Found, size: tuple[int, int]) -> Capture:
    """The frames that are on disk with their cameras, in the order in which they were taken; no pixels are read.

    Args:
        found: from :func:`find_captures`.
        size: (H, W) of the clips to be made; decides which of several resolutions is taken.

    Raises:
        UserError: the camera file is damaged or of a kind that cannot be used.
    """
    return _READERS[found.layout](found.name, found.path, size)


def _walk(folder: Path, top: Path, visited: set[str]) -> Iterator[Found]:
    real = os.path.realpath(folder)
    if real in visited:  # links that go round in circles
        return
    visited.add(real)
    layout = _layout(folder)
    if layout is not None:
        yield Found(folder.resolve().name if folder == top else folder.relative_to(top).as_posix(), layout, folder)
        return
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    clips = [p for p in entries if p.suffix == ".txt" and is_realestate(p)]
    for file in clips:
        yield Found(file.with_suffix("").relative_to(top).as_posix(), "realestate10k", file)
    images = {file.with_suffix("") for file in clips}
    for entry in entries:
        if entry.is_dir() and entry not in images:
            yield from _walk(entry, top, visited)


def _layout(folder: Path) -> str | None:
    """Layout of the capture that a folder is itself."""
    if (folder / "transforms.json").is_file():
        return "transforms"
    if (folder / "images").is_dir() and any(is_colmap_model(folder / m) for m in MODEL_FOLDERS):
        return "colmap"
    return None
