"""One, two or more photos to a scene by DUSt3R, behind the interface of :func:`fvgen.geometry.estimate_scene`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.geometry.resize import fit_cameras, resample, resize, scale_cameras, scale_K
from fvgen.types import Cameras, GeometryQuality, ImageSet, Scene
from fvgen.utils.errors import UserError

from .canvas import centred, centred_points, common_size, corner, photos_in_frame
from .known import camera_frame, scene_of_cameras
from .pairs import PairPrediction, Progress, complete_pairs, neighbour_pairs, predict_pairs
from .pinhole import estimate_focal, intrinsics, unproject
from .preprocess import NetworkImage, network_image
from .spanning_tree import aligned_scene
from .two_view import scene_of_pair

if TYPE_CHECKING:
    from fvgen.models.dust3r import Dust3rNetwork

MIN_CONFIDENCE = math.log(3)
FOCAL_LIMITS = (0.5, 3.5)
ALIGNMENT_STEPS = 300
WIDE_ANGLE_DEG = 60.0
LITTLE = 0.2


def dust3r_scene(
    network: Dust3rNetwork,
    images: ImageSet,
    cameras: Cameras | None = None,
    *,
    min_confidence: float = MIN_CONFIDENCE,
    steps: int = ALIGNMENT_STEPS,
    progress: Progress | None = None,
) -> Scene:
    """Dense point maps of one or more photos.

    One photo is paired with itself. Two are solved in closed form, more by global alignment over all pairs. With given cameras
    the point maps of neighbouring photos are scaled into their world.

    Args:
        network: on any device.
        images: upright photos; without ``cameras`` they may differ in size.
        cameras: theirs at the same image size; estimated when left out. Estimated cameras have the first photo's camera as the
            world and the median depth of its points as the unit.
        min_confidence: pixels at or below it get no point; the network's confidence is above 1 everywhere.
        steps: of the alignment.
        progress: called with (what is being done, fraction in [0, 1]).

    Returns:
        Scene whose images are the whole photos at the scale at which the network saw them; what it did not see has no points.
        Photos that differ in size lie in the middle of a frame that has room for all.

    Raises:
        UserError: no photo, cameras that do not fit, or points from which no cameras can be found.
    """
    count, report = len(images), progress or (lambda _what, _fraction: None)
    if not count:
        raise UserError("geometry needs a photo; give one or more")
    if cameras is not None and (len(cameras) != count or tuple(cameras.image_size) != images.size):
        raise UserError("the cameras do not fit the photos in number or image size; give one camera per photo")
    if cameras is not None and images.whole:
        raise UserError(
            "given cameras need photos of one size; bring all photos to one size and orientation, or leave --cameras out"
        )
    size = int(network.config["image_size"])
    photos: Sequence[Tensor] = images.whole or images.rgb.unbind()
    prepared = [network_image(rgb, size) for rgb in photos]
    frame = common_size(p.pixels.shape[-2:] for p in prepared)
    cropped = ImageSet(photos_in_frame([p.rgb for p in prepared], frame), images.names)
    aligned = cameras is None and count > 2
    predicted = 0.5 if aligned else 1.0
    predictions = predict_pairs(
        network,
        [p.pixels for p in prepared],
        complete_pairs(count) if aligned else neighbour_pairs(count),
        progress=lambda what, fraction: report(what, predicted * fraction),
    )
    if not aligned:
        predictions = [p.to("cpu") for p in predictions]
    if cameras is not None:
        K = prepared[0].network_from_photo @ cameras.K.double()
        given = Cameras(K.float(), cameras.world_from_cam, cropped.size)
        scene = scene_of_cameras(cropped, predictions, given, min_confidence)
    elif count == 1:
        scene = _scene_of_one(cropped, predictions[0], min_confidence)
    elif count == 2:
        scene = scene_of_pair(cropped, predictions, min_confidence=min_confidence, focal_limits=FOCAL_LIMITS)
    else:
        scene = aligned_scene(
            cropped,
            predictions,
            steps=steps,
            min_confidence=min_confidence,
            focal_limits=FOCAL_LIMITS,
            progress=lambda what, fraction: report(what, predicted + (1 - predicted) * fraction),
        )
    report("done", 1.0)
    if cameras is None:
        scene = camera_frame(scene)
    whole = _uncropped(scene, images, photos, prepared)
    return replace(whole, quality=_quality(whole, cameras is not None))


def _scene_of_one(images: ImageSet, prediction: PairPrediction, min_confidence: float) -> Scene:
    """A photo that was paired with itself."""
    K = intrinsics(estimate_focal(prediction.points_first, limits=FOCAL_LIMITS), images.size)
    depth, confidence = prediction.points_first[..., 2], prediction.confidence_first
    trusted = (confidence > min_confidence) & (depth > 0) & depth.isfinite()
    pose = torch.eye(4)
    return Scene(
        images=images,
        cameras=Cameras(K.float()[None], pose[None], images.size),
        points=unproject(depth, K, pose).float()[None],
        confidence=torch.where(trusted, confidence, 0.0)[None],
    )


def _uncropped(scene: Scene, images: ImageSet, photos: Sequence[Tensor], prepared: Sequence[NetworkImage]) -> Scene:
    """The scene of whole photos: a margin without points around what the network saw, intrinsics shifted."""
    wholes = [_whole_size(photo, p) for photo, p in zip(photos, prepared, strict=True)]
    frame, seen = common_size(wholes), scene.images.size
    K, K_whole, points, confidence = [], [], [], []
    for n, (p, size) in enumerate(zip(prepared, wholes, strict=True)):
        rows, columns = p.pixels.shape[-2:]
        top, left = corner((rows, columns), seen)
        left_cut, top_cut = (round(-float(p.network_from_photo[axis, 2])) for axis in (0, 1))
        margin = (left_cut, size[1] - columns - left_cut, top_cut, size[0] - rows - top_cut)
        inner = slice(top, top + rows), slice(left, left + columns)
        points.append(centred_points(F.pad(scene.points[n][inner].movedim(-1, 0), margin).movedim(0, -1), frame))
        confidence.append(centred(F.pad(scene.confidence[n][inner], margin), frame))
        K_whole.append(scale_K(scene.cameras.K[n], 1, 1, left_cut - left, top_cut - top))
        top, left = corner(size, frame)
        K.append(scale_K(K_whole[-1], 1, 1, left, top))
    poses = scene.cameras.world_from_cam
    frames = [
        fit_cameras(scale_cameras(Cameras(k[None], pose[None], size), (photo.shape[1], photo.shape[2])), images.size)
        for k, pose, size, photo in zip(K_whole, poses, wholes, photos, strict=True)
    ]
    first_frame = Cameras(torch.cat([each.K for each in frames]), poses, images.size)
    if images.whole:
        rgb = [resample(photo[None], size)[0] for photo, size in zip(photos, wholes, strict=True)]
        shown = ImageSet(photos_in_frame(rgb, frame), images.names)
    else:
        shown, _ = resize(images, None, frame)
    return replace(
        scene,
        images=shown,
        cameras=Cameras(torch.stack(K), poses, frame),
        points=torch.stack(points),
        confidence=torch.stack(confidence),
        frames=scale_cameras(first_frame, wholes[0]) if images.whole else None,
    )


def _whole_size(photo: Tensor, prepared: NetworkImage) -> tuple[int, int]:
    """(H, W) of the uncropped photo at the scale at which the network saw it."""
    mapping = prepared.network_from_photo
    return round(photo.shape[1] * float(mapping[1, 1])), round(photo.shape[2] * float(mapping[0, 0]))


def _quality(scene: Scene, given: bool) -> GeometryQuality:
    coverage = tuple((scene.confidence > 0).float().mean((1, 2)).tolist())
    axes = scene.cameras.world_from_cam[:, :3, 2]
    angles = _angles_deg(axes[:-1], axes[1:])
    warnings = [
        f"only {share:.0%} of photo {n + 1} has points that DUSt3R trusts; use photos that show more of the same things"
        for n, share in enumerate(coverage)
        if share < LITTLE
    ]
    if angles and max(angles) > WIDE_ANGLE_DEG:
        warnings.append(f"neighbouring photos are {max(angles):.0f} degrees apart (good: below {WIDE_ANGLE_DEG:.0f})")
    estimator = "dust3r, " + ("given cameras" if given else "estimated cameras")
    return GeometryQuality(estimator, view_angle_deg=max(angles, default=None), coverage=coverage, warnings=tuple(warnings))


def _angles_deg(a: Tensor, b: Tensor) -> list[float]:
    return torch.rad2deg((a * b).sum(-1).clamp(-1, 1).acos()).tolist()
