"""A clip with known cameras to a training pair: a cloud of its two end frames, rendered along the path; the truth is the clip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.data.clips import Clip, ClipPhotos, Rejected, clip_poses, load_clip
from fvgen.data.layouts.capture import LONG_SIDE, Capture
from fvgen.data.synthetic.depth import backproject
from fvgen.estimators import Estimator
from fvgen.geometry import estimate_scene
from fvgen.geometry.estimate import METHODS
from fvgen.geometry.resize import fit, limit_long_side
from fvgen.render import put_photos, render_scene
from fvgen.types import Cameras, GeometryQuality, ImageSet, RenderClip, Scene

GEOMETRY = ("auto", "depth", *METHODS, "dust3r")
_PIXELS_PER_PART = 2**25, 2**17  # rendered at once on a GPU and on the CPU, which bounds memory


@dataclass(frozen=True)
class Limits:
    """What a clip must reach to be kept.

    Attributes:
        min_coverage: share of pixels, over the frames between the ends, that a point covers.
        min_psnr: dB of the renders against the true frames on those pixels; less means wrong geometry or a moving scene.
        min_angle: degrees between the views of the two end cameras onto a point, median over the cloud.
        max_jump: longest step of the camera between neighbouring frames, in median steps of the clip.
    """

    min_coverage: float = 0.2
    min_psnr: float = 12.0
    min_angle: float = 1.0
    max_jump: float = 8.0


@dataclass(frozen=True)
class Pair:
    """A clip and its renders.

    Attributes:
        truth: ``[T, 3, H, W]`` the photos at the size of the clip.
        renders: ``T`` point renders along the true cameras, with the photos themselves at both ends.
        facts: ``coverage``, ``psnr_covered`` (dB) and ``angle_deg`` as in :class:`Limits`, ``geometry``.
    """

    truth: Tensor
    renders: RenderClip
    facts: dict[str, Any]


def build_pair(
    capture: Capture,
    clip: Clip,
    frames: int,
    size: tuple[int, int],
    compositor: str = "norm",
    geometry: str = "auto",
    limits: Limits | None = None,
    device: str | torch.device = "cpu",
    estimator: Estimator | None = None,
) -> Pair:
    """Photos, geometry and renders of one clip, as :mod:`fvgen.pipeline` makes them.

    Args:
        capture: the scene the clip is from.
        clip: which of its frames.
        frames: T.
        size: (H, W) in pixels; photos are scaled to cover it and cut around the centre, the intrinsics with them.
        compositor: how points are blended, as the model wants it.
        geometry: one of ``GEOMETRY``: "depth" (of the two end frames, from files), a method of
            :func:`fvgen.geometry.estimate_scene`, "dust3r", or "auto": depth where there is some, otherwise DUSt3R where it is
            given, otherwise "stereo".
        limits: what to reject; None takes the defaults.
        device: where points are rendered.
        estimator: DUSt3R, see :class:`fvgen.estimators.Dust3rEstimator`.

    Raises:
        Rejected: the clip cannot be used.
    """
    limits = limits or Limits()
    which = clip.frames(frames)
    _check_path(clip_poses(capture, which)[:, :3, 3], limits)
    photos = load_clip(capture, which, with_depth=geometry in ("auto", "depth"))
    scene = _scene(photos, geometry, estimator)
    points, rgb = scene.cloud()
    angle = _median_angle(points, scene.cameras)
    if not angle >= limits.min_angle:
        raise Rejected("no parallax", f"the end frames see the points {angle:.2f} degrees apart")
    fitted, path = fit(photos.images, photos.cameras, size)
    assert path is not None
    renders = put_photos(_render(points, rgb, path, compositor, torch.device(device)), fitted.rgb[[0, -1]], [0, frames - 1])
    coverage, psnr = _agreement(fitted.rgb, renders)
    if coverage < limits.min_coverage:
        raise Rejected("too little coverage", f"points cover {coverage:.1%} of the frames between the ends")
    if psnr < limits.min_psnr:
        raise Rejected("renders unlike the photos", f"{psnr:.1f} dB on the covered pixels")
    facts = {"coverage": coverage, "psnr_covered": psnr, "angle_deg": angle}
    return Pair(fitted.rgb, renders, {k: round(v, 4) for k, v in facts.items()} | {"geometry": scene.quality.estimator})


def _check_path(centres: Tensor, limits: Limits) -> None:
    """Of camera centres ``[T, 3]`` float64, before any pixel is read."""
    steps = (centres[1:] - centres[:-1]).norm(dim=1)
    if float((centres[-1] - centres[0]).norm()) <= 1e-9 * max(1.0, float(centres.abs().max())):
        raise Rejected("no parallax", "the first and last frame were taken from one place")
    median = float(steps.median())
    if float(steps.max()) > limits.max_jump * median:
        at, longest = int(steps.argmax()), float(steps.max())
        raise Rejected("camera jumps", f"from frame {at} to {at + 1} of the clip by {longest:.3g}, median {median:.3g}")


def _scene(photos: ClipPhotos, geometry: str, estimator: Estimator | None) -> Scene:
    images = ImageSet(photos.images.rgb[[0, -1]], (photos.images.names[0], photos.images.names[-1]), (None, None))
    cameras = photos.cameras[[0, -1]]
    if photos.depth is not None:
        return _scene_of_depth(images, cameras, photos.depth)
    if geometry == "depth":
        raise Rejected("no depth", "the first or last frame has no depth map")
    try:
        if estimator is not None and geometry in ("auto", "dust3r"):
            return estimator(images, cameras)
        return estimate_scene(images, cameras, method="stereo" if geometry == "auto" else geometry)
    except (ValueError, np.linalg.LinAlgError, cv2.error) as error:
        raise Rejected("geometry failed", str(error)) from None


def _scene_of_depth(images: ImageSet, cameras: Cameras, depth: Tensor) -> Scene:
    work, work_cameras = limit_long_side(images, cameras, LONG_SIDE)
    assert work_cameras is not None
    z = F.interpolate(depth[:, None].double(), size=work.size, mode="nearest-exact")[:, 0]
    points = backproject(z, work_cameras.K.double(), work_cameras.world_from_cam.double()).float()
    confidence = (z > 0).float()
    if not bool(confidence.any((1, 2)).all()):
        raise Rejected("no depth", "the depth map of the first or last frame is empty")
    coverage = tuple(confidence.mean((1, 2)).tolist())
    return Scene(work, work_cameras, points, confidence, GeometryQuality("depth, given cameras", coverage=coverage))


def _median_angle(points: Tensor, cameras: Cameras) -> float:
    """Degrees between the rays of the two cameras to ``points [P, 3]``, median; NaN without points."""
    if not len(points):
        return math.nan
    first, last = (F.normalize(points.double() - c, dim=1) for c in cameras.world_from_cam[:, :3, 3].double())
    half_chord = (first - last).norm(dim=1) / 2
    return math.degrees(2 * math.asin(min(1.0, float(half_chord.median()))))


def _render(points: Tensor, rgb: Tensor, path: Cameras, compositor: str, device: torch.device) -> RenderClip:
    height, width = path.image_size
    each = max(1, _PIXELS_PER_PART[device.type == "cpu"] // (height * width))
    cloud = points.to(device), rgb.to(device)
    parts = [render_scene(*cloud, path[i : i + each].to(str(device)), compositor=compositor) for i in range(0, len(path), each)]
    joined = {name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("rgb", "depth", "coverage")}
    return RenderClip(**joined, cameras=path)


def _agreement(truth: Tensor, renders: RenderClip) -> tuple[float, float]:
    """Mean coverage of the frames between the ends and PSNR of all their covered pixels together."""
    covered = renders.coverage[1:-1]
    squares = (truth[1:-1] - renders.rgb[1:-1]).double().square().mean(1)[covered]
    error = max(float(squares.mean()), 1e-10) if len(squares) else 1.0
    return float(covered.float().mean()), -10 * math.log10(error)
