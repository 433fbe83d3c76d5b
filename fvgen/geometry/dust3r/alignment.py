"""Many photos: one pose, focal length and depth map each that agree with all pairs (arXiv 2312.14132, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fvgen.geometry.conventions import rigid
from fvgen.kernels.point_map_distance import point_map_distance
from fvgen.types import Cameras, GeometryQuality, ImageSet, Scene

from .canvas import centred, common_size
from .clean import cleaned_confidence
from .pairs import PairPrediction, Progress, image_confidence
from .pinhole import intrinsics, pixel_centres

FOCAL_SCALE = 20.0
MEAN_PAIR_SCALE = 0.5
LAST_RATE = 1e-6
MIN_CONFIDENCE = math.log(3)
_ENTRIES = (  # of a rotation, row by row, and the squared length
    *("+xx-yy-zz+ww", "+xy+xy-zw-zw", "+xz+xz+yw+yw"),
    *("+xy+xy+zw+zw", "-xx+yy-zz+ww", "+yz+yz-xw-xw"),
    *("+xz+xz-yw-yw", "+yz+yz+xw+xw", "-xx-yy+zz+ww"),
    "+xx+yy+zz+ww",
)


@dataclass(frozen=True)
class AlignmentState:
    """What is optimised, in the units in which Adam takes its steps.

    Attributes:
        poses: ``[V, 7]`` of the photos: quaternion (x, y, z, w) of any length, then sign(t) log(1 + abs(t)) of the centre.
        focals: ``[V]``, 20 log of the focal length in pixels.
        depths: ``[V, H, W]``, log of z; photos that differ in size lie in the middle of the frame.
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


@cache
@torch.inference_mode(False)
def _quadratic(dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[16, 10]`` from the products of a quaternion's (x, y, z, w) to R times its squared length, and to that squared length."""
    table = torch.zeros(4, 4, len(_ENTRIES))
    for n, terms in enumerate(_ENTRIES):
        for sign, a, b in zip(terms[::3], terms[1::3], terms[2::3], strict=True):
            table["xyzw".index(a), "xyzw".index(b), n] += float(sign + "1")
    return table.flatten(0, 1).to(device, dtype)


def _motion(pose: Tensor) -> Tensor:
    """``[..., 7]`` to (R | T) ``[..., 3, 4]`` in few operations: each of them is a launch on a GPU, forward and backward."""
    quaternion, coded = pose.split([4, 3], dim=-1)
    products = (quaternion[..., :, None] * quaternion[..., None, :]).flatten(-2)
    turned, squared = (products @ _quadratic(pose.dtype, pose.device)).split([9, 1], dim=-1)
    sign = coded.detach().sign()
    return torch.cat([(turned / squared).unflatten(-1, (3, 3)), (sign * torch.expm1(sign * coded))[..., None]], dim=-1)


def pose_matrix(pose: Tensor) -> Tensor:
    """``[..., 7 or more]`` to ``[..., 4, 4]``."""
    motion = _motion(pose[..., :7])
    return rigid(motion[..., :3], motion[..., 3])


def pose_code(matrix: Tensor) -> Tensor:
    """``[..., 4, 4]`` to ``[..., 7]``, the inverse of :func:`pose_matrix`."""
    from scipy.spatial.transform import Rotation

    rotations = matrix[..., :3, :3].detach().double().reshape(-1, 3, 3).cpu().numpy()
    quaternion = torch.from_numpy(Rotation.from_matrix(rotations).as_quat()).reshape(*matrix.shape[:-2], 4)
    centre = matrix[..., :3, 3]
    return torch.cat([quaternion.to(matrix), centre.sign() * torch.log1p(centre.abs())], dim=-1)


def pair_scales(pair_poses: Tensor) -> Tensor:
    """Scale of each pair ``[E]``; their geometric mean is held at one half."""
    return _scales(pair_poses[:, 7])


def _scales(logs: Tensor) -> Tensor:
    return (logs - logs.mean()).exp() * MEAN_PAIR_SCALE


def centred_pixels(size: tuple[int, int], like: Tensor) -> Tensor:
    """Pixel centres relative to the optical axis, ``[2, H * W]`` (x, y) with dtype and device of ``like``."""
    return (pixel_centres(size) - intrinsics(1.0, size)[:2, 2]).flatten(0, 1).T.contiguous().to(like)


def world_points(state: AlignmentState) -> Tensor:
    """``[V, H, W, 3]`` of all photos."""
    size = (state.depths.shape[1], state.depths.shape[2])
    focals = (state.focals / FOCAL_SCALE).exp()[:, None, None]
    depths = state.depths.flatten(1)[:, None].exp()
    own = torch.cat([depths * centred_pixels(size, state.depths) / focals, depths], dim=1)
    motion = _motion(state.poses)
    return torch.baddbmm(motion[..., 3:], motion[..., :3], own).transpose(1, 2).unflatten(1, size)


def _confidences(predictions: Sequence[PairPrediction]) -> tuple[list[Tensor], list[Tensor]]:
    return [p.confidence_first for p in predictions], [p.confidence_second for p in predictions]


def predicted_size(predictions: Sequence[PairPrediction]) -> tuple[int, int]:
    """(H, W) of the frame in the middle of which every photo has room."""
    return common_size(c.shape for side in _confidences(predictions) for c in side)


class Objective:
    """Distance of every pair's points, moved and scaled by the pair's pose, from the world points, weighted by log confidence.

    Point maps are kept by photo, ``M`` of each, so that all of them are compared with its world points in one operation and sums
    run in the same order every time. Photos in fewer pairs are filled up with maps of weight zero, smaller photos with pixels
    of weight zero around them.

    Args:
        predictions: on the device where the loss is to be computed.
    """

    def __init__(self, predictions: Sequence[PairPrediction]) -> None:
        firsts, seconds = (sum(c.numel() for c in side) for side in _confidences(predictions))
        maps: dict[int, list[tuple[int, Tensor, Tensor, float]]] = {}
        for edge, p in enumerate(predictions):
            maps.setdefault(p.first, []).append((edge, p.points_first, p.confidence_first, 1.0))
            maps.setdefault(p.second, []).append((edge, p.points_second, p.confidence_second, firsts / seconds))
        like = predictions[0].points_first
        photos, most = 1 + max(maps), max(map(len, maps.values()))
        self._size = predicted_size(predictions)
        pixels = self._size[0] * self._size[1]
        self._points = like.new_zeros(photos, most, 3, pixels)
        self._weights = like.new_ones(photos, most, pixels)
        shares = torch.ones(photos, most, 1, dtype=like.dtype)  # the means over first and over second photos count alike
        chosen = torch.zeros(photos, most, len(predictions), dtype=like.dtype)
        for photo, its in maps.items():
            for n, (edge, points, confidence, share) in enumerate(its):
                self._points[photo, n] = centred(points.movedim(-1, 0), self._size).flatten(1)
                self._weights[photo, n] = centred(confidence, self._size, 1.0).flatten()
                chosen[photo, n, edge], shares[photo, n] = 1, share
        self._weights.log_().mul_(shares.to(like.device))
        self._chosen = chosen.to(like.device)
        self._over_focal = like.new_tensor([-1.0, -1.0, 0.0, 0.0]) / FOCAL_SCALE
        self._centred = centred_pixels(self._size, like)
        self._count = firsts

    def __call__(self, state: AlignmentState) -> Tensor:
        """The loss, a scalar in the network's unit of length."""
        pair_poses, logs = state.pair_poses.split([7, 1], dim=-1)
        both = _motion(torch.cat([state.poses, pair_poses]))
        cameras, motions = both.split([len(state.poses), len(pair_poses)])
        cameras = cameras * (state.focals[:, None] * self._over_focal).exp()[:, None]  # pixels to the frame at z = 1
        motions = (self._chosen @ (_scales(logs) * motions.flatten(1))).unflatten(-1, (3, 4))
        depths = state.depths.flatten(1).exp()
        return point_map_distance(depths, self._centred, cameras, motions, self._points, self._weights) / self._count


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
    adam = torch.optim.Adam(moving.parameters(), lr=pace, betas=(0.9, 0.9), capturable=cuda, fused=cuda)
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
    confidence = torch.stack([centred(image_confidence(predictions, i), images.size) for i in range(len(images))])
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
