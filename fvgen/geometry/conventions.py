"""Camera-frame conversions. The only file that knows any convention besides the package's own.

Inside: ``world_from_cam`` 4x4 with OpenCV axes (x right, y down, z forward), intrinsics in pixels with pixel centres at +0.5.
All functions accept leading batch dimensions and keep the dtype of their input.
"""

from __future__ import annotations

import torch
from torch import Tensor


def opencv_from_opengl(world_from_cam: Tensor) -> Tensor:
    """``[..., 4, 4]`` camera-to-world with OpenGL axes (x right, y up, z backward) to OpenCV axes. Its own inverse."""
    return world_from_cam * world_from_cam.new_tensor([1.0, -1.0, -1.0, 1.0])


def opengl_from_opencv(world_from_cam: Tensor) -> Tensor:
    """``[..., 4, 4]`` camera-to-world with OpenCV axes to OpenGL axes (x right, y up, z backward)."""
    return opencv_from_opengl(world_from_cam)


def rotation_from_quaternion(wxyz: Tensor) -> Tensor:
    """``[..., 4]`` quaternion (w, x, y, z; any length but zero) to ``[..., 3, 3]``."""
    w, x, y, z = (wxyz / wxyz.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], dim=-1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], dim=-1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=-1),
    )
    return torch.stack(rows, dim=-2)


def rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """``[..., 3, 3]`` and ``[..., 3]`` to ``[..., 4, 4]``."""
    top = torch.cat([rotation, translation.unsqueeze(-1)], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


def invert_rigid(pose: Tensor) -> Tensor:
    """Inverse of a rigid ``[..., 4, 4]``, exact in the rotation."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    return rigid(rotation, -(rotation @ pose[..., :3, 3:]).squeeze(-1))


def world_from_cam_of_colmap(wxyz: Tensor, translation: Tensor) -> Tensor:
    """COLMAP image pose (camera-from-world quaternion ``[..., 4]``, translation ``[..., 3]``) to ``world_from_cam``."""
    return invert_rigid(rigid(rotation_from_quaternion(wxyz), translation))


def pytorch3d_from_opencv(world_from_cam: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch3D ``(R [..., 3, 3], T [..., 3])`` with ``X_cam = X_world @ R + T`` and axes x left, y up, z forward."""
    flipped = world_from_cam * world_from_cam.new_tensor([-1.0, -1.0, 1.0, 1.0])
    cam_from_world = torch.linalg.inv(flipped)
    return cam_from_world[..., :3, :3].transpose(-1, -2), cam_from_world[..., :3, 3]


def opencv_from_pytorch3d(rotation: Tensor, translation: Tensor) -> Tensor:
    """Inverse of :func:`pytorch3d_from_opencv`: ``world_from_cam [..., 4, 4]``."""
    world_from_cam = torch.linalg.inv(rigid(rotation.transpose(-1, -2), translation))
    return world_from_cam * world_from_cam.new_tensor([-1.0, -1.0, 1.0, 1.0])


def ndc_from_pixels(xy: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Pixels ``[..., 2]`` (x right, y down) to PyTorch3D NDC (x left, y up, the short side spans [-1, 1])."""
    height, width = image_size
    centre = xy.new_tensor([width / 2, height / 2])
    return (centre - xy) * (2.0 / min(height, width))
