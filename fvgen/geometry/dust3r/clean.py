"""Points of one photo that float in front of what another, more confident photo sees."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.geometry.conventions import invert_rigid
from fvgen.types import Cameras

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
    world_to_cam = invert_rigid(cameras.world_from_cam)
    turns, shifts = world_to_cam[:, :3, :3].transpose(1, 2), world_to_cam[:, None, :3, 3]
    world = points.flatten(1, 2)
    depths = (world @ turns + shifts)[..., 2]
    cleaned = confidence.flatten(1).clone()
    for i in range(len(points)):
        seen = world[i] @ turns + shifts  # by every photo
        depth = seen[..., 2]
        x, y = ((seen @ cameras.K.transpose(1, 2))[..., :2] / depth[..., None]).unbind(-1)
        inside = (depth > 0) & (x >= 0) & (y >= 0) & (x < width) & (y < height)
        pixel = torch.where(inside, y.long() * width + x.long(), 0)
        floats = inside & (depth < (1 - MARGIN) * depths.gather(1, pixel)) & (cleaned[i] < cleaned.gather(1, pixel))
        floats[i] = False
        cleaned[i].masked_fill_(floats.any(0), 0.0)
    return cleaned.view_as(confidence)
