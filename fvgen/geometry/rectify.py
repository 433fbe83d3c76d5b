"""Rectification of two pinhole photos so that matching points share a row (Fusiello, Trucco and Verri 2000)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_TANGENT = 2.5  # rectified rays further from the axis are cut off: the image would grow without bound
MAX_GROWTH = 2.0


@dataclass(frozen=True)
class Rectified:
    """Two views with one rotation: x along the baseline from the first to the second camera.

    ``x1 - x2 = focal * baseline / z + offset`` for a point at depth z along the common axis, pixels of the rectified images.

    Attributes:
        rotation: rect_from_world 3x3.
        K: intrinsics of the two rectified images (they differ in the principal point's x only).
        from_photo: homographies photo pixel -> rectified pixel, both with centres at +0.5.
        size: (H, W) of both.
    """

    rotation: np.ndarray
    K: tuple[np.ndarray, np.ndarray]
    from_photo: tuple[np.ndarray, np.ndarray]
    centres: tuple[np.ndarray, np.ndarray]
    size: tuple[int, int]
    baseline: float

    @property
    def focal(self) -> float:
        return float(self.K[0][0, 0])

    @property
    def offset(self) -> float:
        return float(self.K[0][0, 2] - self.K[1][0, 2])


def forwardness(pose1: np.ndarray, pose2: np.ndarray) -> float:
    """Largest |cosine| between the baseline and a viewing axis, 1 = moving straight ahead."""
    line = pose2[:3, 3] - pose1[:3, 3]
    line = line / max(float(np.linalg.norm(line)), 1e-300)
    return float(max(abs(line @ pose1[:3, 2]), abs(line @ pose2[:3, 2])))


def rectify(K: tuple[np.ndarray, np.ndarray], poses: tuple[np.ndarray, np.ndarray], size: tuple[int, int]) -> Rectified:
    """Rectify two photos of one ``size`` (H, W) from intrinsics 3x3 and ``world_from_cam`` 4x4, float64."""
    centres = (poses[0][:3, 3], poses[1][:3, 3])
    line = centres[1] - centres[0]
    baseline = float(np.linalg.norm(line))
    x = line / baseline
    axis = poses[0][:3, 2] + poses[1][:3, 2]
    z = axis - (axis @ x) * x
    z /= np.linalg.norm(z)
    rotation = np.stack([x, np.cross(z, x), z])

    height, width = size
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1.0]])
    edge = np.concatenate([corners + (np.roll(corners, -1, 0) - corners) * t for t in np.linspace(0, 1, 16, endpoint=False)])
    focal = float(np.mean([K[0][0, 0], K[0][1, 1], K[1][0, 0], K[1][1, 1]]))
    spans = []
    for k, pose in zip(K, poses, strict=True):
        rays = edge @ (rotation @ pose[:3, :3] @ np.linalg.inv(k)).T
        tangent = rays[:, :2] / np.maximum(rays[:, 2:], 1e-3 * np.linalg.norm(rays, axis=1, keepdims=True))
        spans.append((np.clip(tangent.min(0), -MAX_TANGENT, MAX_TANGENT), np.clip(tangent.max(0), -MAX_TANGENT, MAX_TANGENT)))
    # Only rows that both photos reach can match.
    y0, y1 = max(s[0][1] for s in spans), min(s[1][1] for s in spans)
    extent = max(*(s[1][0] - s[0][0] for s in spans), y1 - y0)
    focal = min(focal, MAX_GROWTH * max(size) / max(extent, 1e-6))
    rows = max(1, int(np.ceil((y1 - y0) * focal)))
    columns = max(1, int(np.ceil(max(s[1][0] - s[0][0] for s in spans) * focal)))
    new_K = [np.array([[focal, 0, -s[0][0] * focal], [0, focal, -y0 * focal], [0, 0, 1.0]]) for s in spans]
    from_photo = [nk @ rotation @ p[:3, :3] @ np.linalg.inv(k) for nk, p, k in zip(new_K, poses, K, strict=True)]
    return Rectified(rotation, (new_K[0], new_K[1]), (from_photo[0], from_photo[1]), centres, (rows, columns), baseline)


def warp(image: np.ndarray, from_photo: np.ndarray, size: tuple[int, int], nearest: bool = False) -> np.ndarray:
    """Resample an ``[H, W(, C)]`` image by a homography between pixel frames with centres at +0.5; 0 outside."""
    import cv2

    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    whole = np.linalg.inv(half) @ from_photo @ half  # OpenCV counts pixel centres as whole numbers
    flags = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
    return cv2.warpPerspective(image, whole, (size[1], size[0]), flags=flags)


def apply(homography: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Map ``[..., 2]`` pixels by a 3x3 homography."""
    mapped = xy @ homography[:, :2].T + homography[:, 2]
    return mapped[..., :2] / mapped[..., 2:]
