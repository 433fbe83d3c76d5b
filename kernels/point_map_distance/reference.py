"""Weighted distances of point maps from a photo's own points, and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

NO_DISTANCE = 1e-20  # below it the gradient fades out; its inverse times a weight stays finite


def _gradient(residual: Tensor, points: Tensor) -> Tensor:
    """Of motions (A | b) ``[..., 3, 4]``: sums over the pixels of residuals ``[..., 3, P]`` times (x, y, z, 1)."""
    columns = [(residual * points[..., k : k + 1, :]).sum(-1) for k in range(3)]
    return torch.stack([*columns, residual.sum(-1)], dim=-1)


def point_map_distance(
    depths: Tensor, rays: Tensor, cameras: Tensor, motions: Tensor, points: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = torch.cat([depths[:, None] * rays, depths[:, None]], dim=1)
    world = torch.baddbmm(cameras[..., 3:], cameras[..., :3], own)
    flat = motions.flatten(0, 1)
    residual = torch.baddbmm(flat[..., 3:], flat[..., :3], points.flatten(0, 1)).view_as(points)
    torch.sub(world[:, None], residual, out=residual)
    x, y, z = residual.unbind(2)
    distance = (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_()  # norm over a dimension in the middle is slow on CPUs
    loss = (distance * weights).sum()
    residual *= (weights / distance.clamp_min_(NO_DISTANCE))[:, :, None]
    of_world = residual.sum(1)
    of_own = cameras[..., :3].transpose(1, 2) @ of_world
    of_depths = (of_own[:, :2] * rays).sum(1) + of_own[:, 2]
    return loss, of_depths, _gradient(of_world, own), -_gradient(residual, points)
