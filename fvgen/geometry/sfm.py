"""Cameras of photos that come without: structure from motion.

Two photos: :mod:`fvgen.geometry.twoview`. Three or more: COLMAP's incremental mapper (Schoenberger and Frahm 2016) through
pycolmap on the CPU, one shared pinhole camera. Both are repeatable: fixed seeds, one thread where the order of sums matters.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fvgen.geometry import features as ft
from fvgen.geometry.twoview import FOCAL_GUESS, angles_deg, pinhole, same_place, two_view
from fvgen.types import Cameras, ImageSet
from fvgen.utils.errors import UserError

MIN_TRACKS = 15
LEAST_ANGLES_DEG = (4.0, 1.0)  # the second is for clips that hardly move
SOUND_MATCHES, SOUND_ANGLE_DEG = 60, 3.0
STATIONARY_PX, MOVING_PX, MIN_MOVING = 1.0, 5.0, 30


@dataclass(frozen=True)
class Motion:
    """Cameras (first photo = world, median depth of its tracks = 1), number of tracks and mean reprojection error."""

    cameras: Cameras
    tracks: int
    error_px: float
    angle_deg: float


def estimate_cameras(images: ImageSet, found: list[ft.Features] | None = None) -> Motion:
    """Cameras of two or more photos of one size from the photos alone.

    Args:
        images: ``rgb [V, 3, H, W]``; ``focal_px`` is used where EXIF gave it (median over the photos).
        found: features of each photo, if already at hand.

    Raises:
        UserError: the photos do not overlap, were taken from one place, or no consistent cameras exist.
    """
    known = [f for f in images.focal_px if f]
    focal = float(np.median(known)) if known else None
    if len(images) == 2:
        both = found or [ft.detect(ft.to_bytes(rgb)) for rgb in images.rgb]
        return _from_two(images, both, focal)
    # Short clips hardly determine the focal length, and a first pair with little parallax has a mirror-image solution that fits
    # nearly as well. The mapper gets both from the robust two-view estimates and keeps them.
    guess, start = _from_pairs(images, found or [ft.detect(ft.to_bytes(rgb)) for rgb in images.rgb], focal)
    return _from_many(images, guess, start)


def too_few(names: tuple[str, ...], first: int, second: int, count: int, known_cameras: bool = False) -> UserError:
    """The error for two photos with too few common points."""
    a, b = (names[i] if i < len(names) else f"number {i + 1}" for i in (first, second))
    if known_cameras:
        return UserError(
            f"the photos {a} and {b} share only {count} points that fit the cameras; check the cameras or the photos' overlap"
        )
    return UserError(
        f"the photos {a} and {b} share only {count} points; take photos that overlap more or give cameras with --cameras"
    )


def one_place(names: tuple[str, ...], first: int, second: int) -> UserError:
    """The error for two photos without a baseline."""
    a, b = (names[i] if i < len(names) else f"number {i + 1}" for i in (first, second))
    return UserError(f"the photos {a} and {b} were taken from the same place; move sideways between the photos to see depth")


def _from_two(images: ImageSet, found: list[ft.Features], focal: float | None) -> Motion:
    pairs = ft.match(found[0], found[1])
    xy1, xy2 = found[0].xy[pairs[:, 0]], found[1].xy[pairs[:, 1]]
    if len(pairs) < MIN_TRACKS:
        raise too_few(images.names, 0, 1, len(pairs))
    # Dust, captions or a backdrop fixed to the camera would pull the solution to "no motion".
    moved = np.linalg.norm(xy2 - xy1, axis=1)
    if (moved > MOVING_PX).sum() >= MIN_MOVING:
        xy1, xy2 = xy1[moved > STATIONARY_PX], xy2[moved > STATIONARY_PX]
    elif np.median(moved) < STATIONARY_PX:
        raise one_place(images.names, 0, 1)
    pair = two_view(xy1, xy2, images.size, focal)
    count = 0 if pair is None else int(pair.inliers.sum())
    if pair is None or count < MIN_TRACKS:
        raise too_few(images.names, 0, 1, count)
    if pair.angle_deg < 0.3 or same_place(xy1[pair.inliers], xy2[pair.inliers], pair.K):
        raise one_place(images.names, 0, 1)
    poses = np.stack([np.eye(4), pair.second])
    poses[:, :3, 3] /= np.median(pair.points[:, 2])
    return Motion(_cameras(np.stack([pair.K] * 2), poses, images.size), count, pair.error_px, pair.angle_deg)


def _cameras(K: np.ndarray, poses: np.ndarray, size: tuple[int, int]) -> Cameras:
    return Cameras(torch.from_numpy(K).float(), torch.from_numpy(poses).float(), size)


def _from_pairs(images: ImageSet, found: list[ft.Features], focal: float | None) -> tuple[float, tuple[int, int] | None]:
    """Focal length (the given one, else the median over the pairs) and the sound pair with the widest angle below 30 degrees."""
    focals, angles = [], {}
    for i, j in combinations(range(len(found)), 2):
        pairs = ft.match(found[i], found[j])
        if len(pairs) < SOUND_MATCHES:
            continue
        pair = two_view(found[i].xy[pairs[:, 0]], found[j].xy[pairs[:, 1]], images.size, focal)
        if pair is not None and pair.angle_deg > SOUND_ANGLE_DEG:
            focals.append(pair.K[0, 0])
            angles[i, j] = pair.angle_deg if pair.angle_deg < 30 else 0.0
    guess = focal or (float(np.median(focals)) if focals else FOCAL_GUESS * max(images.size))
    return guess, max(angles, key=angles.__getitem__, default=None)


def _from_many(images: ImageSet, focal: float, start: tuple[int, int] | None) -> Motion:
    model = _colmap_model(images, focal, start)
    by_name = {} if model is None else {model.images[i].name: model.images[i] for i in model.reg_image_ids()}
    lost = [i for i in range(len(images)) if _file_name(i) not in by_name]
    if model is None or lost:
        names = ", ".join(images.names[i] if i < len(images.names) else f"number {i + 1}" for i in lost)
        raise UserError(
            f"no camera found for {names}; take photos that overlap more, leave them out or give cameras with --cameras"
        )
    ordered = [by_name[_file_name(i)] for i in range(len(images))]
    camera = model.cameras[ordered[0].camera_id]
    cam_from_world = np.stack([np.vstack([_pose_of(image).matrix(), [0, 0, 0, 1]]) for image in ordered])
    world_from_cam = cam_from_world[0] @ np.linalg.inv(cam_from_world)
    points = np.stack([p.xyz for p in model.points3D.values()])
    seen = [p.point3D_id for p in ordered[0].points2D if p.has_point3D()]
    in_first = np.stack([model.points3D[k].xyz for k in seen]) @ cam_from_world[0][:3, :3].T + cam_from_world[0][:3, 3]
    world_from_cam[:, :3, 3] /= np.median(in_first[:, 2])
    ends = [np.linalg.inv(m)[:3, 3] for m in cam_from_world[:2]]
    angle = float(np.median(angles_deg(points, ends[0], ends[1])))
    K = pinhole(camera.params[0], images.size)
    K[0, 2], K[1, 2] = camera.params[1], camera.params[2]
    cameras = _cameras(np.stack([K] * len(ordered)), world_from_cam, images.size)
    return Motion(cameras, len(points), float(model.compute_mean_reprojection_error()), angle)


def _file_name(index: int) -> str:
    return f"{index:05d}.png"


def _pose_of(image: Any) -> Any:
    return image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world


def _colmap_model(images: ImageSet, focal: float, start: tuple[int, int] | None) -> Any | None:
    """The pycolmap reconstruction with the most photos, or None."""
    import pycolmap
    from PIL import Image

    pycolmap.logging.minloglevel = 3
    pycolmap.set_random_seed(0)
    height, width = images.size
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for index, rgb in enumerate(images.rgb):
            Image.fromarray(ft.to_bytes(rgb)).save(root / _file_name(index), compress_level=1)
        database = root / "features.db"
        reader = pycolmap.ImageReaderOptions()
        reader.camera_model = "SIMPLE_PINHOLE"
        reader.camera_params = f"{focal},{width / 2},{height / 2}"
        names = [_file_name(i) for i in range(len(images))]
        mode = pycolmap.CameraMode.SINGLE
        database.touch()
        pycolmap.import_images(database, root, mode, names, reader)  # else they are numbered in the order in which threads finish
        pycolmap.extract_features(database, root, names, mode, reader_options=reader, device=pycolmap.Device.cpu)
        verification = pycolmap.TwoViewGeometryOptions()
        verification.ransac.random_seed = 0  # else the draws depend on which thread takes a pair
        pycolmap.match_exhaustive(database, verification_options=verification, device=pycolmap.Device.cpu)
        best = None
        for least_angle in LEAST_ANGLES_DEG:
            options = _mapper_options(least_angle)
            if start is not None and least_angle == LEAST_ANGLES_DEG[0]:
                options.init_image_id1, options.init_image_id2 = (_image_id(database, _file_name(i)) for i in start)
            models = pycolmap.incremental_mapping(database, root, root, options)
            model = max(models.values(), key=lambda m: m.num_reg_images(), default=None)
            if model is not None and (best is None or model.num_reg_images() > best.num_reg_images()):
                best = model
            if best is not None and best.num_reg_images() == len(images):
                break
        return best


def _mapper_options(least_angle: float) -> Any:
    import pycolmap

    options = pycolmap.IncrementalPipelineOptions()
    options.min_model_size = 2
    options.multiple_models = False
    options.num_threads = 1
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = 0
    options.ba_refine_focal_length = False
    options.mapper.abs_pose_refine_focal_length = False
    options.ba_use_gpu = False
    options.mapper.init_min_num_inliers = 30
    options.mapper.init_min_tri_angle = least_angle
    options.mapper.filter_min_tri_angle = min(1.5, 0.5 * least_angle)
    options.triangulation.min_angle = min(1.5, 0.5 * least_angle)
    options.mapper.abs_pose_min_num_inliers = MIN_TRACKS
    return options


def _image_id(database: Path, name: str) -> int:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(database)) as tables:
        return int(tables.execute("SELECT image_id FROM images WHERE name = ?", (name,)).fetchone()[0])
