"""Which cameras of a path stand where a photo was taken."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.types import Cameras

ANGLE_DEG, PLACE, PIXELS = 0.05, 1e-3, 1e-3  # place in baselines, intrinsics in image widths


def coincident_photos(path: Cameras, photos: Cameras) -> dict[int, int]:
    """``{frame: photo}`` for every frame whose camera is that of a photo, in the order of the frames.

    Of successive frames at one photo only the first counts: a path that rests there has nothing to generate from otherwise.

    Args:
        path: cameras of the frames.
        photos: cameras of the photos in the same world and at the same image size.
    """
    found: dict[int, int] = {}
    matches = _same(path, photos)
    previous = -1
    for frame, row in enumerate(matches):
        photo = int(row.int().argmax()) if bool(row.any()) else -1
        if photo >= 0 and photo != previous:
            found[frame] = photo
        previous = photo
    return found


def _same(path: Cameras, photos: Cameras) -> Tensor:
    """``[T, V]`` bool."""
    a, b = path.world_from_cam.double(), photos.world_from_cam.double()
    gaps = torch.cdist(b[:, :3, 3], b[:, :3, 3], compute_mode="donot_use_mm_for_euclid_dist")
    baseline = float(gaps[gaps > 0].min()) if bool((gaps > 0).any()) else 1.0
    place = torch.cdist(a[:, :3, 3], b[:, :3, 3], compute_mode="donot_use_mm_for_euclid_dist") < PLACE * baseline
    # |R1 - R2| = 2 sqrt(2) sin(angle / 2) resolves small angles, which the arc cosine of the trace does not
    turn = (a[:, None, :3, :3] - b[None, :, :3, :3]).flatten(2).norm(dim=-1) / 2**0.5
    lens = (path.K[:, None].double() - photos.K[None].double()).abs().amax((2, 3)) < PIXELS * max(path.image_size)
    return place & (turn < torch.pi * ANGLE_DEG / 180) & lens
