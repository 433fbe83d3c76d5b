"""Rotations and rigid motions along a path. Computed in float64, returned in the dtype that was given."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.geometry.conventions import rigid


def hat(v: Tensor) -> Tensor:
    """``[..., 3]`` to the skew matrices ``[..., 3, 3]`` of the cross product."""
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([torch.stack([o, -z, y], -1), torch.stack([z, o, -x], -1), torch.stack([-y, x, o], -1)], dim=-2)


def so3_exp(w: Tensor) -> Tensor:
    """Rotation vectors ``[..., 3]`` (axis times angle in radians) to rotations ``[..., 3, 3]``."""
    return torch.linalg.matrix_exp(hat(w.double())).to(w.dtype)


def so3_log(R: Tensor) -> Tensor:
    """Rotations ``[..., 3, 3]`` to rotation vectors ``[..., 3]`` with an angle in [0, pi]."""
    from scipy.spatial.transform import Rotation

    flat = R.detach().double().reshape(-1, 3, 3).cpu().numpy()
    return torch.from_numpy(Rotation.from_matrix(flat).as_rotvec()).reshape(*R.shape[:-2], 3).to(R)


def interpolate_straight(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Poses ``[T, 4, 4]``: centres on the straight line, rotation about one axis at constant speed."""
    start, end, at = a.double(), b.double(), t.double()[:, None]
    turn = so3_log(start[:3, :3].T @ end[:3, :3])
    return rigid(start[:3, :3] @ so3_exp(at * turn), start[:3, 3] + at * (end[:3, 3] - start[:3, 3])).to(a.dtype)


def spline(poses: Tensor, t: Tensor) -> Tensor:
    """Poses ``[T, 4, 4]`` at ``t [T]`` in [0, N - 1] on a twice differentiable path through ``[N, 4, 4]`` poses at 0, 1, ...

    Centres follow a natural cubic spline, rotations a spline of continuous angular acceleration. Two poses: straight line,
    constant speeds.
    """
    from scipy.interpolate import CubicSpline
    from scipy.spatial.transform import Rotation, RotationSpline

    keys = poses.detach().double().cpu().numpy()
    at = t.detach().double().cpu().numpy()
    knots = list(range(len(keys)))
    centres = CubicSpline(knots, keys[:, :3, 3], bc_type="natural")(at)
    rotations = RotationSpline(knots, Rotation.from_matrix(keys[:, :3, :3]))(at).as_matrix()
    return rigid(torch.from_numpy(rotations), torch.from_numpy(centres)).to(poses)
