"""Checks that cost nothing, made before any work starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fvgen.estimators import wants_dust3r
from fvgen.geometry.trajectory import parse_trajectory, path_names
from fvgen.io.images import image_size
from fvgen.io.outputs import check_output
from fvgen.utils.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_POINTS = 448 * 448  # per photo, at the geometry's working resolution


def check_photos(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """(H, W) of every photo, from the headers alone.

    Raises:
        UserError: fewer than the geometry needs, or one of them is no image; no such geometry.
    """
    learned = wants_dust3r(arguments.geometry, arguments.dust3r_weights)
    if arguments.min_confidence is not None and not learned:
        raise UserError("--min-confidence belongs to the geometry dust3r; leave it out or give --dust3r-weights")
    sizes = [image_size(photo) for photo in arguments.photos]
    if len(sizes) < 2 and not learned:
        raise UserError(
            "one photo was given and two or more are needed; add a photo of the same place from another position, "
            "or give --dust3r-weights, with which one suffices"
        )
    return sizes


def takes_mixed(arguments: argparse.Namespace) -> bool:
    """Whether the photos may differ in size and orientation."""
    return not arguments.cameras and wants_dust3r(arguments.geometry, arguments.dust3r_weights)


def count_frames(arguments: argparse.Namespace) -> int:
    """How many frames the clip will have."""
    trajectory = parse_trajectory(arguments.trajectory)
    if trajectory.name == "cameras":
        return len(path_names(trajectory))
    if trajectory.name in ("smooth", "interp"):
        return int((len(arguments.photos) - 1) * (arguments.frames - 1) + 1)
    return int(arguments.frames) * (1 + len(getattr(arguments, "then", None) or ()))


def true_frames(arguments: argparse.Namespace, frames: int) -> list[Path] | None:
    """The true frame of every frame, None without ``--truth``.

    Raises:
        UserError: no such folder, or its images do not fit the path in number or name.
    """
    if arguments.truth is None:
        return None
    folder = Path(arguments.truth)
    if not folder.is_dir():
        raise UserError(f"the folder of true frames {folder} does not exist; check --truth")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith("."))
    trajectory = parse_trajectory(arguments.trajectory)
    if trajectory.name == "cameras":
        by_name = {f.stem: f for f in files}
        listed = [Path(name.replace("\\", "/")).stem for name in path_names(trajectory)]
        if len(set(listed)) == len(listed) and all(name in by_name for name in listed):
            return [by_name[name] for name in listed]
    if len(files) != frames:
        raise UserError(
            f"{folder} holds {len(files)} images and the clip has {frames} frames; --truth needs one true frame per frame"
        )
    return files


def check_resources(arguments: argparse.Namespace, photos: Sequence[tuple[int, int]], frames: int, size: tuple[int, int]) -> None:
    """Refuses an output directory that cannot be written and sizes that cannot fit into memory.

    Args:
        photos: (H, W) of each.
        frames, size: of the clip.
    """
    pixels, clip = sum(h * w for h, w in photos), frames * size[0] * size[1]
    check_output(arguments.output, arguments.overwrite, 8 * clip + 16 * len(photos) * _POINTS + 2**23)
    need = 36 * pixels + 60 * clip
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    if need > have:
        raise UserError(
            f"{len(photos)} photos and {frames} frames of {size[1]}x{size[0]} need about {need / 1e9:.0f} GB of memory and this "
            f"machine has {have / 1e9:.0f}; use fewer or smaller ones"
        )


def geometry_facts(arguments: argparse.Namespace) -> dict[str, str]:
    """What the report says about the weights of the geometry; nothing without any.

    Raises:
        UserError: their directory has no report of its own.
    """
    weights = arguments.dust3r_weights
    if weights is None:
        return {}
    from fvgen.io.digests import SUMS_FILE, file_sha256
    from fvgen.models.dust3r.stored import read_report

    file = Path(weights)
    if not file.is_file():
        read_report(weights)
        file /= SUMS_FILE  # the list names every file's digest, so that its own stands for all
    if not file.is_file():
        raise UserError(f"{weights} is no directory written by `fvgen convert dust3r`; convert the checkpoint again")
    return {"geometry_weights_sha256": file_sha256(file)}
