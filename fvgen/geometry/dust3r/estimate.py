"""One, two or more photos to a scene by DUSt3R, behind the interface of :func:`fvgen.geometry.estimate_scene`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.geometry.resize import resize, scale_K
from fvgen.types import Cameras, GeometryQuality, ImageSet, Scene
from fvgen.utils.errors import UserError

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
        images: upright photos of one size.
        cameras: theirs at the same image size; estimated when left out. Estimated cameras have the first photo's camera as the
            world and the median depth of its points as the unit.
        min_confidence: pixels at or below it get no point; the network's confidence is above 1 everywhere.
        steps: of the alignment.
        progress: called with (what is being done, fraction in [0, 1]).

    Returns:
        Scene whose images are the whole photos at the scale at which the network saw them; what it did not see has no points.

    Raises:
        UserError: no photo, cameras that do not fit, or points from which no cameras can be found.
    """
    count, report = len(images), progress or (lambda _what, _fraction: None)
    if not count:
        raise UserError("geometry needs a photo; give one or more")
    if cameras is not None and (len(cameras) != count or tuple(cameras.image_size) != images.size):
        raise UserError("the cameras do not fit the photos in number or image size; give one camera per photo")
    size = int(network.config["image_size"])
    prepared = [network_image(rgb, size) for rgb in images.rgb]
    cropped = ImageSet(torch.stack([p.rgb for p in prepared]), images.names)
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
    whole = _uncropped(scene, images, prepared[0])
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


def _uncropped(scene: Scene, images: ImageSet, prepared: NetworkImage) -> Scene:
    """The scene of whole photos: a margin without points around what the network saw, intrinsics shifted."""
    mapping, (rows, columns) = prepared.network_from_photo, scene.images.size
    height, width = (round(side * float(mapping[n, n])) for side, n in ((images.size[0], 1), (images.size[1], 0)))
    left, top = round(-float(mapping[0, 2])), round(-float(mapping[1, 2]))
    margin = (left, width - columns - left, top, height - rows - top)
    whole, _ = resize(images, None, (height, width))
    cameras = replace(scene.cameras, K=scale_K(scene.cameras.K, 1, 1, left, top), image_size=(height, width))
    points = F.pad(scene.points.movedim(-1, 1), margin).movedim(1, -1)
    return replace(scene, images=whole, cameras=cameras, points=points, confidence=F.pad(scene.confidence, margin))


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
