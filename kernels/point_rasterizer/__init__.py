"""Differentiable point rasterizer: K nearest points per pixel and their blending; rules and derivation in README.md.

NDC here: x to the left, y up, the shorter image side spans [-1, 1]; pixel (row r, column c) has its centre at pixel coordinates
(u, v) = (c + 0.5, r + 0.5), x = (W/2 - u) / s, y = (H/2 - v) / s with s = min(H, W) / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.kernels.point_rasterizer.spec import composite_op, rasterize_fragments_op, render_points_op

__all__ = ["composite", "pack_cameras", "rasterize_fragments", "render"]

_MODES = ("alpha", "norm")
_MAX_INDEX = 2**31 - 1


def rasterize_fragments(
    points_ndc: Tensor,  # [V, P, 3]
    image_size: tuple[int, int],
    radius: float,
    points_per_pixel: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the nearest points of every pixel.

    A point with 0 <= depth < inf hits a pixel iff its squared NDC distance from the pixel's centre is less than ``radius**2``.
    The ``points_per_pixel`` hits that come first by (depth, index) are kept, in that order.

    Args:
        points_ndc: ``[V, P, 3]`` float32 or float64: NDC x, NDC y, view depth.
        image_size: (H, W) in pixels.
        radius: disc radius in NDC units.
        points_per_pixel: K, slots per pixel.

    Returns:
        ``idx`` int32, ``zbuf``, ``dists2`` (NDC units squared), each ``[V, H, W, K]``; -1 in empty slots. ``idx`` counts through
        the views: point p of view v is v * P + p. Gradients flow from ``zbuf`` and ``dists2`` to ``points_ndc``.

    Raises:
        ValueError: wrong shape, dtype, radius or number of slots.
    """
    if points_ndc.ndim != 3 or points_ndc.shape[-1] != 3:
        raise ValueError(f"points_ndc must have shape [V, P, 3], got {list(points_ndc.shape)}")
    _check_float("points_ndc", points_ndc)
    height, width = _check_raster(image_size, radius, points_per_pixel, points_ndc.shape[0], points_ndc.shape[1])
    zbuf, dists2, idx = rasterize_fragments_op(points_ndc.contiguous(), height, width, float(radius), int(points_per_pixel))
    return idx, zbuf, dists2


def composite(
    idx: Tensor,  # [V, H, W, K] int32
    dists2: Tensor,  # [V, H, W, K]
    features: Tensor,  # [R, C]
    radius: float,
    mode: str = "alpha",
    background: Tensor | None = None,  # [C]
) -> Tensor:
    """Blends the features of the fragments of every pixel, with weights ``w = 1 - dists2 / radius**2``.

    ``alpha``: sum of w_k T_k f_k with T_k the product of 1 - w_j over nearer slots. ``norm``: sum of w_k f_k / max(sum w, 1e-4).
    Where the first slot is empty the result is ``background`` (0 without one).

    Args:
        idx, dists2: ``[V, H, W, K]`` from :func:`rasterize_fragments`.
        features: ``[R, C]``; slot index i uses row i mod R, so both ``[P, C]`` (shared by the views) and ``[V * P, C]`` work.
        radius: disc radius in NDC units.
        mode: ``"alpha"`` or ``"norm"``.
        background: ``[C]``, or ``[C - 1]`` to which a 1 is appended.

    Returns:
        image ``[V, H, W, C]``, differentiable in ``dists2`` and ``features``.

    Raises:
        ValueError: wrong shape, dtype, mode or radius.
    """
    if idx.ndim != 4 or idx.dtype != torch.int32:
        raise ValueError(f"idx must be int32 of shape [V, H, W, K], got {idx.dtype} {list(idx.shape)}")
    if dists2.shape != idx.shape:
        raise ValueError(f"dists2 must have the shape of idx, {list(idx.shape)}, got {list(dists2.shape)}")
    _check_features(features)
    _check_float("dists2", dists2, features.dtype)
    _check_mode(mode)
    _check_radius(radius)
    background = _background(background, features)
    return composite_op(idx.contiguous(), dists2.contiguous(), features.contiguous(), float(radius), mode, background)


def render(
    points: Tensor,  # [P, 3]
    features: Tensor,  # [P, C]
    cameras: Tensor,  # [V, 16]
    image_size: tuple[int, int],
    radius: float,
    points_per_pixel: int,
    mode: str = "alpha",
    background: Tensor | None = None,  # [C]
) -> tuple[Tensor, Tensor]:
    """Projects, rasterizes and blends in one operator; the cloud is shared by all views.

    Args:
        points: ``[P, 3]`` float32 or float64, world units.
        features: ``[P, C]`` of the same dtype.
        cameras: ``[V, 16]`` of the same dtype, from :func:`pack_cameras`; they receive no gradient.
        image_size, radius, points_per_pixel: as in :func:`rasterize_fragments`.
        mode, background: as in :func:`composite`.

    Returns:
        image ``[V, H, W, C]`` and depth ``[V, H, W]`` of the nearest point (0 where nothing was hit). Both are differentiable in
        ``points`` and the image in ``features``. Points with depth 0, NaN or Inf hit nothing and get gradient 0.

    Raises:
        ValueError: wrong shape, dtype, mode, radius or number of slots.
    """
    if points.ndim != 2 or points.shape[-1] != 3:
        raise ValueError(f"points must have shape [P, 3], got {list(points.shape)}")
    _check_float("points", points)
    _check_features(features)
    if len(features) != len(points):
        raise ValueError(f"features must have shape [{len(points)}, C] like points, got {list(features.shape)}")
    if cameras.ndim != 2 or cameras.shape[1] != 16:
        raise ValueError(f"cameras must have shape [V, 16] (see pack_cameras), got {list(cameras.shape)}")
    _check_float("features", features, points.dtype)
    _check_float("cameras", cameras, points.dtype)
    _check_mode(mode)
    height, width = _check_raster(image_size, radius, points_per_pixel, len(cameras), len(points))
    background = _background(background, features)
    keep = torch.is_grad_enabled() and (points.requires_grad or features.requires_grad)
    image, depth, _ = render_points_op(
        points.contiguous(),
        features.contiguous(),
        cameras.detach().contiguous(),
        height,
        width,
        float(radius),
        int(points_per_pixel),
        mode,
        background,
        keep,
    )
    return image, depth


def pack_cameras(
    world_from_cam: Tensor,  # [V, 4, 4]
    K: Tensor,  # [V, 3, 3]
    image_size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cameras as the rasterizer wants them.

    Row v holds the rotation of cam_from_world (9, row by row), its translation (3) and sx, ox, sy, oy such that, in OpenCV camera
    axes, x_ndc = ox + sx * (X / Z) and y_ndc = oy + sy * (Y / Z). Computed in float64, then rounded once to ``dtype``.

    Args:
        world_from_cam: ``[V, 4, 4]`` rigid, OpenCV axes.
        K: ``[V, 3, 3]`` in pixels of an image of ``image_size``, pixel centres at +0.5.
        image_size: (H, W) in pixels.

    Returns:
        ``[V, 16]`` of ``dtype`` on the device of ``world_from_cam``.
    """
    height, width = image_size
    s = min(height, width) / 2
    pose, k = world_from_cam.detach().double(), K.detach().double()
    rot = pose[:, :3, :3].mT
    t = -(rot @ pose[:, :3, 3:]).squeeze(-1)
    lens = [-k[:, 0, 0] / s, (width / 2 - k[:, 0, 2]) / s, -k[:, 1, 1] / s, (height / 2 - k[:, 1, 2]) / s]
    return torch.cat([rot.reshape(-1, 9), t, torch.stack(lens, dim=-1)], dim=-1).to(dtype)


def _check_float(name: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
    if x.dtype not in (torch.float32, torch.float64) or (dtype is not None and x.dtype != dtype):
        raise ValueError(f"{name} must be {dtype or 'float32 or float64'}, got {x.dtype}")


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"features must have shape [P, C] with C >= 1, got {list(features.shape)}")
    _check_float("features", features)


def _check_mode(mode: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"compositor must be one of {_MODES}, got {mode!r}")


def _check_radius(radius: float) -> None:
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius must be positive and finite (NDC units), got {radius}")


def _check_raster(image_size: tuple[int, int], radius: float, k: int, views: int, points: int) -> tuple[int, int]:
    _check_radius(radius)
    height, width = (int(n) for n in image_size)
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be (H, W) with both at least 1, got {tuple(image_size)}")
    if k < 1:
        raise ValueError(f"points_per_pixel must be at least 1, got {k}")
    if views < 1:
        raise ValueError("at least one view is needed, got V = 0")
    if views * points > _MAX_INDEX:
        raise ValueError(f"V * P must be below 2**31 for int32 indices, got {views} * {points}; render fewer views at a time")
    return height, width


def _background(background: Tensor | None, features: Tensor) -> Tensor | None:
    if background is None:
        return None
    channels = features.shape[1]
    colour = torch.as_tensor(background, dtype=features.dtype, device=features.device).detach()
    if colour.ndim == 1 and len(colour) == channels - 1:
        colour = torch.cat([colour, colour.new_ones(1)])
    if tuple(colour.shape) != (channels,):
        raise ValueError(f"background must have shape [{channels}] or [{channels - 1}], got {list(colour.shape)}")
    return colour.contiguous()
