"""Point maps for photos whose cameras are known: DUSt3R gives the shape, the cameras give the size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fvgen.geometry.conventions import invert_rigid
from fvgen.types import Cameras, GeometryQuality, ImageSet, Scene
from fvgen.utils.errors import UserError

from .pairs import PairPrediction, image_confidence
from .pinhole import MIN_POINTS, POSE_CONFIDENCE, pixel_centres, transform, unproject

SAME_PLACE = 1e-9


def scene_of_cameras(images: ImageSet, predictions: Sequence[PairPrediction], cameras: Cameras, min_confidence: float) -> Scene:
    """A scene in the world and the unit of given cameras.

    The depth of a photo is z of its points in the surest pair in which it is the first, times the one factor under which the
    other photo's points of that pair fall on their pixels. A single photo keeps the network's unit.

    Args:
        images: all photos at the predictions' size.
        predictions: each photo is the first of at least one; all of one size.
        cameras: of the photos, at the predictions' size.
        min_confidence: pixels at or below it get the confidence 0.

    Raises:
        UserError: two cameras stand in one place, or the cameras contradict the photos.
    """
    depths, confidences = [], []
    for i in range(len(images)):
        best = max((p for p in predictions if p.first == i), key=lambda p: p.score)
        depths.append(_factor(best, cameras) * best.points_first[..., 2].double())
        confidences.append(image_confidence(predictions, i))
    depth, confidence = torch.stack(depths), torch.stack(confidences)
    K, poses = cameras.K.double(), cameras.world_from_cam.double()
    trusted = (confidence > min_confidence) & (depth > 0) & depth.isfinite()
    return Scene(
        images=images,
        cameras=cameras,
        points=torch.stack([unproject(*each) for each in zip(depth, K, poses, strict=True)]).float(),
        confidence=torch.where(trusted, confidence, 0.0),
        quality=GeometryQuality("dust3r"),
    )


def _factor(pair: PairPrediction, cameras: Cameras) -> float:
    """From the pair's unit to that of the cameras."""
    if pair.first == pair.second:
        return 1.0
    poses = cameras.world_from_cam.double()
    second_from_first = invert_rigid(poses[pair.second]) @ poses[pair.first]
    between = second_from_first[:3, 3]
    if float(between.norm()) <= SAME_PLACE * max(1.0, float(poses[:, :3, 3].abs().max())):
        raise UserError(
            f"the cameras of photos {pair.first + 1} and {pair.second + 1} stand in one place; use photos from different places"
        )
    names = f"{pair.first + 1} and {pair.second + 1}"
    return depth_factor(pair.points_second, pair.confidence_second, second_from_first, cameras.K[pair.second], names)


def depth_factor(points: Tensor, confidence: Tensor, second_from_first: Tensor, K: Tensor, names: str) -> float:
    """The factor under which points in the frame of one camera fall on the pixels of another, for most of them.

    ``R s p + t`` is parallel to the pixel's ray where ``s (R p) x ray + t x ray = 0``: each pixel has a factor of its own by
    least squares, and their median is taken. Unsure pixels do not count, as they do not for poses, unless hardly any is sure.

    Args:
        points: ``[H, W, 3]``, one per pixel of the second camera, in the frame of the first.
        confidence: ``[H, W]`` of these points.
        second_from_first: ``[4, 4]`` in the unit that is wanted.
        K: ``[3, 3]`` of the second camera.
        names: of the two photos, for the message.

    Raises:
        UserError: it is not positive.
    """
    pixels = pixel_centres((points.shape[0], points.shape[1]))
    rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1) @ torch.linalg.inv(K.double()).T
    turned = points.double() @ second_from_first[:3, :3].T
    across, offset = torch.linalg.cross(turned, rays), torch.linalg.cross(second_from_first[:3, 3].expand_as(rays), rays)
    factors = -(across * offset).sum(-1) / across.square().sum(-1)
    sure = confidence > POSE_CONFIDENCE
    factor = float((factors[sure] if sure.sum() >= MIN_POINTS else factors).nanmedian())
    if not factor > 0:
        raise UserError(f"the given cameras contradict what photos {names} show; check --cameras or leave it out")
    return factor


def camera_frame(scene: Scene, index: int = 0) -> Scene:
    """The same scene in the frame of one of its cameras, in units of the median depth of that photo's points."""
    back = invert_rigid(scene.cameras.world_from_cam[index].double())
    points = transform(back, scene.points.double())
    depth = points[index][..., 2][scene.confidence[index] > 0]
    unit = float(depth.median()) if len(depth) else 1.0
    poses = back @ scene.cameras.world_from_cam.double()
    poses[:, :3, 3] /= unit
    cameras = replace(scene.cameras, world_from_cam=poses.float())
    return replace(scene, cameras=cameras, points=(points / unit).float())
