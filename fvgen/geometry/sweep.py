"""Dense stereo where the camera moves along its viewing axis: plane sweep with semi-global aggregation.

Cost: 1 - normalised cross-correlation over a window, per plane of constant inverse depth; aggregation along four directions
(Hirschmueller 2008). Slower than rectified matching, which is impossible there.
"""

from __future__ import annotations

import numpy as np

from fvgen.geometry import features as ft
from fvgen.geometry.stereo import PointMap

PLANES = 64
WINDOW = 7
SMALL_STEP, LARGE_STEP = 0.08, 0.5  # penalties, in units of the cost
AGREE_PX = 1.5
MIN_PARALLAX_PX = 2.0  # over the whole depth range; less around the epipole, where depth cannot be seen


def sweep_pair(
    photos: tuple[np.ndarray, np.ndarray],
    K: tuple[np.ndarray, np.ndarray],
    poses: tuple[np.ndarray, np.ndarray],
    sparse: np.ndarray,
) -> tuple[PointMap, PointMap]:
    """Point maps of both photos ``[H, W, 3]`` uint8 from intrinsics, ``world_from_cam`` and sparse world points ``[M, 3]``."""
    import cv2

    grey = [cv2.cvtColor(p, cv2.COLOR_RGB2GRAY).astype(np.float32) for p in photos]
    estimates = []
    for i, j in ((0, 1), (1, 0)):
        depth = ft.project(K[i], poses[i], sparse)[1]
        near, far = np.percentile(depth, [2, 98])
        inverse = np.linspace(1.15 / near, 0.85 / far, PLANES)
        cost = sweep_cost(grey[i], grey[j], K[i], poses[i], K[j], poses[j], inverse)
        estimates.append(best_inverse_depth(aggregate(cost), inverse))
    points = [_unproject(1 / e, k, p) for e, k, p in zip(estimates, K, poses, strict=True)]
    maps = []
    for i, j in ((0, 1), (1, 0)):
        confidence = _agreement(points[i], points[j], estimates[i], K[i], poses[i], K[j], poses[j])
        maps.append(PointMap(np.where(confidence[..., None] > 0, points[i], 0.0), confidence))
    return maps[0], maps[1]


def sweep_cost(
    grey: np.ndarray,
    other: np.ndarray,
    K: np.ndarray,
    pose: np.ndarray,
    K_other: np.ndarray,
    pose_other: np.ndarray,
    inverse: np.ndarray,
) -> np.ndarray:
    """Matching cost ``[D, H, W]`` float32 in [0, 1] of each inverse depth; 1 where the plane is not seen by the other photo."""
    import cv2

    height, width = grey.shape
    relative = np.linalg.inv(pose_other) @ pose
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    back = np.linalg.inv(K) @ half
    window = (WINDOW, WINDOW)
    mean, square = cv2.blur(grey, window), cv2.blur(grey * grey, window)
    spread = np.sqrt(np.maximum(square - mean * mean, 0) + 4.0)
    cost = np.ones((len(inverse), height, width), np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for d, value in enumerate(inverse):
        plane = relative[:3, :3] + np.outer(relative[:3, 3], [0, 0, value])
        other_from_this = np.linalg.inv(half) @ K_other @ plane @ back
        seen = cv2.warpPerspective(other, other_from_this, (width, height), flags=flags)
        inside = cv2.warpPerspective(np.ones_like(other), other_from_this, (width, height), flags=flags)
        seen_mean = cv2.blur(seen, window)
        seen_spread = np.sqrt(np.maximum(cv2.blur(seen * seen, window) - seen_mean**2, 0) + 4.0)
        ncc = (cv2.blur(grey * seen, window) - mean * seen_mean) / (spread * seen_spread)
        cost[d] = np.where(inside > 0.999, np.clip(0.5 - 0.5 * ncc, 0, 1), 1.0)
    return cost


def aggregate(cost: np.ndarray) -> np.ndarray:
    """Sum ``[D, H, W]`` of the semi-global path costs from the left, right, top and bottom."""
    total = np.zeros_like(cost)
    for axis in (1, 2):
        moved, into = np.moveaxis(cost, axis, 0), np.moveaxis(total, axis, 0)
        for order in (range(len(moved)), range(len(moved) - 1, -1, -1)):
            path: np.ndarray | None = None
            for k in order:
                path = moved[k].copy() if path is None else moved[k] + _step(path)
                into[k] += path
    return total


def _step(path: np.ndarray) -> np.ndarray:
    """Cheapest way ``[D, N]`` from the neighbour's path costs, less their minimum (which keeps the numbers bounded)."""
    lowest = path.min(0, keepdims=True)
    best = np.minimum(path, lowest + LARGE_STEP)
    np.minimum(best[1:], path[:-1] + SMALL_STEP, out=best[1:])
    np.minimum(best[:-1], path[1:] + SMALL_STEP, out=best[:-1])
    return best - lowest


def best_inverse_depth(cost: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Inverse depth ``[H, W]`` of the lowest cost, refined between planes by a parabola."""
    best = np.clip(cost.argmin(0), 1, len(inverse) - 2)
    below, at, above = (np.take_along_axis(cost, (best + s)[None], 0)[0] for s in (-1, 0, 1))
    curve = below - 2 * at + above
    shift = np.where(curve > 1e-6, np.clip(0.5 * (below - above) / np.maximum(curve, 1e-6), -0.5, 0.5), 0.0)
    return inverse[0] + (best + shift) * (inverse[1] - inverse[0])


def _unproject(depth: np.ndarray, K: np.ndarray, pose: np.ndarray) -> np.ndarray:
    v, u = np.mgrid[0 : depth.shape[0], 0 : depth.shape[1]] + 0.5
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K).T
    return (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]


def _agreement(
    points: np.ndarray,
    points_other: np.ndarray,
    inverse: np.ndarray,
    K: np.ndarray,
    pose: np.ndarray,
    K_other: np.ndarray,
    pose_other: np.ndarray,
) -> np.ndarray:
    """Confidence ``[H, W]``: into the other photo, its point there and back must end within ``AGREE_PX``."""
    import cv2

    height, width = inverse.shape
    xy, z = ft.project(K_other, pose_other, points.reshape(-1, 3))
    hit = np.floor(xy).astype(np.int64)
    within = (z > 0) & (hit >= 1).all(1) & (hit[:, 0] < width - 1) & (hit[:, 1] < height - 1)
    hit = np.where(within[:, None], hit, 0)
    back, z_back = ft.project(K, pose, points_other[hit[:, 1], hit[:, 0]])
    home = np.mgrid[0:height, 0:width][::-1].reshape(2, -1).T + 0.5
    # Nearest-pixel look-up moves the way back by up to half a pixel.
    off = np.maximum(np.linalg.norm(back - home, axis=1) - 0.5, 0.0)
    far = _unproject(np.full_like(inverse, 1 / inverse.min()), K, pose).reshape(-1, 3)
    near = _unproject(np.full_like(inverse, 1 / inverse.max()), K, pose).reshape(-1, 3)
    parallax = np.linalg.norm(ft.project(K_other, pose_other, far)[0] - ft.project(K_other, pose_other, near)[0], axis=1)
    good = within & (z_back > 0) & (off < AGREE_PX) & (parallax > MIN_PARALLAX_PX)
    kept = cv2.erode(good.reshape(height, width).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return np.where(kept, 1 / (1 + off.reshape(height, width)), 0.0).astype(np.float32)
