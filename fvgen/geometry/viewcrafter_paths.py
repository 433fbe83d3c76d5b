"""Camera paths with the exact numbers of ViewCrafter's reference code, peculiarities included.

Re-implemented from its observed behaviour; tests/test_golden_trajectories.py compares the numbers. Poses are ``world_from_cam``
4x4 with OpenCV axes; angles are degrees. The renderer's camera is ``conventions.pytorch3d_from_opencv`` of a pose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fvgen.geometry.se3 import interpolate_straight

RASTER_RADIUS, RASTER_POINTS_PER_PIXEL, RASTER_SIZE = 0.01, 10, (288, 512)
ELEVATION_DEG = 5.0


def _turn(angle_deg: float, axis: int, like: Tensor) -> Tensor:
    """Right-handed 4x4 rotation about world x (0) or y (1)."""
    angle = math.radians(float(angle_deg))
    c, s = math.cos(angle), math.sin(angle)
    if axis == 0:
        rows = [[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]]
    else:
        rows = [[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]]
    return like.new_tensor(rows)


def _move(motion: Tensor, points: Tensor) -> Tensor:
    return points @ motion[:3, :3].T + motion[:3, 3]


def in_frame_of_pose(poses: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``world_point_to_kth``: poses ``[N, 4, 4]`` and points ``[..., 3]`` in the frame of pose ``k``."""
    kth_from_world = torch.linalg.inv(poses[k])
    return kth_from_world @ poses, _move(kth_from_world, points)


def in_object_frame(poses: Tensor, points: Tensor, k: int, r: float, elevation: float = ELEVATION_DEG) -> tuple[Tensor, Tensor]:
    """``world_point_to_obj``: a frame at distance ``r`` (world units) in front of pose ``k``, tilted by ``elevation`` degrees."""
    poses, points = in_frame_of_pose(poses, points, k)
    kth_from_object = _turn(-(180.0 - elevation), 0, poses)
    kth_from_object[2, 3] = r
    object_from_kth = torch.linalg.inv(kth_from_object)
    return object_from_kth @ poses, _move(object_from_kth, points)


def on_sphere(poses: Tensor, theta: float, phi: float, r: float, x: float | None = None, y: float | None = None) -> Tensor:
    """``sphere2pose``: shift ``[N, 4, 4]`` poses by (x, y, r) along the world axes, then turn about world x, then world y."""
    moved = poses.clone()
    moved[:, 2, 3] += r
    moved[:, 1, 3] += 0.0 if y is None else y
    moved[:, 0, 3] += 0.0 if x is None else x
    return _turn(phi, 1, poses) @ (_turn(theta, 0, poses) @ moved)


def _sphere_path(anchor: Tensor, thetas: Tensor, phis: Tensor, rs: Tensor, xs: Tensor | None, ys: Tensor | None) -> Tensor:
    poses = []
    for i in range(len(thetas)):
        shift = (None, None) if xs is None or ys is None else (float(xs[i]), float(ys[i]))
        poses.append(on_sphere(anchor, float(thetas[i]), float(phis[i]), float(rs[i]), *shift))
    return torch.cat(poses)


def specified_path(anchor: Tensor, theta: float, phi: float, d_r: float, d_x: float, d_y: float, frames: int) -> Tensor:
    """``generate_traj_specified``: ``frames`` poses from the anchor ``[1, 4, 4]`` to the target.

    ``d_r`` is a fraction of the anchor's z translation; ``d_x``, ``d_y`` are world units (the caller turns pixels into
    ``d * depth / focal``).
    """
    anchor_z = float(anchor[0, 2, 3])

    def ramp(end: float) -> Tensor:
        return torch.from_numpy(np.linspace(0.0, end, frames))

    return _sphere_path(anchor, ramp(theta), ramp(phi), ramp(d_r * anchor_z), ramp(d_x), ramp(d_y))


def resample_list(values: Sequence[float], n: int, mode: str) -> Tensor:
    """``txt_interpolation``: ``n`` float64 values from a short list; ``mode`` "linear" or "smooth".

    "smooth" is a cubic smoothing spline (SciPy's default smoothing) that does not pass through the values, not even at the ends.
    """
    from scipy.interpolate import UnivariateSpline

    given = np.asarray(values, dtype=np.float64)
    x, at = np.linspace(0, 1, len(given)), np.linspace(0, 1, n)
    if mode == "linear":
        return torch.from_numpy(np.interp(at, x, given))
    if mode != "smooth":
        raise ValueError(f"resample_list knows the modes linear and smooth, not {mode!r}")
    return torch.from_numpy(UnivariateSpline(x, given, k=3)(at))


def text_path(anchor: Tensor, phi: Sequence[float], theta: Sequence[float], r: Sequence[float], frames: int) -> Tensor:
    """``generate_traj_txt``: ``frames`` poses from the three lists of a trajectory file; ``r`` in fractions of the anchor's z.

    Lists with more than 3 values are smoothed, then their two ends put right, which leaves a jump beside them.
    """

    def sampled(values: Sequence[float]) -> Tensor:
        if len(values) <= 3:
            return resample_list(values, frames, "linear")
        smooth = resample_list(values, frames, "smooth")
        smooth[0], smooth[-1] = values[0], values[-1]
        return smooth

    return _sphere_path(anchor, sampled(theta), sampled(phi), sampled(r) * float(anchor[0, 2, 3]), None, None)


def interpolated_poses(poses: Tensor, n: int) -> Tensor:
    """``interp_traj``: ``(K - 1) * (n - 1) + 1`` float64 poses through ``[K, 4, 4]`` key poses.

    Steps are 1/n of a pair except the last, which is 2/n; position, a point behind and a point below are interpolated
    linearly and the axes rebuilt from them.
    """
    keys = poses.double()
    out = []
    for a, b in pairwise(keys):
        u = (torch.arange(n - 1, dtype=torch.float64) / n)[:, None]
        centre, back, down = (
            (1 - u) * f(a) + u * f(b)
            for f in (lambda p: p[:3, 3], lambda p: p[:3, 3] - 0.1 * p[:3, 2], lambda p: p[:3, 3] + 0.1 * p[:3, 1])
        )
        out.append(_look(centre, centre - back, down - centre))
    return torch.cat([*out, keys[-1:]])


def _look(centre: Tensor, forward: Tensor, down: Tensor) -> Tensor:
    z = torch.nn.functional.normalize(forward, dim=-1)
    x = torch.nn.functional.normalize(torch.linalg.cross(down, z), dim=-1)
    pose = torch.eye(4, dtype=centre.dtype).repeat(len(centre), 1, 1)
    pose[:, :3] = torch.stack([x, torch.linalg.cross(z, x), z, centre], dim=-1)
    return pose


def interpolated_sequence(values: Tensor, k: int) -> Tensor:
    """``interpolate_sequence``: per neighbouring pair ``linspace(0, 1, k + 1)``, ends included, then the last value once more."""
    t = torch.linspace(0, 1, k + 1, dtype=values.dtype)[:, None]
    rows = [a + t * (b - a) for a, b in pairwise(values)]
    return torch.cat([*rows, values[-1:]])


def interpolated_path(poses: Tensor, focals: Tensor, principal_points: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """``generate_traj_interp``: poses ``[T, 4, 4]`` float64, focals ``[T, 1]``, principal points ``[T, 2]``.

    The intrinsics reach a key value one frame before the pose does.
    """
    return interpolated_poses(poses, n), interpolated_sequence(focals, n - 2), interpolated_sequence(principal_points, n - 2)


def focus_path(poses: Tensor, n_inserts: int = 15) -> Tensor:
    """``generate_camera_path``: ``n_inserts`` poses between neighbouring key poses.

    Rotation at constant speed about one axis; the centre keeps a linearly changing distance to the pair's focus point, in the
    direction of the straight line between the two centres.
    """
    t = torch.arange(n_inserts + 1, dtype=poses.dtype) / (n_inserts + 1)
    out = []
    for a, b in pairwise(poses):
        path = interpolate_straight(a, b, t)
        focus = focus_point(torch.stack([a, b]))
        arms = torch.stack([a[:3, 3], b[:3, 3]]) - focus
        length = torch.lerp(arms[0].norm(), arms[1].norm(), t)
        path[:, :3, 3] = focus + length[:, None] * torch.nn.functional.normalize(path[:, :3, 3] - focus, dim=-1)
        out.append(path)
    return torch.cat([*out, poses[-1:]])


def focus_point(poses: Tensor) -> Tensor:
    """The point ``[3]`` nearest to all optical axes of ``[N, 4, 4]`` poses, least squares."""
    direction, origin = poses[:, :3, 2:3], poses[:, :3, 3:]
    across = torch.eye(3, dtype=poses.dtype) - direction @ direction.transpose(1, 2)
    normal = across.transpose(1, 2) @ across
    return torch.linalg.solve(normal.mean(0), (normal @ origin).mean(0)).squeeze(-1)


def candidate_poses(anchor: Tensor, count: int, theta: float, phi: float) -> Tensor:
    """Next-best-view candidates ``[count, 4, 4]`` (2 or 3) around the anchor, radius unchanged."""
    thetas = (0.0, -theta, theta / 2)[:count]
    return torch.cat([on_sphere(anchor, t, phi, 0.0) for t in thetas])
