"""SIFT features and matches between two photos."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

MAX_FEATURES = 4096
MAX_RATIO = 0.8


@dataclass(frozen=True)
class Features:
    """``xy [N, 2]`` pixels of the photo, centres at +0.5; ``descriptors [N, 128]`` RootSIFT float32 of unit length."""

    xy: np.ndarray
    descriptors: np.ndarray


def to_bytes(rgb: Tensor) -> np.ndarray:
    """``[3, H, W]`` float in [0, 1] to ``[H, W, 3]`` uint8."""
    return (rgb.permute(1, 2, 0) * 255.0).round().byte().contiguous().numpy()


def detect(rgb: np.ndarray) -> Features:
    """SIFT on an ``[H, W, 3]`` uint8 photo (Lowe 2004), descriptors as RootSIFT (Arandjelovic and Zisserman 2012)."""
    import cv2

    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    keypoints, descriptors = cv2.SIFT.create(nfeatures=MAX_FEATURES, contrastThreshold=0.02).detectAndCompute(grey, None)
    if descriptors is None or not len(keypoints):
        return Features(np.zeros((0, 2)), np.zeros((0, 128), np.float32))
    # OpenCV counts pixel centres as whole numbers.
    xy = np.array([k.pt for k in keypoints], dtype=np.float64) + 0.5
    root = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-12))
    return Features(xy, np.ascontiguousarray(root, dtype=np.float32))


def match(a: Features, b: Features, max_ratio: float = MAX_RATIO) -> np.ndarray:
    """Mutual nearest neighbours that pass the ratio test, as ``[M, 2]`` indices; one per pair of positions."""
    if len(a.xy) < 2 or len(b.xy) < 2:
        return np.zeros((0, 2), dtype=np.int64)
    similarity = a.descriptors @ b.descriptors.T
    forward = _best(similarity, max_ratio)
    backward = _best(np.ascontiguousarray(similarity.T), max_ratio)
    rows = np.flatnonzero(forward >= 0)
    rows = rows[backward[forward[rows]] == rows]
    pairs = np.stack([rows, forward[rows]], axis=1)
    # A position with several orientations would count as several matches.
    where = np.round(np.concatenate([a.xy[pairs[:, 0]], b.xy[pairs[:, 1]]], axis=1), 1)
    _, first = np.unique(where, axis=0, return_index=True)
    return pairs[np.sort(first)]


def _best(similarity: np.ndarray, max_ratio: float) -> np.ndarray:
    rows = np.arange(len(similarity))
    first = similarity.argmax(axis=1)
    best = similarity[rows, first]
    similarity[rows, first] = -np.inf
    second = similarity.max(axis=1)
    similarity[rows, first] = best
    squared = 2.0 - 2.0 * np.minimum(np.stack([best, second]), 1.0)
    return np.where(squared[0] < max_ratio**2 * squared[1], first, -1)


def skew(v: np.ndarray) -> np.ndarray:
    """Matrix of the cross product: ``skew(v) @ x = cross(v, x)``."""
    return np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])


def fundamental(K1: np.ndarray, pose1: np.ndarray, K2: np.ndarray, pose2: np.ndarray) -> np.ndarray:
    """F with ``x2^T F x1 = 0`` from intrinsics and ``world_from_cam`` poses."""
    relative = np.linalg.inv(pose2) @ pose1
    essential = skew(relative[:3, 3]) @ relative[:3, :3]
    return np.linalg.inv(K2).T @ essential @ np.linalg.inv(K1)


def sampson_px(F: np.ndarray, xy1: np.ndarray, xy2: np.ndarray, signed: bool = False) -> np.ndarray:
    """First-order distance of matches ``[M, 2]`` to the epipolar constraint, pixels."""
    h1, h2 = np.c_[xy1, np.ones(len(xy1))], np.c_[xy2, np.ones(len(xy2))]
    l2, l1 = h1 @ F.T, h2 @ F
    error = (h2 * l2).sum(1) / np.sqrt(np.maximum((l1[:, :2] ** 2).sum(1) + (l2[:, :2] ** 2).sum(1), 1e-24))
    return error if signed else np.abs(error)


def triangulate(
    K1: np.ndarray, pose1: np.ndarray, K2: np.ndarray, pose2: np.ndarray, xy1: np.ndarray, xy2: np.ndarray
) -> np.ndarray:
    """World points ``[M, 3]`` of matches by linear least squares (DLT); may lie behind a camera."""
    P1, P2 = K1 @ np.linalg.inv(pose1)[:3], K2 @ np.linalg.inv(pose2)[:3]
    A = np.stack(
        [
            xy1[:, :1] * P1[2] - P1[0],
            xy1[:, 1:] * P1[2] - P1[1],
            xy2[:, :1] * P2[2] - P2[0],
            xy2[:, 1:] * P2[2] - P2[1],
        ],
        axis=1,
    )
    A /= np.linalg.norm(A, axis=2, keepdims=True)
    X = np.linalg.svd(A)[2][:, -1]
    return X[:, :3] / np.where(np.abs(X[:, 3:]) < 1e-12, 1e-12, X[:, 3:])


def project(K: np.ndarray, pose: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World points ``[M, 3]`` to pixels ``[M, 2]`` and depth ``[M]``."""
    cam_from_world = np.linalg.inv(pose)
    in_cam = points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
    in_image = in_cam @ K.T
    safe = np.where(np.abs(in_image[:, 2:]) < 1e-12, 1e-12, in_image[:, 2:])
    return in_image[:, :2] / safe, in_cam[:, 2]
