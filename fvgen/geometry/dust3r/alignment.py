"""Many photos: one pose, focal length and depth map each that agree with all pairs (arXiv 2312.14132, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fvgen.geometry.conventions import rigid, rotation_from_quaternion
from fvgen.types import Cameras, GeometryQuality, ImageSet, Scene

from .clean import cleaned_confidence
from .pairs import PairPrediction, Progress, image_confidence
from .pinhole import intrinsics, pixel_centres

FOCAL_SCALE = 20.0
MEAN_PAIR_SCALE = 0.5
LAST_RATE = 1e-6
MIN_CONFIDENCE = math.log(3)


@dataclass(frozen=True)
class AlignmentState:
    """What is optimised, in the units in which Adam takes its steps.

    Attributes:
        poses: ``[V, 7]`` of the photos: quaternion (x, y, z, w) of any length, then sign(t) log(1 + abs(t)) of the centre.
        focals: ``[V]``, 20 log of the focal length in pixels.
        depths: ``[V, H, W]``, log of z.
        pair_poses: ``[E, 8]``, as ``poses`` and then the log of a scale.
    """

    poses: Tensor
    focals: Tensor
    depths: Tensor
    pair_poses: Tensor

    def parameters(self) -> list[Tensor]:
        """What Adam moves."""
        return [self.poses, self.focals, self.depths, self.pair_poses]


def pose_matrix(pose: Tensor) -> Tensor:
    """``[..., 7 or more]`` to ``[..., 4, 4]``."""
    coded = pose[..., 4:7]
    return rigid(rotation_from_quaternion(pose[..., [3, 0, 1, 2]]), coded.sign() * torch.expm1(coded.abs()))


def pose_code(matrix: Tensor) -> Tensor:
    """``[..., 4, 4]`` to ``[..., 7]``, the inverse of :func:`pose_matrix`."""
    from scipy.spatial.transform import Rotation

    rotations = matrix[..., :3, :3].detach().double().reshape(-1, 3, 3).numpy()
    quaternion = torch.from_numpy(Rotation.from_matrix(rotations).as_quat()).reshape(*matrix.shape[:-2], 4)
    centre = matrix[..., :3, 3]
    return torch.cat([quaternion.to(matrix), centre.sign() * torch.log1p(centre.abs())], dim=-1)


def pair_scales(pair_poses: Tensor) -> Tensor:
    """Scale of each pair ``[E]``; their geometric mean is held at one half."""
    return (pair_poses[:, 7] - pair_poses[:, 7].mean()).exp() * MEAN_PAIR_SCALE


def world_points(state: AlignmentState) -> Tensor:
    """``[V, H, W, 3]`` of all photos."""
    size = (state.depths.shape[1], state.depths.shape[2])
    centred = (pixel_centres(size) - intrinsics(1.0, size)[:2, 2]).to(state.depths)
    focals = (state.focals / FOCAL_SCALE).exp()
    rays = torch.cat([centred / focals[:, None, None, None], centred.new_ones(len(focals), *size, 1)], dim=-1)
    poses = pose_matrix(state.poses)
    points = (rays * state.depths.exp()[..., None]).flatten(1, 2) @ poses[:, :3, :3].transpose(1, 2) + poses[:, None, :3, 3]
    return points.unflatten(1, size)


class Objective:
    """Distance of every pair's points, moved and scaled by the pair's pose, from the world points, weighted by log confidence."""

    def __init__(self, predictions: Sequence[PairPrediction]) -> None:
        self.first = torch.tensor([p.first for p in predictions])
        self.second = torch.tensor([p.second for p in predictions])
        self.points = [torch.stack([getattr(p, f"points_{side}") for p in predictions]) for side in ("first", "second")]
        self.weights = [
            torch.stack([getattr(p, f"confidence_{side}") for p in predictions]).log() for side in ("first", "second")
        ]

    def __call__(self, state: AlignmentState) -> Tensor:
        """The loss, a scalar in the network's unit of length."""
        world, poses = world_points(state), pose_matrix(state.pair_poses)
        scales = pair_scales(state.pair_poses)[:, None, None, None]
        loss = world.new_zeros(())
        for index, points, weights in zip((self.first, self.second), self.points, self.weights, strict=True):
            turned = (points.flatten(1, 2) @ poses[:, :3, :3].transpose(1, 2) + poses[:, None, :3, 3]).view_as(points)
            loss = loss + ((world[index] - scales * turned).norm(dim=-1) * weights).mean()
        return loss


def learning_rate(step: int, steps: int, rate: float, schedule: str) -> float:
    """Of a ``schedule`` "linear" or "cosine" from ``rate`` to 1e-6."""
    t = step / steps
    part = 1 - t if schedule == "linear" else (1 + math.cos(math.pi * t)) / 2
    return LAST_RATE + (rate - LAST_RATE) * part


def optimise(
    state: AlignmentState,
    objective: Objective,
    *,
    steps: int = 300,
    rate: float = 0.01,
    schedule: str = "linear",
    progress: Progress | None = None,
) -> tuple[AlignmentState, list[float]]:
    """The state after ``steps`` of Adam, and the loss before each of them."""
    moving = AlignmentState(*(p.detach().clone().requires_grad_() for p in state.parameters()))
    adam = torch.optim.Adam(moving.parameters(), lr=rate, betas=(0.9, 0.9))
    losses = []
    for step in range(steps):
        adam.param_groups[0]["lr"] = learning_rate(step, steps, rate, schedule)
        adam.zero_grad()
        loss = objective(moving)
        loss.backward()
        adam.step()
        losses.append(loss.item())
        if progress:
            progress("aligning photos", (step + 1) / steps)
    return AlignmentState(*(p.detach() for p in moving.parameters())), losses


def scene_of_state(
    images: ImageSet, predictions: Sequence[PairPrediction], state: AlignmentState, min_confidence: float = MIN_CONFIDENCE
) -> Scene:
    """Cameras and points of an aligned state; pixels at or below ``min_confidence``, or cleaned away, get the confidence 0.

    The unit is about half of the network's, because the pairs' mean scale is held at one half.
    """
    K = torch.stack([intrinsics(float(f), images.size) for f in (state.focals / FOCAL_SCALE).exp()])
    confidence = torch.stack([image_confidence(predictions, i) for i in range(len(images))])
    cameras, points = Cameras(K.float(), pose_matrix(state.poses).float(), images.size), world_points(state).float()
    confidence = cleaned_confidence(points, cameras, confidence)
    return Scene(
        images=images,
        cameras=cameras,
        points=points,
        confidence=torch.where(confidence > min_confidence, confidence, 0.0),
        quality=GeometryQuality("dust3r"),
    )
