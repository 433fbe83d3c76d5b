"""Merging the point maps that one photo got from several partners."""

from __future__ import annotations

import numpy as np

from fvgen.geometry.stereo import PointMap

AGREE = 0.03  # relative depth difference


def fuse(maps: list[PointMap], pose: np.ndarray) -> PointMap:
    """One point map: the mean along the ray where the maps agree, else the more confident; ``pose`` is world_from_cam."""
    merged = maps[0]
    for other in maps[1:]:
        depth = [((m.points - pose[:3, 3]) @ pose[:3, 2]) for m in (merged, other)]
        a, b = merged.confidence, other.confidence
        both = (a > 0) & (b > 0)
        agree = both & (np.abs(depth[0] - depth[1]) <= AGREE * np.minimum(depth[0], depth[1]))
        weight = np.where(agree, a / np.maximum(a + b, 1e-12), (a >= b).astype(np.float64))
        points = weight[..., None] * merged.points + (1 - weight[..., None]) * other.points
        confidence = np.where(both & ~agree, 0.5, 1.0) * np.maximum(a, b)
        merged = PointMap(points, confidence.astype(np.float32))
    return merged
