"""Where the alignment of many photos starts: pairs chained along a maximum spanning tree of their scores."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from fvgen.geometry.conventions import invert_rigid, rigid
from fvgen.types import ImageSet, Scene
from fvgen.utils.errors import UserError

from .alignment import (
    FOCAL_SCALE,
    MEAN_PAIR_SCALE,
    MIN_CONFIDENCE,
    AlignmentState,
    Objective,
    optimise,
    pose_code,
    predicted_size,
    scene_of_state,
)
from .canvas import centred
from .pairs import PairPrediction, Progress, float32_products, image_confidence
from .pinhole import POSE_CONFIDENCE, camera_poses, estimate_focal, intrinsics, pose_and_focal

POSE_ITERATIONS = 10


def register(source: Tensor, target: Tensor, weights: Tensor) -> tuple[float, Tensor, Tensor]:
    """``(s, R [3, 3], T [3])`` float64 with the least weighted squares of ``s R x + T`` to the target.

    ``source`` and ``target`` are ``[..., 3]``, ``weights`` ``[...]`` (Umeyama's closed form). R and T are on the CPU.
    """
    return _similarity(_moments(source, target, weights).cpu())


def _moments(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """``[4, 7]`` float64: weighted sums of the source's (x, y, z, 1) times (x, y, z of the source, x, y, z of the target, 1)."""
    x, y, w = source.double(), target.double(), weights.double()[..., None]
    one = torch.ones_like(w)
    left, right = w * torch.cat([x, one], dim=-1), torch.cat([x, y, one], dim=-1)
    return (left.transpose(-1, -2) @ right).reshape(-1, 4, 7).sum(0)  # one long product would be slow on a GPU


def _similarity(moments: Tensor) -> tuple[float, Tensor, Tensor]:
    moments = moments / moments[3, 6]
    mean_x, mean_y = moments[3, :3], moments[3, 3:6]
    variance = moments[:3, :3].trace() - mean_x.square().sum()
    covariance = moments[:3, 3:6].T - mean_y[:, None] * mean_x
    U, D, Vt = torch.linalg.svd(covariance)
    signs = torch.ones(3, dtype=torch.float64)
    signs[2] = torch.linalg.det(U @ Vt).sign()
    R = U @ torch.diag(signs) @ Vt
    scale = (signs * D).sum() / variance
    return float(scale), R, mean_y - scale * R @ mean_x


def _moved(points: Tensor, scale: float, R: Tensor, T: Tensor) -> Tensor:
    """``s R x + T`` of points ``[..., 3]``, float64."""
    return scale * points.double() @ R.T.to(points.device) + T.to(points.device)


def spanning_tree(predictions: Sequence[PairPrediction], count: int) -> list[PairPrediction]:
    """The ``count - 1`` pairs that connect all photos with the highest scores, best first.

    Raises:
        UserError: the pairs do not connect all photos.
    """
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    table = {(p.first, p.second): p for p in predictions}
    rows, columns = zip(*table, strict=True)
    costs = np.array([-p.score for p in table.values()])
    tree = minimum_spanning_tree(csr_array((costs, (rows, columns)), shape=(count, count))).tocoo()
    if tree.nnz != count - 1:
        raise UserError(f"the pairs do not connect all {count} photos; predict more pairs of them")
    chosen = [table[int(i), int(j)] for i, j in zip(*tree.coords, strict=True)]
    return sorted(chosen, key=lambda p: p.score, reverse=True)


def initial_state(
    predictions: Sequence[PairPrediction], count: int, focal_limits: tuple[float, float] | None = None
) -> AlignmentState:
    """A start for :func:`fvgen.geometry.dust3r.alignment.optimise`, the same in every run.

    As in the original, the focal length of a photo that is first in a later pair of the tree is estimated from the pair before,
    which may be another photo's; the optimisation corrects it.

    Args:
        predictions: pairs that connect all photos, which may differ in size. A photo that is the first of none gets the focal
            length under which most of its points fall on their pixels.
        count: number of photos.
        focal_limits: see :func:`fvgen.geometry.dust3r.pinhole.estimate_focal`.

    Raises:
        UserError: the pairs do not suffice.
    """
    points, poses, focals = _chain(spanning_tree(predictions, count), focal_limits)
    for prediction in sorted(predictions, key=lambda p: p.score, reverse=True):
        if prediction.first not in focals:
            focals[prediction.first] = estimate_focal(prediction.points_first, limits=focal_limits)
    masks = {i: image_confidence(predictions, i) > POSE_CONFIDENCE for i in range(count) if i not in poses}
    for i in masks.keys() - focals.keys():
        both = pose_and_focal(points[i], masks.pop(i), POSE_ITERATIONS)
        if both is None:
            raise UserError(f"no focal length of photo {i + 1} was found; predict pairs in both orders")
        poses[i], focals[i] = both
    views = [(points[i], intrinsics(focals[i], (points[i].shape[0], points[i].shape[1])), mask) for i, mask in masks.items()]
    for i, pose in zip(masks, camera_poses(views, POSE_ITERATIONS), strict=True):
        poses[i] = torch.eye(4, dtype=torch.float64) if pose is None else pose
    return _state(
        predictions, [points[i] for i in range(count)], [poses[i] for i in range(count)], [focals[i] for i in range(count)]
    )


def _chain(
    tree: list[PairPrediction], limits: tuple[float, float] | None
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, float]]:
    """World points of every photo; poses and focal lengths of those that are first in a pair of the tree."""
    before = tree[0]
    points = {before.first: before.points_first.double(), before.second: before.points_second.double()}
    poses = {before.first: torch.eye(4, dtype=torch.float64)}
    focals = {before.first: estimate_focal(before.points_first, limits=limits)}
    waiting = deque(tree[1:])
    while waiting:
        pair = waiting.popleft()
        if pair.first not in focals:
            focals[pair.first] = estimate_focal(before.points_first, limits=limits)
        if pair.first in points:
            scale, R, T = register(pair.points_first, points[pair.first], pair.confidence_first)
            points[pair.second] = _moved(pair.points_second, scale, R, T)
        elif pair.second in points:
            scale, R, T = register(pair.points_second, points[pair.second], pair.confidence_second)
            points[pair.first] = _moved(pair.points_first, scale, R, T)
        else:
            waiting.append(pair)
            continue
        poses.setdefault(pair.first, rigid(R, T))
        before = pair
    return points, poses, focals


def _depth(pose: Tensor, points: Tensor) -> Tensor:
    """z of world points ``[..., 3]`` in the frame of a camera."""
    x, y, z, shift = invert_rigid(pose)[2].tolist()
    return points[..., 0] * x + points[..., 1] * y + points[..., 2] * z + shift


def _state(
    predictions: Sequence[PairPrediction], points: list[Tensor], poses: list[Tensor], focals: list[float]
) -> AlignmentState:
    """Pair poses by registration; then everything in the unit in which the pairs' mean scale is one half."""
    pair_poses, logs = [], []
    # one transfer for all pairs
    moments = torch.stack([_moments(p.points_first, points[p.first], p.confidence_first) for p in predictions])
    for scale, R, T in map(_similarity, moments.cpu()):
        pair_poses.append(rigid(R, T / scale))
        logs.append(math.log(scale))
    unit = MEAN_PAIR_SCALE / math.exp(sum(logs) / len(logs))
    depths = [_depth(pose, p) * unit for pose, p in zip(poses, points, strict=True)]
    scaled = torch.stack(poses)
    scaled[:, :3, 3] *= unit
    pairs = torch.cat([pose_code(torch.stack(pair_poses)), torch.tensor(logs, dtype=torch.float64)[:, None]], dim=1)
    return AlignmentState(
        pose_code(scaled).float(),
        FOCAL_SCALE * torch.tensor(focals).log(),
        torch.stack([centred(depth, predicted_size(predictions), 1.0) for depth in depths])
        .log()
        .nan_to_num(nan=0.0, neginf=0.0)
        .float(),
        pairs.float(),
    ).to(depths[0].device)


@torch.inference_mode(False)
@float32_products("highest")
def aligned_scene(
    images: ImageSet,
    predictions: Sequence[PairPrediction],
    *,
    steps: int = 300,
    schedule: str = "linear",
    min_confidence: float = MIN_CONFIDENCE,
    focal_limits: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> Scene:
    """Cameras and point maps of two or more photos from the predictions of their pairs.

    Args:
        images: all photos at the predictions' size; where they differ in it, each in the middle of a frame that has room for all.
        predictions: of :func:`fvgen.geometry.dust3r.pairs.complete_pairs`, or any pairs that connect all photos, in both orders.
            Most of the work is done on the device where they are.
        steps, schedule: of the optimisation; "linear" or "cosine".
        min_confidence: pixels at or below it get the confidence 0.
        focal_limits: for the start, see :func:`fvgen.geometry.dust3r.pinhole.estimate_focal`.
        progress: called with a label and the fraction that is done.

    Returns:
        The scene, on the CPU.

    Raises:
        UserError: the pairs do not suffice.
    """
    start = initial_state(predictions, len(images), focal_limits)
    state, _ = optimise(start, Objective(predictions), steps=steps, schedule=schedule, progress=progress)
    return scene_of_state(images, predictions, state, min_confidence)
