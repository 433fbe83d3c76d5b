"""Turns true depth into what stereo and learned estimators deliver: noise, bleeding edges, holes, missing occlusions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.utils.hash_random import HashRandom


def backproject(depth: Tensor, K: Tensor, world_from_cam: Tensor) -> Tensor:
    """World points ``[B, H, W, 3]`` of depth maps ``[B, H, W]`` with intrinsics ``[B, 3, 3]`` and poses ``[B, 4, 4]``."""
    height, width = depth.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(height, device=depth.device) + 0.5, torch.arange(width, device=depth.device) + 0.5, indexing="ij"
    )
    x = (u - K[:, 0, 2, None, None]) / K[:, 0, 0, None, None] * depth
    y = (v - K[:, 1, 2, None, None]) / K[:, 1, 1, None, None] * depth
    points = torch.stack([x, y, depth], -1).flatten(1, 2)
    points = points @ world_from_cam[:, :3, :3].transpose(-1, -2) + world_from_cam[:, None, :3, 3]
    return points.unflatten(1, (height, width))


def seen_by(points: Tensor, depth: Tensor, K: Tensor, world_from_cam: Tensor, tolerance: float = 0.03) -> Tensor:
    """Which of ``points [B, H, W, 3]`` another camera with depth map ``[B, H, W]`` sees unoccluded, ``[B, H, W]`` bool."""
    height, width = depth.shape[-2:]
    in_camera = (points.flatten(1, 2) - world_from_cam[:, None, :3, 3]) @ world_from_cam[:, :3, :3]
    z = in_camera[..., 2].clamp_min(1e-3)
    u = (in_camera[..., 0] / z * K[:, 0, 0, None] + K[:, 0, 2, None]).floor().long()
    v = (in_camera[..., 1] / z * K[:, 1, 1, None] + K[:, 1, 2, None]).floor().long()
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height) & (in_camera[..., 2] > 1e-3)
    found = depth.flatten(1).gather(1, v.clamp(0, height - 1) * width + u.clamp(0, width - 1))
    return (inside & ((z - found).abs() < tolerance * found)).unflatten(1, (height, width))


def _smooth_noise(random: HashRandom, size: tuple[int, int], cell: int) -> Tensor:
    """Normal noise ``[B, H, W]`` that varies over about ``cell`` pixels."""
    coarse = random.normal(1, size[0] // cell + 2, size[1] // cell + 2)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[:, 0]


def imperfect_depth(random: HashRandom, depth: Tensor, rgb: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Degrades depth maps.

    Args:
        random: draws one strength of each fault per map.
        depth: ``[B, H, W]`` true depth.
        rgb: ``[B, 3, H, W]`` the photo; holes prefer its flat regions, as they do in stereo.
        visible: ``[B, H, W]`` bool, what the other photo sees too.

    Returns:
        degraded depth and validity, both ``[B, H, W]``.
    """
    size = depth.shape[-2:]

    def strength(low: float, high: float) -> Tensor:
        return random.uniform(1, 1, low=low, high=high)

    sigma = 10.0 ** strength(-3.2, -2.0)
    noise = 0.8 * _smooth_noise(random, size, 24) + 0.6 * _smooth_noise(random, size, 5) + 0.4 * random.normal(*size)
    noisy = depth * (1 + sigma * noise)

    far = F.max_pool2d(noisy[:, None], 5, 1, 2)[:, 0]
    near = -F.max_pool2d(-noisy[:, None], 5, 1, 2)[:, 0]
    mix = _smooth_noise(random, size, 4)
    bleeds = (far > 1.06 * near) & (mix.abs() > 0.6) & (strength(0, 1) < 0.6)
    noisy = torch.where(bleeds, torch.where(mix > 0, near, far), noisy)

    grey = rgb.mean(1, keepdim=True)
    slope = (grey[..., 1:] - grey[..., :-1]).abs()
    texture = F.avg_pool2d(F.pad(slope, (0, 1)), 9, 1, 4)[:, 0]
    score = 0.5 * torch.log(texture + 2e-3) + 0.8 * _smooth_noise(random, size, 32) + 0.4 * _smooth_noise(random, size, 8)
    order = score.flatten(1).argsort(1)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places).view_as(score) / score[0].numel()
    valid = rank >= strength(-0.1, 0.45)
    specks = F.max_pool2d((random.uniform(*size) < strength(0.0, 0.004)).float()[:, None], 3, 1, 1)[:, 0] > 0
    valid = valid & ~specks & (visible | (strength(0, 1) < 0.15))
    eroded = F.max_pool2d((~valid).float()[:, None], 5, 1, 2)[:, 0] == 0
    return noisy, torch.where(strength(0, 1) < 0.6, eroded, valid)
