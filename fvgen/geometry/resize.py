"""Resampling and cropping that change the intrinsics together with the pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fvgen.types import Cameras, ImageSet


def resample(rgb: Tensor, size: tuple[int, int]) -> Tensor:
    """``[V, C, H, W]`` float to ``size`` (H, W): box-area average where it shrinks, cubic where it grows, clamped to [0, 1]."""
    import cv2

    if tuple(rgb.shape[2:]) == tuple(size):
        return rgb
    shrinks = size[0] <= rgb.shape[2] and size[1] <= rgb.shape[3]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    frames = [cv2.resize(f.permute(1, 2, 0).contiguous().numpy(), (size[1], size[0]), interpolation=method) for f in rgb]
    stacked = np.stack([f if f.ndim == 3 else f[..., None] for f in frames])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).clamp(0, 1).contiguous()


def scale_K(K: Tensor, scale_x: float, scale_y: float, shift_x: float = 0.0, shift_y: float = 0.0) -> Tensor:
    """Intrinsics ``[..., 3, 3]`` after ``x' = scale_x * x + shift_x`` (pixel centres at +0.5, so a resize has no shift)."""
    affine = K.new_tensor([[scale_x, 0.0, shift_x], [0.0, scale_y, shift_y], [0.0, 0.0, 1.0]])
    return affine @ K


def resize(images: ImageSet, cameras: Cameras | None, size: tuple[int, int]) -> tuple[ImageSet, Cameras | None]:
    """Resample to exactly ``size`` (H, W); the aspect may change by a rounding."""
    height, width = images.size
    sy, sx = size[0] / height, size[1] / width
    focal = tuple(None if f is None else f * (sx * sy) ** 0.5 for f in images.focal_px)
    resized = replace(images, rgb=resample(images.rgb, size), focal_px=focal)
    return resized, None if cameras is None else scale_cameras(cameras, size)


def scale_cameras(cameras: Cameras, size: tuple[int, int]) -> Cameras:
    """The same cameras for images resampled to ``size`` (H, W)."""
    sy, sx = size[0] / cameras.image_size[0], size[1] / cameras.image_size[1]
    return replace(cameras, K=scale_K(cameras.K, sx, sy), image_size=size)


def limit_long_side(images: ImageSet, cameras: Cameras | None, long_side: int) -> tuple[ImageSet, Cameras | None]:
    """Shrink so that the longer side is at most ``long_side``; smaller photos are returned as they are."""
    height, width = images.size
    if max(height, width) <= long_side:
        return images, cameras
    scale = long_side / max(height, width)
    return resize(images, cameras, (max(1, round(height * scale)), max(1, round(width * scale))))


def fit(images: ImageSet, cameras: Cameras | None, size: tuple[int, int]) -> tuple[ImageSet, Cameras | None]:
    """Scale to cover ``size`` (H, W), then cut the centre. A point keeps projecting onto the same content."""
    cover, top, left = _cover(images.size, size)
    covering, _ = resize(images, None, cover)
    cropped = replace(covering, rgb=covering.rgb[:, :, top : top + size[0], left : left + size[1]].contiguous())
    return cropped, None if cameras is None else fit_cameras(cameras, size)


def fit_cameras(cameras: Cameras, size: tuple[int, int]) -> Cameras:
    """The cameras of images that went through :func:`fit`."""
    cover, top, left = _cover(cameras.image_size, size)
    sy, sx = cover[0] / cameras.image_size[0], cover[1] / cameras.image_size[1]
    return replace(cameras, K=scale_K(cameras.K, sx, sy, -left, -top), image_size=size)


def _cover(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
    """The covering size and the corner (top, left) of the centred cut."""
    scale = max(size[0] / image_size[0], size[1] / image_size[1])
    cover = (max(size[0], round(image_size[0] * scale)), max(size[1], round(image_size[1] * scale)))
    return cover, (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
