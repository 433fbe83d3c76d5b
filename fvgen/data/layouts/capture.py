"""What every layout is read into, and the search for its image files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fvgen.io.cameras import CameraEntry
from fvgen.io.images import image_size
from fvgen.utils.errors import UserError

LONG_SIDE = 448  # of the geometry's point maps; photos below it cost detail
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


@dataclass(frozen=True)
class Frame:
    """One image file with its camera and, where it is known, its depth.

    ``depth_unit``: world units per stored value.
    """

    image: Path
    camera: CameraEntry
    depth: Path | None = None
    depth_unit: float = 1.0


@dataclass(frozen=True)
class Capture:
    """Frames in the order in which they were taken.

    ``cameras``: the file they come from; ``missing``: cameras whose image is not there.
    """

    name: str
    layout: str
    cameras: Path
    frames: tuple[Frame, ...]
    missing: int


def in_order(name: str) -> list[str | int]:
    """Sorting key under which ``frame_10`` comes after ``frame_9``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def find_images(root: Path, names: Sequence[str], size: tuple[int, int]) -> list[Path | None]:
    """The image file of each name, None where there is none.

    Names are matched without their extension. Where ``images_2``, ``images_4`` ... stand beside ``images``, the folder with the
    most of the files is taken; among equals the one with the smallest images that still fill ``size`` (H, W) and the geometry,
    or the largest there are.
    """
    plain = [PurePosixPath(*PurePosixPath(name.replace("\\", "/")).parts) for name in names]
    tops = sorted({p.parts[0] for p in plain if len(p.parts) > 1 and p.parts[0] != ".."})
    scales = {""} | {
        match[1]
        for top in tops
        for entry in root.iterdir()
        if entry.is_dir() and (match := re.fullmatch(re.escape(top) + r"(_\d+)", entry.name))
    }
    listings = _Listings(root)
    choices = [[listings.find(path, scale) for path in plain] for scale in sorted(scales)]
    most = max(sum(p is not None for p in choice) for choice in choices)
    if most == 0:
        return choices[0]
    sized = [(_size(choice), choice) for choice in choices if sum(p is not None for p in choice) == most]
    enough = [c for c in sized if c[0][0] >= size[0] and c[0][1] >= size[1] and max(c[0]) >= LONG_SIDE]
    pick = min(enough, key=lambda c: c[0]) if enough else max(sized, key=lambda c: c[0])
    return pick[1]


class _Listings:
    """Image files of folders by their names without extension; each folder is listed once."""

    def __init__(self, root: Path) -> None:
        self._root, self._folders = root, dict[Path, dict[str, Path]]()

    def find(self, name: PurePosixPath, scale: str) -> Path | None:
        parts = name.parts
        folder = self._root.joinpath(parts[0] + scale, *parts[1:-1]) if len(parts) > 1 else self._root
        if folder not in self._folders:
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            self._folders[folder] = {p.stem: p for p in entries if p.suffix.lower() in _SUFFIXES}
        stem = name.stem if name.suffix.lower() in _SUFFIXES else name.name
        return self._folders[folder].get(stem)


def _size(files: Sequence[Path | None]) -> tuple[int, int]:
    try:
        return image_size(next(p for p in files if p is not None))
    except UserError:
        return 0, 0
