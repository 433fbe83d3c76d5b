"""Many photos: one pose, focal length and depth map each that agree with all pairs (arXiv 2312.14132, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

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

    def to(self, device: torch.device | str) -> AlignmentState:
        """The same on another device."""
        return AlignmentState(*(p.to(device) for p in self.parameters()))


def _motion(pose: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., 7 or more]`` to rotation ``[..., 3, 3]`` and translation ``[..., 3]``, without waiting for a GPU."""
    coded = pose[..., 4:7]
    return rotation_from_quaternion(pose[..., :4].roll(1, -1)), coded.sign() * torch.expm1(coded.abs())


def pose_matrix(pose: Tensor) -> Tensor:
    """``[..., 7 or more]`` to ``[..., 4, 4]``."""
    return rigid(*_motion(pose))


def pose_code(matrix: Tensor) -> Tensor:
    """``[..., 4, 4]`` to ``[..., 7]``, the inverse of :func:`pose_matrix`."""
    from scipy.spatial.transform import Rotation

    rotations = matrix[..., :3, :3].detach().double().reshape(-1, 3, 3).cpu().numpy()
    quaternion = torch.from_numpy(Rotation.from_matrix(rotations).as_quat()).reshape(*matrix.shape[:-2], 4)
    centre = matrix[..., :3, 3]
    return torch.cat([quaternion.to(matrix), centre.sign() * torch.log1p(centre.abs())], dim=-1)


def pair_scales(pair_poses: Tensor) -> Tensor:
    """Scale of each pair ``[E]``; their geometric mean is held at one half."""
    return (pair_poses[:, 7] - pair_poses[:, 7].mean()).exp() * MEAN_PAIR_SCALE


def centred_pixels(size: tuple[int, int], like: Tensor) -> Tensor:
    """Pixel centres relative to the optical axis, ``[2, H * W]`` (x, y) with dtype and device of ``like``."""
    return (pixel_centres(size) - intrinsics(1.0, size)[:2, 2]).flatten(0, 1).T.contiguous().to(like)


def _world(state: AlignmentState, centred: Tensor) -> Tensor:
    """World points ``[V, 3, H * W]``."""
    focals = (state.focals / FOCAL_SCALE).exp()[:, None, None]
    depths = state.depths.flatten(1)[:, None].exp()
    R, T = _motion(state.poses)
    return torch.baddbmm(T[..., None], R, torch.cat([depths * centred / focals, depths], dim=1))


def world_points(state: AlignmentState) -> Tensor:
    """``[V, H, W, 3]`` of all photos."""
    size = (state.depths.shape[1], state.depths.shape[2])
    return _world(state, centred_pixels(size, state.depths)).transpose(1, 2).unflatten(1, size)


class _Distance(torch.autograd.Function):
    """Sum of ``w |world - (A x + b)|`` over everything. Both gradients are found on the way, with the residuals still at hand.

    Inputs are ``world [V, 3, P]``, motions (A | b) ``[V, M, 3, 4]``, ``points [V, M, 3, P]`` and ``weights [V, M, P]``.
    """

    @staticmethod
    def forward(ctx: Any, world: Tensor, motions: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        flat = motions.flatten(0, 1)
        residual = torch.baddbmm(flat[..., 3:], flat[..., :3], points.flatten(0, 1)).view_as(points)
        torch.sub(world[:, None], residual, out=residual)
        x, y, z = residual.unbind(2)
        distance = (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_()  # norm over a dimension in the middle is slow on CPUs
        loss = (distance * weights).sum()
        # at a distance of zero the residual is zero too, and so is its part of the gradient
        residual *= (weights / distance.clamp_min_(torch.finfo(distance.dtype).tiny))[:, :, None]
        columns = [(residual * points[:, :, k : k + 1]).sum(-1) for k in range(3)]
        ctx.save_for_backward(residual.sum(1), -torch.stack([*columns, residual.sum(-1)], dim=-1))
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        world, motions = ctx.saved_tensors
        return upstream[0] * world, upstream[0] * motions, None, None


class Objective:
    """Distance of every pair's points, moved and scaled by the pair's pose, from the world points, weighted by log confidence.

    Point maps are kept by photo, ``M`` of each, so that all of them are compared with its world points in one operation and sums
    run in the same order every time. Photos in fewer pairs are filled up with maps of weight zero.

    Args:
        predictions: on the device where the loss is to be computed.
    """

    def __init__(self, predictions: Sequence[PairPrediction]) -> None:
        maps: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
        for edge, p in enumerate(predictions):
            maps.setdefault(p.first, []).append((edge, p.points_first, p.confidence_first))
            maps.setdefault(p.second, []).append((edge, p.points_second, p.confidence_second))
        like = predictions[0].points_first
        photos, most = 1 + max(maps), max(map(len, maps.values()))
        self._size = (like.shape[0], like.shape[1])
        pixels = self._size[0] * self._size[1]
        self._points = like.new_zeros(photos, most, 3, pixels)
        self._weights = like.new_zeros(photos, most, pixels)
        chosen = torch.zeros(photos, most, len(predictions), dtype=like.dtype)
        for photo, its in maps.items():
            for n, (edge, points, confidence) in enumerate(its):
                self._points[photo, n] = points.flatten(0, 1).T
                self._weights[photo, n] = confidence.flatten().log()
                chosen[photo, n, edge] = 1
        self._chosen = chosen.to(like.device)
        self._centred = centred_pixels(self._size, like)
        self._count = len(predictions) * pixels

    def __call__(self, state: AlignmentState) -> Tensor:
        """The loss, a scalar in the network's unit of length."""
        R, T = _motion(state.pair_poses)
        motions = pair_scales(state.pair_poses)[:, None, None] * torch.cat([R, T[..., None]], dim=-1)
        motions = (self._chosen @ motions.flatten(1)).unflatten(-1, (3, 4))
        return _Distance.apply(_world(state, self._centred), motions, self._points, self._weights) / self._count


def learning_rate(step: int, steps: int, rate: float, schedule: str) -> float:
    """Of a ``schedule`` "linear" or "cosine" from ``rate`` to 1e-6."""
    t = step / steps
    part = 1 - t if schedule == "linear" else (1 + math.cos(math.pi * t)) / 2
    return LAST_RATE + (rate - LAST_RATE) * part


@torch.enable_grad()
def optimise(
    state: AlignmentState,
    objective: Objective,
    *,
    steps: int = 300,
    rate: float = 0.01,
    schedule: str = "linear",
    recorded: bool = True,
    progress: Progress | None = None,
) -> tuple[AlignmentState, list[float]]:
    """The state after ``steps`` of Adam, and the loss before each of them.

    Args:
        state: where to begin, on the device of the objective.
        objective: what to make small.
        steps, rate, schedule: of Adam, see :func:`learning_rate`.
        recorded: on a GPU, record one step as a CUDA graph and replay it.
        progress: called with a label and the fraction that is done.
    """
    device = state.depths.device
    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext():
        return _adam(
            state, objective, steps, partial(learning_rate, steps=steps, rate=rate, schedule=schedule), recorded, progress
        )


def _adam(
    state: AlignmentState,
    objective: Objective,
    steps: int,
    rate: Callable[[int], float],
    recorded: bool,
    progress: Progress | None,
) -> tuple[AlignmentState, list[float]]:
    moving = AlignmentState(*(p.detach().clone().requires_grad_() for p in state.parameters()))
    device = state.depths.device
    cuda = device.type == "cuda"
    pace = torch.zeros((), device=device) if cuda else 0.0  # set before each step
    adam = torch.optim.Adam(moving.parameters(), lr=pace, betas=(0.9, 0.9), capturable=cuda)
    losses = torch.zeros(steps, device=device)

    def step() -> Tensor:
        loss = objective(moving)
        gradients = torch.autograd.grad(loss, moving.parameters())
        for parameter, gradient in zip(moving.parameters(), gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        return loss.detach()

    graph: Any = None
    for n in range(steps):
        if isinstance(pace, Tensor):
            pace.fill_(rate(n))
        else:
            adam.param_groups[0]["lr"] = rate(n)
        if n == 1 and cuda and recorded:
            graph, loss = _record(step)
        if graph is None:
            loss = step()
        else:
            graph.replay()
        losses[n] = loss
        if progress:
            progress("aligning photos", (n + 1) / steps)
    return AlignmentState(*(p.detach() for p in moving.parameters())), losses.tolist()


def _record(step: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """A CUDA graph of ``step``, which has run before and does not run now, and its result."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def scene_of_state(
    images: ImageSet, predictions: Sequence[PairPrediction], state: AlignmentState, min_confidence: float = MIN_CONFIDENCE
) -> Scene:
    """Cameras and points of an aligned state, on the CPU.

    Pixels at or below ``min_confidence``, or cleaned away, get the confidence 0. The unit is
    about half of the network's, because the pairs' mean scale is held at one half.
    """
    K = torch.stack([intrinsics(f, images.size) for f in (state.focals / FOCAL_SCALE).exp().tolist()])
    confidence = torch.stack([image_confidence(predictions, i) for i in range(len(images))])
    points = world_points(state).float()
    cameras = Cameras(K.float().to(points.device), pose_matrix(state.poses).float(), images.size)
    confidence = cleaned_confidence(points, cameras, confidence)
    return Scene(
        images=images,
        cameras=cameras.to("cpu"),
        points=points.cpu(),
        confidence=torch.where(confidence > min_confidence, confidence, 0.0).cpu(),
        quality=GeometryQuality("dust3r"),
    )
