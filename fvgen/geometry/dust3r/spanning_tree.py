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
    scene_of_state,
)
from .pairs import PairPrediction, Progress, image_confidence
from .pinhole import camera_pose, estimate_focal, intrinsics, pose_and_focal, transform

POSE_CONFIDENCE = 3.0
POSE_ITERATIONS = 10


def register(source: Tensor, target: Tensor, weights: Tensor) -> tuple[float, Tensor, Tensor]:
    """``(s, R [3, 3], T [3])`` float64 with the least weighted squares of ``s R x + T`` to the target.

    ``source`` and ``target`` are ``[..., 3]``, ``weights`` ``[...]`` (Umeyama's closed form). R and T are on the CPU.
    """
    return _similarity(_moments(source, target, weights).cpu())


def _moments(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """``[16]`` float64: both means, the source's variance, the covariance of target and source, row by row."""
    x, y = source.reshape(-1, 3).double(), target.reshape(-1, 3).double()
    w = weights.reshape(-1, 1).double() / weights.double().sum()
    mean_x, mean_y = (w * x).sum(0), (w * y).sum(0)
    x, y = x - mean_x, y - mean_y
    covariance = ((w * y)[:, :, None] * x[:, None]).sum(0)  # a product of such long matrices is slow on a GPU
    return torch.cat([mean_x, mean_y, (w * x.square()).sum()[None], covariance.flatten()])


def _similarity(moments: Tensor) -> tuple[float, Tensor, Tensor]:
    mean_x, mean_y, variance, covariance = moments[:3], moments[3:6], moments[6], moments[7:].view(3, 3)
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
        predictions: pairs that connect all photos; all of one size. A photo that is the first of none gets the focal length under
            which most of its points fall on their pixels.
        count: number of photos.
        focal_limits: see :func:`fvgen.geometry.dust3r.pinhole.estimate_focal`.

    Raises:
        UserError: the photos differ in size, or the pairs do not suffice.
    """
    if len({tuple(p.confidence_first.shape) for p in predictions} | {tuple(p.confidence_second.shape) for p in predictions}) > 1:
        raise UserError("the photos differ in size after cropping; bring all photos to one size and orientation")
    points, poses, focals = _chain(spanning_tree(predictions, count), focal_limits)
    for prediction in sorted(predictions, key=lambda p: p.score, reverse=True):
        if prediction.first not in focals:
            focals[prediction.first] = estimate_focal(prediction.points_first, limits=focal_limits)
    size = (points[0].shape[0], points[0].shape[1])
    for i in range(count):
        if i not in poses:
            mask = image_confidence(predictions, i) > POSE_CONFIDENCE
            if i in focals:
                found = camera_pose(points[i], intrinsics(focals[i], size), mask, POSE_ITERATIONS)
            else:
                both = pose_and_focal(points[i], mask, POSE_ITERATIONS)
                if both is None:
                    raise UserError(f"no focal length of photo {i + 1} was found; predict pairs in both orders")
                found, focals[i] = both
            poses[i] = torch.eye(4, dtype=torch.float64) if found is None else found
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
    depths = [transform(invert_rigid(pose), p)[..., 2] * unit for pose, p in zip(poses, points, strict=True)]
    scaled = torch.stack(poses)
    scaled[:, :3, 3] *= unit
    pairs = torch.cat([pose_code(torch.stack(pair_poses)), torch.tensor(logs, dtype=torch.float64)[:, None]], dim=1)
    return AlignmentState(
        pose_code(scaled).float(),
        FOCAL_SCALE * torch.tensor(focals).log(),
        torch.stack(depths).log().nan_to_num(nan=0.0, neginf=0.0).float(),
        pairs.float(),
    ).to(depths[0].device)


@torch.inference_mode(False)
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
        images: all photos at the predictions' size.
        predictions: of :func:`fvgen.geometry.dust3r.pairs.complete_pairs`, or any pairs that connect all photos, in both orders.
            Most of the work is done on the device where they are.
        steps, schedule: of the optimisation; "linear" or "cosine".
        min_confidence: pixels at or below it get the confidence 0.
        focal_limits: for the start, see :func:`fvgen.geometry.dust3r.pinhole.estimate_focal`.
        progress: called with a label and the fraction that is done.

    Returns:
        The scene, on the CPU.

    Raises:
        UserError: the photos differ in size, or the pairs do not suffice.
    """
    start = initial_state(predictions, len(images), focal_limits)
    state, _ = optimise(start, Objective(predictions), steps=steps, schedule=schedule, progress=progress)
    return scene_of_state(images, predictions, state, min_confidence)
