"""Filling holes of a point map by linear interpolation of inverse depth over a Delaunay triangulation."""

from __future__ import annotations

import numpy as np

from fvgen.geometry import features as ft
from fvgen.geometry.stereo import PointMap

FILLED_CONFIDENCE = 0.1
GRID = 8


def fill_holes(dense: PointMap, K: np.ndarray, pose: np.ndarray, xy: np.ndarray, points: np.ndarray) -> PointMap:
    """Fill what lies inside the convex hull of the sparse points ``[M, 3]`` (seen at pixels ``xy [M, 2]``) and the dense ones.

    Every ``GRID``-th dense pixel joins the triangulation so that the filling meets the map. Triangles cut across depth edges,
    hence the low confidence.
    """
    from scipy.interpolate import LinearNDInterpolator

    height, width = dense.confidence.shape
    on_grid = np.zeros((height, width), bool)
    on_grid[::GRID, ::GRID] = True
    rows, columns = np.nonzero(on_grid & (dense.confidence > 0))
    sites = np.concatenate([xy, np.stack([columns, rows], axis=1) + 0.5])
    depth = ft.project(K, pose, np.concatenate([points, dense.points[rows, columns]]))[1]
    if len(sites) < 4:
        return dense
    holes = np.nonzero(dense.confidence == 0)
    at = np.stack([holes[1], holes[0]], axis=1) + 0.5
    inverse = LinearNDInterpolator(sites, 1 / depth)(at)
    good = np.isfinite(inverse) & (inverse > 0)
    rays = np.c_[at[good], np.ones(good.sum())] @ np.linalg.inv(K).T
    filled, confidence = dense.points.copy(), dense.confidence.copy()
    where = (holes[0][good], holes[1][good])
    filled[where] = (rays / inverse[good, None]) @ pose[:3, :3].T + pose[:3, 3]
    confidence[where] = FILLED_CONFIDENCE
    return PointMap(filled, confidence)
