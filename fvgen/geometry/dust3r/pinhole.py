"""Pinhole cameras of predicted point maps: focal length, intrinsics, pose, and points of a depth map.

DUSt3R counts pixel centres as integers and puts the optical axis at (W / 2, H / 2) of them. Here pixel centres are at +0.5, so
that the same axis is at (W / 2 + 0.5, H / 2 + 0.5). :func:`optical_axis` is the only place that knows this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fvgen.geometry.conventions import invert_rigid, rigid

WEISZFELD_STEPS = 10
INLIER_PX = 5.0
POSE_CONFIDENCE = 3.0  # poses come from points that are surer, whichever points are rendered
FOCALS_TRIED = 21
MIN_POINTS = 4  # SQPNP needs three, RANSAC one more


def optical_axis(size: tuple[int, int]) -> tuple[float, float]:
    """Where DUSt3R takes the principal point (x, y) of an image of ``size`` (H, W) to be, pixel centres at +0.5."""
    return size[1] / 2 + 0.5, size[0] / 2 + 0.5


def intrinsics(focal: float, size: tuple[int, int]) -> Tensor:
    """``[3, 3]`` float64 with square pixels of an image of ``size`` (H, W)."""
    x, y = optical_axis(size)
    return torch.tensor([[focal, 0, x], [0, focal, y], [0, 0, 1]], dtype=torch.float64)


def pixel_centres(size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """(x, y) ``[H, W, 2]`` float64."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device=device) + 0.5 for n in size), indexing="ij")
    return torch.stack([x, y], dim=-1)


def estimate_focal(points: Tensor, axis: tuple[float, float] | None = None, limits: tuple[float, float] | None = None) -> float:
    """Focal length in pixels under which ``points [H, W, 3]``, in the frame of their own camera, fall on their pixels.

    Weiszfeld's iteration (arXiv 2312.14132, section 3.3): the sum of distances is minimised by reweighted least squares. Every
    pixel counts. One point with a depth near zero can drive the result to zero; ``limits`` keep it in a sensible range.

    Args:
        points: camera-frame points.
        axis: principal point (x, y), pixel centres at +0.5; that of DUSt3R when left out.
        limits: smallest and largest focal length as multiples of that of a field of view of 60 degrees over the long side.
    """
    size = (points.shape[0], points.shape[1])
    pixels = pixel_centres(size, points.device) - points.new_tensor(axis or optical_axis(size), dtype=torch.float64)
    directions = (points[..., :2].double() / points[..., 2:].double()).nan_to_num(posinf=0.0, neginf=0.0)
    along, squared = (pixels * directions).sum(-1), directions.square().sum(-1)
    focal = along.sum() / squared.sum()
    for _ in range(WEISZFELD_STEPS):
        weights = 1 / (pixels - focal * directions).norm(dim=-1).clamp(min=1e-8)
        focal = (weights * along).sum() / (weights * squared).sum()
    if limits is None:
        return float(focal)
    unit = max(size) / (2 * math.tan(math.radians(30)))
    return float(focal.clamp(limits[0] * unit, limits[1] * unit))


def camera_pose(points: Tensor, K: Tensor, mask: Tensor, iterations: int = 100) -> Tensor | None:
    """``world_from_cam [4, 4]`` float64 of the camera that sees ``points [H, W, 3]`` (world frame) at their pixels.

    SQPNP in RANSAC with 5 pixels of tolerance (OpenCV, whose draws are the same in every run), on the pixels in ``mask [H, W]``.
    None where fewer than four points are left or no pose is found.
    """
    return camera_poses([(points, K, mask)], iterations)[0]


def camera_poses(views: Sequence[tuple[Tensor, Tensor, Tensor]], iterations: int = 100) -> list[Tensor | None]:
    """:func:`camera_pose` of views (points, K, mask), side by side."""
    seen = [_seen(points, mask) for points, _, mask in views]
    return [pose for _, pose in _side_by_side(seen, [K for _, K, _ in views], iterations)]


def pose_and_focal(points: Tensor, mask: Tensor, iterations: int = 10) -> tuple[Tensor, float] | None:
    """As :func:`camera_pose` with a focal length in pixels that nobody knows: the first of those with the most inliers.

    21 focal lengths are tried, in equal ratios from half the long side to three times it.
    """
    size = (points.shape[0], points.shape[1])
    focals = np.geomspace(max(size) / 2, 3 * max(size), FOCALS_TRIED).tolist()
    tried = _side_by_side([_seen(points, mask)] * len(focals), [intrinsics(f, size) for f in focals], iterations)
    found = [(inliers, pose, focal) for (inliers, pose), focal in zip(tried, focals, strict=True) if pose is not None]
    if not found:
        return None
    _, pose, focal = max(found, key=lambda each: each[0])
    return pose, focal


def _seen(points: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Points ``[N, 3]`` and pixels ``[N, 2]`` of a mask, float64."""
    pixels = pixel_centres((points.shape[0], points.shape[1]), points.device)
    return points[mask].double().cpu().numpy(), pixels[mask].cpu().numpy()


def _side_by_side(
    seen: Sequence[tuple[np.ndarray, np.ndarray]], Ks: Sequence[Tensor], iterations: int
) -> list[tuple[int, Tensor | None]]:
    """Number of inliers and pose of each view. OpenCV takes one core for each and does not hold Python up meanwhile."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(partial(_pnp, iterations=iterations), seen, Ks))


def _pnp(seen: tuple[np.ndarray, np.ndarray], K: Tensor, iterations: int) -> tuple[int, Tensor | None]:
    import cv2

    if len(seen[0]) < MIN_POINTS:
        return 0, None
    found, rotation, translation, inliers = cv2.solvePnPRansac(
        *seen,
        K.double().numpy(),
        None,
        iterationsCount=iterations,
        reprojectionError=INLIER_PX,
        flags=cv2.SOLVEPNP_SQPNP,
    )
    if not found or not (np.isfinite(rotation).all() and np.isfinite(translation).all()):
        return 0, None
    R, t = torch.from_numpy(cv2.Rodrigues(rotation)[0]), torch.from_numpy(translation[:, 0])
    return len(inliers), invert_rigid(rigid(R, t))


def transform(pose: Tensor, points: Tensor) -> Tensor:
    """Rigid ``pose [4, 4]`` applied to ``points [..., 3]``."""
    return points @ pose[:3, :3].T.to(points) + pose[:3, 3].to(points)


def unproject(depth: Tensor, K: Tensor, world_from_cam: Tensor) -> Tensor:
    """World points ``[H, W, 3]`` float64 of a depth map ``[H, W]`` (z), taken at the pixel centres."""
    pixels = pixel_centres((depth.shape[0], depth.shape[1]), depth.device)
    rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1) @ torch.linalg.inv(K.double()).T.to(pixels)
    return transform(world_from_cam.double(), rays * depth.double()[..., None])
