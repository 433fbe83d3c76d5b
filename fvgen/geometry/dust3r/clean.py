"""Points of one photo that float in front of what another, more confident photo sees."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.geometry.conventions import invert_rigid
from fvgen.types import Cameras

from .pinhole import transform

MARGIN = 1e-3


def cleaned_confidence(points: Tensor, cameras: Cameras, confidence: Tensor) -> Tensor:
    """``confidence [V, H, W]`` with 0 at pixels that lie in front of another photo's depth and are less sure than it.

    Photos are compared in order, each with all others, and later comparisons see what earlier ones have set to 0.

    Args:
        points: ``[V, H, W, 3]`` world.
        cameras: of the photos.
        confidence: before any threshold.
    """
    height, width = cameras.image_size
    cam_from_world = invert_rigid(cameras.world_from_cam)
    depths = torch.stack([transform(pose, p)[..., 2] for pose, p in zip(cam_from_world, points, strict=True)])
    cleaned = confidence.clone()
    for i in range(len(points)):
        for j in range(len(points)):
            if i == j:
                continue
            seen = transform(cam_from_world[j], points[i])
            depth = seen[..., 2]
            xy = (seen @ cameras.K[j].T)[..., :2] / depth[..., None]
            inside = (depth > 0) & (xy >= 0).all(-1) & (xy[..., 0] < width) & (xy[..., 1] < height)
            x, y = torch.where(inside[..., None], xy, 0.0).long().unbind(-1)
            floats = inside & (depth < (1 - MARGIN) * depths[j, y, x]) & (cleaned[i] < cleaned[j, y, x])
            cleaned[i].masked_fill_(floats, 0.0)
    return cleaned
