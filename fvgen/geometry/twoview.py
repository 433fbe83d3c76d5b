"""Relative pose, and focal length where it is unknown, of two photos from point matches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fvgen.geometry import features as ft

INLIER_PX = 1.5
MATCH_SIGMA_PX = 0.6
# Without EXIF: phones and cameras at normal zoom lie between about 0.7 and 1.2 times the long side.
FOCAL_GUESS, FOCAL_LOG_SIGMA = 0.9, 0.2
EXIF_LOG_SIGMA = 0.015
FOCAL_STARTS = (0.65, 0.8, 1.0, 1.2, 1.5)


@dataclass(frozen=True)
class TwoView:
    """``K`` 3x3 of both photos; ``second`` world_from_cam of the second photo, the first being the world, |baseline| = 1.

    ``inliers [M]`` bool over the given matches; ``points [sum(inliers), 3]``.
    """

    K: np.ndarray
    second: np.ndarray
    inliers: np.ndarray
    points: np.ndarray
    error_px: float
    angle_deg: float


def pinhole(focal: float, size: tuple[int, int]) -> np.ndarray:
    """Square pixels, principal point in the middle of an image of ``size`` (H, W)."""
    return np.array([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1.0]])


def two_view(xy1: np.ndarray, xy2: np.ndarray, size: tuple[int, int], focal_px: float | None) -> TwoView | None:
    """Best two-view geometry of matches ``[M, 2]``, or None where fewer than 8 of them agree on one.

    Robust five-point search (OpenCV MAGSAC++, fixed seed) at each candidate focal length, then minimisation of the robust
    Sampson error over rotation, direction of the baseline and focal length with a prior (``focal_px`` from EXIF, else wide).
    """
    long_side = max(size)
    starts = [focal_px] if focal_px else [f * long_side for f in FOCAL_STARTS]
    prior = (np.log(focal_px), EXIF_LOG_SIGMA) if focal_px else (np.log(FOCAL_GUESS * long_side), FOCAL_LOG_SIGMA)
    best: tuple[float, np.ndarray, TwoView] | None = None
    for start in starts:
        found = _search(xy1, xy2, pinhole(start, size))
        if found is None:
            continue
        parameters = np.concatenate([found, [np.log(start)]])
        for _ in range(3):
            parameters, cost = _refine(parameters, xy1, xy2, size, prior)
        if best is None or cost < best[0]:
            result = _result(parameters, xy1, xy2, size)
            if result is not None:
                best = (cost, parameters, result)
    return None if best is None else best[2]


def _search(xy1: np.ndarray, xy2: np.ndarray, K: np.ndarray) -> np.ndarray | None:
    import cv2

    if len(xy1) < 8:
        return None
    cv2.setRNGSeed(0)
    E, mask = cv2.findEssentialMat(xy1, xy2, K, method=cv2.USAC_MAGSAC, prob=0.9999, threshold=INLIER_PX, maxIters=20000)
    if E is None or E.shape != (3, 3) or mask is None or int(mask.sum()) < 8:
        return None
    _, R, t, _ = cv2.recoverPose(E, xy1, xy2, K, mask=mask.copy())
    return np.concatenate([cv2.Rodrigues(R)[0].ravel(), t.ravel()])


def _unpack(parameters: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(K, cam2_from_cam1 4x4) of (rotation vector, direction, log focal)."""
    import cv2

    pose = np.eye(4)
    pose[:3, :3] = cv2.Rodrigues(parameters[:3])[0]
    pose[:3, 3] = parameters[3:6] / np.linalg.norm(parameters[3:6])
    return pinhole(float(np.exp(parameters[6])), size), pose


def _residual(parameters: np.ndarray, xy1: np.ndarray, xy2: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    K, second_from_first = _unpack(parameters, size)
    F = ft.fundamental(K, np.eye(4), K, np.linalg.inv(second_from_first))
    return ft.sampson_px(F, xy1, xy2, signed=True)


def _refine(
    parameters: np.ndarray, xy1: np.ndarray, xy2: np.ndarray, size: tuple[int, int], prior: tuple[float, float]
) -> tuple[np.ndarray, float]:
    """One robust refinement (Geman-McClure weights) and its cost over all matches."""
    from scipy.optimize import least_squares

    def whitened(p: np.ndarray) -> np.ndarray:
        r = _residual(p, xy1, xy2, size) / (MATCH_SIGMA_PX * 2)
        robust = r / np.sqrt(1 + r * r)
        gauge = np.linalg.norm(p[3:6]) - 1.0
        return np.concatenate([2 * robust, [(p[6] - prior[0]) / prior[1], gauge]])

    solved = least_squares(whitened, parameters, method="lm", x_scale=np.array([1e-2] * 3 + [1e-1] * 3 + [1e-1]), max_nfev=400)
    solved.x[3:6] /= np.linalg.norm(solved.x[3:6])
    return solved.x, float(solved.cost)


def _result(parameters: np.ndarray, xy1: np.ndarray, xy2: np.ndarray, size: tuple[int, int]) -> TwoView | None:
    K, second_from_first = _unpack(parameters, size)
    # The Sampson error does not tell the direction of travel from its opposite: take the side with points in front.
    best: TwoView | None = None
    for sign in (1.0, -1.0):
        pose = second_from_first.copy()
        pose[:3, 3] *= sign
        second = np.linalg.inv(pose)
        points = ft.triangulate(K, np.eye(4), K, second, xy1, xy2)
        first_xy, first_z = ft.project(K, np.eye(4), points)
        second_xy, second_z = ft.project(K, second, points)
        errors = np.stack([np.linalg.norm(first_xy - xy1, axis=1), np.linalg.norm(second_xy - xy2, axis=1)])
        inliers = (first_z > 0) & (second_z > 0) & (errors.max(0) < 2 * INLIER_PX)
        if best is None or inliers.sum() > best.inliers.sum():
            kept = points[inliers]
            angle = float(np.median(angles_deg(kept, np.zeros(3), second[:3, 3]))) if len(kept) else 0.0
            error = float(errors[:, inliers].mean()) if len(kept) else float("inf")
            best = TwoView(K, second, inliers, kept, error, angle)
    return best if best is not None and best.inliers.sum() >= 8 else None


def angles_deg(points: np.ndarray, centre1: np.ndarray, centre2: np.ndarray) -> np.ndarray:
    """Angle between the rays from two centres at each point ``[M, 3]``, degrees."""
    a, b = points - centre1, points - centre2
    cross = np.linalg.norm(np.cross(a, b), axis=1)
    return np.degrees(np.arctan2(cross, (a * b).sum(1)))


def same_place(xy1: np.ndarray, xy2: np.ndarray, K: np.ndarray) -> bool:
    """Whether the matches are explained by a turn of the camera alone: median residual below 1 pixel."""
    rays = [np.c_[xy, np.ones(len(xy))] @ np.linalg.inv(K).T for xy in (xy1, xy2)]
    rays = [r / np.linalg.norm(r, axis=1, keepdims=True) for r in rays]
    keep = np.ones(len(xy1), bool)
    for _ in range(10):
        u, _, vt = np.linalg.svd(rays[1][keep].T @ rays[0][keep])
        R = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
        turned = rays[0] @ R.T @ K.T
        residual = np.linalg.norm(turned[:, :2] / turned[:, 2:] - xy2, axis=1)
        keep = residual <= np.median(residual)
    return bool(np.median(residual) < 1.0)
