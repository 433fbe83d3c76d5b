"""Photos, with or without cameras, to a :class:`~fvgen.types.Scene`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fvgen.geometry import features as ft
from fvgen.geometry.fuse import fuse
from fvgen.geometry.rectify import forwardness
from fvgen.geometry.resize import limit_long_side, scale_K
from fvgen.geometry.sfm import MIN_TRACKS, Motion, estimate_cameras, one_place, too_few
from fvgen.geometry.stereo import PointMap, stereo_pair
from fvgen.geometry.twoview import angles_deg
from fvgen.types import Cameras, GeometryQuality, ImageSet, Scene
from fvgen.utils.errors import UserError

Progress = Callable[[str, float], None]
METHODS = ("stereo",)
MATCH_LONG_SIDE = 800  # sparse matching sees more than dense matching
EPIPOLAR_PX = 2.0
FEW_TRACKS, WIDE_ANGLE_DEG, HIGH_ERROR_PX = 100, 45.0, 1.5
FORWARD = 0.9


@dataclass(frozen=True)
class PairMatches:
    """Sparse matches of two photos that fit their cameras.

    ``xy``: pixels ``[M, 2]`` of the working images; ``points [M, 3]`` world; mean reprojection error; median angle between the
    two rays of a point; angle between the viewing axes.
    """

    xy: tuple[np.ndarray, np.ndarray]
    points: np.ndarray
    error_px: float
    angle_deg: float
    view_angle_deg: float


def estimate_scene(
    images: ImageSet,
    cameras: Cameras | None = None,
    *,
    method: str = "stereo",
    fill: bool = False,
    long_side: int = 448,
    progress: Progress | None = None,
) -> Scene:
    """Dense point maps of two or more photos.

    Args:
        images: two or more photos; each overlaps with the next.
        cameras: their cameras at the same image size; estimated from the photos when left out. Estimated cameras have the first
            photo's camera as the world and the median depth of its sparse points as the unit.
        method: "stereo".
        fill: also fill holes by interpolating the sparse points; filled pixels have a confidence of at most 0.1.
        long_side: long side of the point maps, pixels; smaller photos are not enlarged.
        progress: called with (what is being done, fraction in [0, 1]).

    Returns:
        Scene whose images and cameras are at the working resolution.

    Raises:
        UserError: fewer than two photos, photos from one place, no overlap, cameras that do not fit, unknown method.
    """
    report = progress or (lambda _what, _fraction: None)
    if method not in METHODS:
        raise UserError(f"unknown geometry method {method!r}; known methods: {', '.join(METHODS)}")
    if len(images) < 2:
        raise UserError("geometry needs at least two overlapping photos; add a photo taken from another place")
    if images.whole:
        raise UserError("the photos differ in size; bring all photos to one size and orientation, or use DUSt3R")
    if cameras is not None and (len(cameras) != len(images) or tuple(cameras.image_size) != images.size):
        raise UserError("the cameras do not fit the photos in number or image size; give one camera per photo")
    sharp, _ = limit_long_side(images, None, max(MATCH_LONG_SIDE, long_side))
    work, work_cameras = limit_long_side(images, cameras, long_side)
    scale = np.array([work.size[1] / sharp.size[1], work.size[0] / sharp.size[0]])
    report("features", 0.0)
    found = [ft.detect(ft.to_bytes(rgb)) for rgb in sharp.rgb]
    motion: Motion | None = None
    if work_cameras is None:
        report("cameras", 0.2)
        motion = estimate_cameras(sharp, found)
        work_cameras = Cameras(scale_K(motion.cameras.K, *scale), motion.cameras.world_from_cam, work.size)
    K = work_cameras.K.double().numpy()
    poses = work_cameras.world_from_cam.double().numpy()
    photos = [ft.to_bytes(rgb) for rgb in work.rgb]
    count = len(images) - 1
    maps: list[list[PointMap]] = [[] for _ in photos]
    pairs = []
    for i in range(count):
        report("stereo", 0.5 + 0.5 * i / count)
        two = slice(i, i + 2)
        pair = match_pair(found[two], scale, K[two], poses[two], images.names, i)
        pairs.append(pair)
        for view, new in zip((i, i + 1), dense_pair(photos[two], K[two], poses[two], pair, fill), strict=True):
            maps[view].append(new)
    merged = [fuse(candidates, pose) for candidates, pose in zip(maps, poses, strict=True)]
    report("done", 1.0)
    confidence = torch.from_numpy(np.stack([m.confidence for m in merged])).float()
    points = torch.from_numpy(np.stack([m.points for m in merged])).float()
    coverage = tuple((confidence > 0).float().mean((1, 2)).tolist())
    return Scene(work, work_cameras, points, confidence, _quality(method, pairs, motion, coverage))


def match_pair(
    found: list[ft.Features], scale: np.ndarray, K: np.ndarray, poses: np.ndarray, names: tuple[str, ...], first: int
) -> PairMatches:
    """Sparse matches of two neighbouring photos that agree with their cameras.

    Raises:
        UserError: the cameras stand in one place, or too few matches.
    """
    pairs = ft.match(found[0], found[1])
    xy1, xy2 = found[0].xy[pairs[:, 0]] * scale, found[1].xy[pairs[:, 1]] * scale
    line = poses[1, :3, 3] - poses[0, :3, 3]
    if np.linalg.norm(line) < 1e-9 * max(1.0, float(np.abs(poses[:, :3, 3]).max())):
        raise one_place(names, first, first + 1)
    good = ft.sampson_px(ft.fundamental(K[0], poses[0], K[1], poses[1]), xy1, xy2) < EPIPOLAR_PX
    xy1, xy2 = xy1[good], xy2[good]
    if len(xy1) < MIN_TRACKS:
        raise too_few(names, first, first + 1, len(xy1), known_cameras=True)
    points = ft.triangulate(K[0], poses[0], K[1], poses[1], xy1, xy2)
    fits = np.ones(len(points), bool)
    errors = np.zeros(len(points))
    for k, pose, xy in zip(K, poses, (xy1, xy2), strict=True):
        seen, depth = ft.project(k, pose, points)
        error = np.linalg.norm(seen - xy, axis=1)
        fits &= (depth > 0) & (error < EPIPOLAR_PX)
        errors += error / 2
    if fits.sum() < MIN_TRACKS:
        raise too_few(names, first, first + 1, int(fits.sum()), known_cameras=True)
    angle = float(np.median(angles_deg(points[fits], poses[0, :3, 3], poses[1, :3, 3])))
    if angle < 0.2:
        raise one_place(names, first, first + 1)
    view = float(np.degrees(np.arccos(np.clip(poses[0, :3, 2] @ poses[1, :3, 2], -1, 1))))
    return PairMatches((xy1[fits], xy2[fits]), points[fits], float(errors[fits].mean()), angle, view)


def dense_pair(
    photos: list[np.ndarray], K: np.ndarray, poses: np.ndarray, pair: PairMatches, fill: bool
) -> tuple[PointMap, PointMap]:
    """Point maps of two photos by the method that suits their baseline."""
    both = (photos[0], photos[1]), (K[0], K[1]), (poses[0], poses[1])
    if forwardness(poses[0], poses[1]) > FORWARD:
        from fvgen.geometry.sweep import sweep_pair

        maps = sweep_pair(*both, pair.points)
    else:
        maps = stereo_pair(*both, pair.xy)
    if fill:
        from fvgen.geometry.fill import fill_holes

        first, second = (fill_holes(m, K[i], poses[i], pair.xy[i], pair.points) for i, m in enumerate(maps))
        maps = first, second
    return maps


def _quality(method: str, pairs: list[PairMatches], motion: Motion | None, coverage: tuple[float, ...]) -> GeometryQuality:
    tracks = min(len(p.points) for p in pairs)
    angle, view = max(p.angle_deg for p in pairs), max(p.view_angle_deg for p in pairs)
    error = float(np.mean([p.error_px for p in pairs]))
    warnings = []
    if tracks < FEW_TRACKS:
        warnings.append(
            f"neighbouring photos share only {tracks} points (good: {FEW_TRACKS} or more); take photos closer together"
        )
    if max(angle, view) > WIDE_ANGLE_DEG:
        warnings.append(f"neighbouring photos are {max(angle, view):.0f} degrees apart (good: below {WIDE_ANGLE_DEG:.0f})")
    if error > HIGH_ERROR_PX:
        warnings.append(f"the cameras fit the photos badly: mean reprojection error {error:.1f} px")
    estimator = f"{method}, " + ("estimated cameras" if motion else "given cameras")
    return GeometryQuality(estimator, tracks, error, angle, view, coverage, tuple(warnings))
