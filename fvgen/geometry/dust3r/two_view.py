"""Two photos in closed form: focal lengths, one relative pose, depth maps. No optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fvgen.geometry.conventions import invert_rigid
from fvgen.types import Cameras, GeometryQuality, ImageSet, Scene
from fvgen.utils.errors import UserError

from .canvas import centred, centred_points
from .pairs import PairPrediction, Progress, image_confidence, predict_pairs
from .pinhole import POSE_CONFIDENCE, camera_pose, estimate_focal, intrinsics, transform, unproject
from .preprocess import network_image

if TYPE_CHECKING:
    from fvgen.models.dust3r import Dust3rNetwork

MIN_CONFIDENCE = 3.0
MIN_FOCAL = 0.05  # of the long side: a field of view of 169 degrees


def two_view_scene(
    network: Dust3rNetwork,
    images: ImageSet,
    *,
    size: int = 512,
    square: bool = False,
    min_confidence: float = MIN_CONFIDENCE,
    pose_confidence: float = POSE_CONFIDENCE,
    focal_limits: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> Scene:
    """Cameras and point maps of two photos.

    Args:
        network: DUSt3R on any device.
        images: two upright photos.
        size, square: see :func:`fvgen.geometry.dust3r.preprocess.network_image`.
        min_confidence, pose_confidence, focal_limits: see :func:`scene_of_pair`.
        progress: called with a label and the fraction that is done.

    Returns:
        The scene at the network's resolution; its images are the cropped photos.

    Raises:
        UserError: there are not two photos, or they give no cameras.
    """
    if len(images) != 2:
        raise UserError(f"two photos are needed, {len(images)} were given; name exactly two")
    prepared = [network_image(rgb, size, square=square) for rgb in images.rgb]
    predictions = predict_pairs(network, [p.pixels for p in prepared], [(1, 0), (0, 1)], progress=progress)
    scale = float(prepared[0].network_from_photo[0, 0])
    focal_px = tuple(None if focal is None else focal * scale for focal in images.focal_px)
    cropped = ImageSet(torch.stack([p.rgb for p in prepared]), images.names, focal_px)
    limits = {"min_confidence": min_confidence, "pose_confidence": pose_confidence}
    return scene_of_pair(cropped, predictions, **limits, focal_limits=focal_limits)


def scene_of_pair(
    images: ImageSet,
    predictions: Sequence[PairPrediction],
    *,
    min_confidence: float = MIN_CONFIDENCE,
    pose_confidence: float = POSE_CONFIDENCE,
    focal_limits: tuple[float, float] | None = None,
) -> Scene:
    """Cameras and point maps of two photos from the predictions for (0, 1) and (1, 0), in either order.

    The first photo of the pair with the higher score is the world. The other one's pose comes from its points in that frame, each
    focal length from the points in the photo's own frame.

    Args:
        images: both photos at the predictions' size; where they differ in it, each in the middle of a frame with room for both.
        predictions: for (0, 1) and (1, 0).
        min_confidence: pixels at or below it get the confidence 0; the others keep the network's.
        pose_confidence: pixels at or below it take no part in the pose.
        focal_limits: see :func:`fvgen.geometry.dust3r.pinhole.estimate_focal`.

    Raises:
        UserError: a point map fits no camera.
    """
    by_first = {p.first: p for p in predictions}
    sizes = [(by_first[i].confidence_first.shape[0], by_first[i].confidence_first.shape[1]) for i in (0, 1)]
    focals = [_focal(by_first[i], sizes[i], focal_limits) for i in (0, 1)]
    K = [intrinsics(focal, size) for focal, size in zip(focals, sizes, strict=True)]
    confidence = [image_confidence(predictions, i) for i in (0, 1)]
    world = 0 if by_first[0].score > by_first[1].score else 1
    other, chosen = 1 - world, by_first[world]
    pose = camera_pose(chosen.points_second, K[other], confidence[other] > pose_confidence)
    if pose is None:
        raise UserError("no relative pose of the two photos was found; use photos that show more of the same things")
    depths = {world: chosen.points_first[..., 2], other: transform(invert_rigid(pose), chosen.points_second)[..., 2]}
    poses = {world: torch.eye(4, dtype=torch.float64), other: pose}
    frame = images.size
    framed = torch.stack([intrinsics(focal, frame) for focal in focals])
    return Scene(
        images=images,
        cameras=Cameras(framed.float(), torch.stack([poses[0], poses[1]]).float(), frame),
        points=torch.stack([centred_points(unproject(depths[i], K[i], poses[i]), frame) for i in (0, 1)]).float(),
        confidence=torch.stack([centred(_trusted(confidence[i], depths[i], min_confidence), frame) for i in (0, 1)]),
        quality=GeometryQuality("dust3r"),
    )


def _focal(prediction: PairPrediction, size: tuple[int, int], limits: tuple[float, float] | None) -> float:
    focal = estimate_focal(prediction.points_first, limits=limits)
    if not focal > MIN_FOCAL * max(size):
        raise UserError(
            f"the points of photo {prediction.first + 1} fit no focal length ({focal:.3g} pixels); limit it or use other photos"
        )
    return focal


def _trusted(confidence: Tensor, depth: Tensor, least: float) -> Tensor:
    return torch.where((confidence > least) & (depth > 0) & depth.isfinite(), confidence, 0.0)
