"""Dense stereo for one pair of photos: rectification and semi-global matching (Hirschmueller 2008, OpenCV ``StereoSGBM``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fvgen.geometry.rectify import Rectified, apply, rectify, warp
from fvgen.geometry.refine import refine

BLOCK = 5
MODE = 2  # cv2.StereoSGBM_MODE_SGBM_3WAY: as good as five directions and three times faster
MEDIAN = 5
SPECKLE_AREA, SPECKLE_STEP = 300, 2
LEFT_RIGHT_TOLERANCE = 1.5
ERODE = 3
SMOOTH_DEPTH = 1.5  # disparities of neighbouring pixels that differ by more belong to different surfaces


@dataclass(frozen=True)
class PointMap:
    """``points [H, W, 3]`` float64 world units and ``confidence [H, W]`` float32 in [0, 1], 0 = no point."""

    points: np.ndarray
    confidence: np.ndarray


def stereo_pair(
    photos: tuple[np.ndarray, np.ndarray],
    K: tuple[np.ndarray, np.ndarray],
    poses: tuple[np.ndarray, np.ndarray],
    matches: tuple[np.ndarray, np.ndarray],
    out_size: tuple[int, int] | None = None,
) -> tuple[PointMap, PointMap]:
    """Point maps of both photos.

    Args:
        photos: ``[h, w, 3]`` uint8 of one size.
        K, poses: intrinsics 3x3 and ``world_from_cam`` 4x4, float64; the baseline must not lie along the viewing axis.
        matches: pixels ``[M, 2]`` of sparse matches in each photo; they set the disparity range.
        out_size: (H, W) of the point maps, the photos' own when left out.
    """
    size = photos[0].shape[:2]
    out_size = out_size or size
    rect = rectify(K, poses, size)
    images = [warp(p, h, rect.size) for p, h in zip(photos, rect.from_photo, strict=True)]
    inside = [_inside(size, h, rect.size) for h in rect.from_photo]
    low, high = disparity_range(rect, matches)
    count = max(16, -(-(high - low) // 16) * 16)
    left = _sgbm(images[0], images[1], low, count)
    right = _sgbm(images[1][:, ::-1], images[0][:, ::-1], low, count)[:, ::-1]
    left, right = refine(images[0], images[1], left, -1.0), refine(images[1], images[0], right, 1.0)
    maps = []
    for view, (own, other, sign) in enumerate(((left, right, -1.0), (right, left, 1.0))):
        confidence = _consistency(own, other, sign, inside[view], inside[1 - view])
        maps.append(_to_photo(rect, view, own, confidence, size, out_size))
    return maps[0], maps[1]


def disparity_range(rect: Rectified, matches: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
    """Lowest and highest disparity of the sparse matches with a margin, pixels of the rectified images."""
    disparity = apply(rect.from_photo[0], matches[0])[:, 0] - apply(rect.from_photo[1], matches[1])[:, 0]
    low, high = np.percentile(disparity, [1, 99])
    margin = 4 + 0.15 * (high - low)
    # Nothing is further away than infinity.
    return int(np.floor(max(low - margin, rect.offset))), int(np.ceil(high + margin))


def _sgbm(reference: np.ndarray, other: np.ndarray, low: int, count: int) -> np.ndarray:
    """Disparity ``x_reference - x_other`` in [low, low + count), float32, NaN = none."""
    import cv2

    rows, width, _ = reference.shape
    # OpenCV never matches the first `count` columns, so both images move to the right by that much; moving the other one
    # by `low` more makes the lowest disparity 0.
    canvas = np.zeros((rows, width + count, 3), np.uint8)
    shifted = canvas.copy()
    canvas[:, count:] = reference
    first, last = max(0, -(count + low)), min(width, width - low)
    if first < last:
        shifted[:, first + count + low : last + count + low] = other[:, first:last]
    matcher = cv2.StereoSGBM.create(
        minDisparity=0,
        numDisparities=count,
        blockSize=BLOCK,
        P1=8 * 3 * BLOCK * BLOCK,
        P2=32 * 3 * BLOCK * BLOCK,
        disp12MaxDiff=-1,
        mode=MODE,
    )
    raw = cv2.medianBlur(matcher.compute(canvas, shifted)[:, count:].copy(), MEDIAN)
    cv2.filterSpeckles(raw, -16, SPECKLE_AREA, SPECKLE_STEP * 16)
    return np.where(raw < 0, np.nan, raw.astype(np.float32) / 16.0 + low)


def _inside(size: tuple[int, int], from_photo: np.ndarray, rect_size: tuple[int, int]) -> np.ndarray:
    """Where a rectified image shows photo pixels that are not next to the photo's border."""
    import cv2

    mask = np.zeros(size, np.uint8)
    mask[ERODE:-ERODE, ERODE:-ERODE] = 1
    return cv2.erode(warp(mask, from_photo, rect_size, nearest=True), np.ones((3, 3), np.uint8)) > 0


def _consistency(own: np.ndarray, other: np.ndarray, sign: float, inside: np.ndarray, inside_other: np.ndarray) -> np.ndarray:
    """Confidence ``[h, w]`` of a disparity map: 0 unless the other direction agrees and the match lies in its photo."""
    import cv2

    rows, columns = own.shape
    x = np.arange(columns, dtype=np.float32)[None] + sign * own
    hit = np.round(np.nan_to_num(x, nan=-1.0)).astype(np.int64)
    within = (hit >= 0) & (hit < columns) & np.isfinite(own) & inside
    hit = np.where(within, hit, 0)
    y = np.arange(rows)[:, None]
    difference = np.abs(np.nan_to_num(other[y, hit], nan=np.inf) - np.nan_to_num(own))
    good = within & inside_other[y, hit] & (difference <= LEFT_RIGHT_TOLERANCE)
    good = cv2.erode(good.astype(np.uint8), np.ones((ERODE, ERODE), np.uint8)) > 0
    return np.where(good, 1.0 / (1.0 + difference), 0.0).astype(np.float32)


def _to_photo(
    rect: Rectified, view: int, disparity: np.ndarray, confidence: np.ndarray, size: tuple[int, int], out_size: tuple[int, int]
) -> PointMap:
    """Disparities of a rectified view as world points on the photo's own pixel grid."""
    import cv2

    v, u = (np.mgrid[0 : out_size[0], 0 : out_size[1]] + 0.5) * (np.array(size) / out_size)[:, None, None]
    xy = apply(rect.from_photo[view], np.stack([u, v], axis=-1))
    at = (xy - 0.5).astype(np.float32)
    valid = (confidence > 0).astype(np.float32)
    filled = np.where(confidence > 0, disparity, 0.0).astype(np.float32)
    weight = cv2.remap(valid, at[..., 0], at[..., 1], cv2.INTER_LINEAR)
    linear = cv2.remap(filled, at[..., 0], at[..., 1], cv2.INTER_LINEAR) / np.maximum(weight, 1e-6)
    nearest = cv2.remap(filled, at[..., 0], at[..., 1], cv2.INTER_NEAREST)
    confident = cv2.remap(confidence, at[..., 0], at[..., 1], cv2.INTER_NEAREST)
    d = np.where(np.abs(linear - nearest) <= SMOOTH_DEPTH, linear, nearest).astype(np.float64)
    parallax = d - rect.offset
    good = (confident > 0) & (parallax > 1e-3)
    depth = rect.focal * rect.baseline / np.where(good, parallax, 1.0)
    rays = np.concatenate([xy, np.ones((*out_size, 1))], axis=-1) @ np.linalg.inv(rect.K[view]).T
    points = (rays * depth[..., None]) @ rect.rotation + rect.centres[view]
    return PointMap(np.where(good[..., None], points, 0.0), np.where(good, confident, 0.0).astype(np.float32))
