"""Sub-pixel disparities by least squares on the image (Lucas and Kanade 1981, along the row only).

Semi-global matching picks among whole disparities and fits a parabola to an absolute-difference cost, which draws the result
towards whole and half pixels by up to 0.3 px.
"""

from __future__ import annotations

import numpy as np

WINDOW = 11
ITERATIONS = 2
MAX_STEP = 0.5
NOISE = 2.0  # grey levels; where the texture is weaker the disparity stays


def refine(reference: np.ndarray, other: np.ndarray, disparity: np.ndarray, sign: float) -> np.ndarray:
    """Refine ``disparity [h, w]`` (NaN = none) where ``reference(x)`` matches ``other(x + sign * disparity)``.

    Images are ``[h, w, 3]`` uint8. Brightness may differ by a constant within each window. No disparity moves by more than
    ``MAX_STEP`` pixels.
    """
    import cv2

    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) for image in (reference, other)]
    slope = cv2.Sobel(grey[1], cv2.CV_32F, 1, 0, ksize=3, scale=0.125)
    known = np.isfinite(disparity).astype(np.float32)
    start = np.nan_to_num(disparity).astype(np.float32)
    y, x = (a.astype(np.float32) for a in np.mgrid[0 : disparity.shape[0], 0 : disparity.shape[1]])

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.blur(values * known, (WINDOW, WINDOW)) / weight

    weight = np.maximum(cv2.blur(known, (WINDOW, WINDOW)), 1e-3)
    refined = start
    for _ in range(ITERATIONS):
        at = x + np.float32(sign) * refined
        error = grey[0] - cv2.remap(grey[1], at, y, cv2.INTER_CUBIC)
        gradient = cv2.remap(slope, at, y, cv2.INTER_LINEAR)
        mean_error, mean_gradient = mean(error), mean(gradient)
        covariance = mean(gradient * error) - mean_gradient * mean_error
        variance = mean(gradient * gradient) - mean_gradient**2
        step = sign * covariance / (variance + NOISE**2)
        refined = np.clip(refined + step, start - MAX_STEP, start + MAX_STEP).astype(np.float32)
    return np.where(known > 0, refined, np.nan).astype(np.float32)
