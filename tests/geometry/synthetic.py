"""Photos of textured planes from known cameras, rendered by intersecting each pixel's ray: depth is known in closed form."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from fvgen.types import Cameras, ImageSet

SIZE = (240, 320)
FOCAL = 300.0
BACK, FRONT = 6.0, 4.0  # depths of the two planes z = const in the world
SQUARE = 0.9  # the front plane covers |x|, |y| < SQUARE


def texture(seed: int, side: int = 1024) -> np.ndarray:
    """Smooth coloured noise at several scales, ``[side, side, 3]`` in [0, 1]."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3), np.float32)
    for scale, weight in ((4, 0.3), (8, 0.5), (24, 0.7), (80, 0.7)):
        noise = rng.normal(size=(side // scale, side // scale, 3)).astype(np.float32)
        total += weight * cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(0.5 + 0.22 * total, 0, 1)


def pose(centre: tuple[float, float, float], turn_deg: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(turn_deg, degrees=True).as_matrix()
    matrix[:3, 3] = centre
    return matrix


def rays(K: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    v, u = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    return np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K).T


def photo(
    K: np.ndarray, world_from_cam: np.ndarray, size: tuple[int, int] = SIZE, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """``(rgb [H, W, 3] float32, z [H, W])`` of the two planes; z in the camera frame. 2x2 samples per pixel."""
    fine_K = np.diag([2.0, 2.0, 1.0]) @ K
    fine, _ = _sample(fine_K, world_from_cam, (2 * size[0], 2 * size[1]), seed)
    rgb = cv2.resize(fine, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return rgb, _sample(K, world_from_cam, size, seed)[1]


def _sample(K: np.ndarray, world_from_cam: np.ndarray, size: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    direction = rays(K, size) @ world_from_cam[:3, :3].T
    centre = world_from_cam[:3, 3]
    rgb, depth = np.zeros((*size, 3), np.float32), np.zeros(size)
    for number, z in enumerate((BACK, FRONT)):
        along = (z - centre[2]) / direction[..., 2]  # rays have z = 1 in the camera frame, so this is the depth
        hit = centre + along[..., None] * direction
        at = ((hit[..., :2] + 5) / 10 * 1023).astype(np.float32)
        colour = cv2.remap(texture(seed + number), at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        here = (np.abs(hit[..., :2]) < SQUARE).all(-1) if z == FRONT else np.ones(size, bool)
        rgb[here], depth[here] = colour[here], along[here]
    return rgb, depth


def capture(poses: list[np.ndarray], size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[ImageSet, Cameras, torch.Tensor]:
    """Photos, cameras and true z ``[V, H, W]``."""
    K = np.array([[FOCAL, 0, size[1] / 2], [0, FOCAL, size[0] / 2], [0, 0, 1.0]])
    shots = [photo(K, p, size, seed) for p in poses]
    rgb = torch.from_numpy(np.stack([s[0] for s in shots])).permute(0, 3, 1, 2).contiguous()
    names = tuple(f"photo{i}.png" for i in range(len(poses)))
    cameras = Cameras(torch.from_numpy(np.stack([K] * len(poses))).float(), torch.from_numpy(np.stack(poses)).float(), size)
    return ImageSet(rgb, names, (None,) * len(poses)), cameras, torch.from_numpy(np.stack([s[1] for s in shots]))
