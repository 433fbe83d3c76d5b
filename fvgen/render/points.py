"""Differentiable rendering of coloured point clouds from OpenCV cameras.

The rule is that of PyTorch3D's point renderer as ViewCrafter (https://arxiv.org/abs/2409.02048) uses it: every point is a disc of
``radius`` NDC units (one unit = half of the shorter image side), the ``points_per_pixel`` nearest discs over a pixel's centre are
blended with weights 1 - (distance / radius)^2.

Pixel centres. With ``pixel_center="half"``, pixel (row r, column c) shows what projects to (u, v) = (c + 0.5, r + 0.5): a point
unprojected from a pixel's centre comes back to that centre. DUSt3R, and so ViewCrafter, unprojects the integers (u, v) = (c, r)
with the principal point at (W/2, H/2) but renders with the first rule, which shifts its renders by half a pixel to the top left.
``pixel_center="integer"`` repeats that for cameras in FVGen's convention: u and v are reduced by 0.5 before rendering.
(Intrinsics that already count pixel centres as integers, as in DUSt3R's own files, give the same image with ``"half"``.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvgen.kernels import point_rasterizer
from fvgen.types import Cameras, RenderClip

_SHIFT = {"half": 0.0, "integer": 0.5}


def render_points(
    points: Tensor,  # [P, 3]
    features: Tensor,  # [P, C]
    world_from_cam: Tensor,  # [V, 4, 4]
    K: Tensor,  # [V, 3, 3]
    image_size: tuple[int, int],
    *,
    radius: float = 0.01,
    points_per_pixel: int = 10,
    compositor: str = "alpha",
    background: Tensor | Sequence[float] | None = None,
    pixel_center: str = "half",
) -> Tensor:
    """Renders one cloud from several cameras.

    Args:
        points: ``[P, 3]`` float32 (or float64 on the slower path), world units. P may be 0. Points with NaN, Inf or depth 0 are
            never seen and get gradient 0.
        features: ``[P, C]`` of the same dtype and device, for example RGB.
        world_from_cam: ``[V, 4, 4]`` rigid poses, OpenCV axes (x right, y down, z forward), world units. No gradient.
        K: ``[V, 3, 3]`` intrinsics in pixels of an image of ``image_size``, pixel centres at +0.5. No gradient.
        image_size: (H, W) in pixels.
        radius: disc radius in NDC units; 0.01 is 0.01 * min(H, W) / 2 pixels.
        points_per_pixel: how many of the nearest points are blended (at most 64 on the fast path).
        compositor: ``"alpha"`` (front to back) or ``"norm"`` (normalised weights).
        background: colour ``[C]`` of pixels that no point covers, or ``[C - 1]`` with 1 appended; 0 if None.
        pixel_center: ``"half"``, or ``"integer"`` to repeat ViewCrafter's half-pixel shift (see the module's docstring).

    Cameras may lie on the CPU beside a cloud on the GPU. Cameras on the GPU are checked there, which waits for the GPU, except
    while a CUDA graph is captured.

    Returns:
        ``[V, H, W, C]`` images, differentiable in ``points`` and ``features``.

    Raises:
        ValueError: wrong shapes or dtypes, poses that are not finite or not rigid, unknown options.
    """
    cameras = _packed(points, world_from_cam, K, image_size, pixel_center)
    colour = None if background is None else torch.as_tensor(background)
    return point_rasterizer.render(points, features, cameras, image_size, radius, points_per_pixel, compositor, colour)[0]


def render_scene(
    points: Tensor,  # [P, 3]
    rgb: Tensor,  # [P, 3]
    cameras: Cameras,
    *,
    radius: float = 0.01,
    points_per_pixel: int = 10,
    compositor: str = "alpha",
    pixel_center: str = "half",
) -> RenderClip:
    """Renders a coloured cloud along a camera path.

    Args:
        points: ``[P, 3]`` float32, world units.
        rgb: ``[P, 3]`` float32 in [0, 1].
        cameras: the T target cameras, OpenCV axes.
        radius, points_per_pixel, compositor, pixel_center: as in :func:`render_points`.

    Returns:
        a :class:`RenderClip`; ``depth`` is that of the nearest point.

    Raises:
        ValueError: as in :func:`render_points`.
    """
    if rgb.ndim != 2 or rgb.shape[1] != 3:
        raise ValueError(f"rgb must have shape [P, 3], got {list(rgb.shape)}")
    packed = _packed(points, cameras.world_from_cam, cameras.K, cameras.image_size, pixel_center)
    image, depth = point_rasterizer.render(points, rgb, packed, cameras.image_size, radius, points_per_pixel, compositor)
    return RenderClip(rgb=image.permute(0, 3, 1, 2).contiguous(), depth=depth, coverage=depth > 0, cameras=cameras)


def _packed(points: Tensor, world_from_cam: Tensor, K: Tensor, image_size: tuple[int, int], pixel_center: str) -> Tensor:
    if world_from_cam.ndim != 3 or world_from_cam.shape[1:] != (4, 4):
        raise ValueError(f"world_from_cam must have shape [V, 4, 4], got {list(world_from_cam.shape)}")
    if tuple(K.shape) != (len(world_from_cam), 3, 3):
        raise ValueError(f"K must have shape [{len(world_from_cam)}, 3, 3], got {list(K.shape)}")
    for name, x in (("world_from_cam", world_from_cam), ("K", K)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be float32 or float64, got {x.dtype}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, but cameras are constants here; pass {name}.detach()")
    if pixel_center not in _SHIFT:
        raise ValueError(f'pixel_center must be "half" or "integer", got {pixel_center!r}')
    if not (world_from_cam.is_cuda and torch.cuda.is_current_stream_capturing()):
        _check_values(world_from_cam, K)
    shift = torch.zeros(3, 3, dtype=torch.float64)
    shift[:2, 2] = _SHIFT[pixel_center]
    K = K.double() - shift.to(K.device) if pixel_center != "half" else K
    return point_rasterizer.pack_cameras(world_from_cam, K, image_size, points.dtype).to(points.device)


def _check_values(world_from_cam: Tensor, K: Tensor) -> None:
    pose = world_from_cam.detach().double()
    rot = pose[:, :3, :3]
    eye = torch.eye(3, dtype=torch.float64, device=pose.device)
    bottom = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64, device=pose.device)
    finite = torch.stack([pose.flatten(1).isfinite().all(1), K.flatten(1).isfinite().all(1)])
    rigid = ((rot @ rot.mT - eye).abs().amax((1, 2)) < 1e-3) & ((pose[:, 3] - bottom).abs().amax(1) < 1e-6)
    plain = (K[:, 0, 1] == 0) & (K[:, 1, 0] == 0) & (K[:, 2] == bottom[1:].to(K)).all(1)
    ok = torch.stack([*finite, rigid, plain]).tolist()
    messages = (
        "world_from_cam has NaN or Inf in view(s) {}; every [4, 4] pose must be finite",
        "K has NaN or Inf in view(s) {}; every [3, 3] matrix must be finite",
        "world_from_cam must be rigid [[R, t], [0, 0, 0, 1]] with orthonormal R; not so in view(s) {}",
        "K must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]; not so in view(s) {}",
    )
    for flags, message in zip(ok, messages, strict=True):
        if not all(flags):
            raise ValueError(message.format([v for v, flag in enumerate(flags) if not flag]))
