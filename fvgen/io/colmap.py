"""COLMAP models on disk (cameras, images, points3D; text or binary), read without COLMAP.

Formats: https://colmap.github.io/format.html. Only what a pinhole pipeline needs is kept.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fvgen.utils.errors import UserError

# Name, number of parameters, how many of them are focal lengths; the two principal-point coordinates follow, then distortion.
MODELS = {
    0: ("SIMPLE_PINHOLE", 3, 1),
    1: ("PINHOLE", 4, 2),
    2: ("SIMPLE_RADIAL", 4, 1),
    3: ("RADIAL", 5, 1),
    4: ("OPENCV", 8, 2),
    5: ("OPENCV_FISHEYE", 8, 2),
    6: ("FULL_OPENCV", 12, 2),
    7: ("FOV", 5, 2),
    8: ("SIMPLE_RADIAL_FISHEYE", 4, 1),
    9: ("RADIAL_FISHEYE", 5, 1),
    10: ("THIN_PRISM_FISHEYE", 12, 2),
}
NOT_PERSPECTIVE = {"OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE"}


@dataclass(frozen=True)
class ColmapImage:
    """``wxyz``, ``translation``: camera-from-world as COLMAP stores it. ``K`` 3x3 for an image of ``size`` (H, W)."""

    name: str
    wxyz: np.ndarray
    translation: np.ndarray
    K: np.ndarray
    size: tuple[int, int]


def is_colmap_model(folder: Path) -> bool:
    """Whether the folder holds cameras and images of a COLMAP model, text or binary."""
    return any((folder / f"cameras.{ext}").is_file() and (folder / f"images.{ext}").is_file() for ext in ("bin", "txt"))


def read_colmap(folder: Path) -> tuple[list[ColmapImage], np.ndarray | None]:
    """Images of a model and its sparse points ``[P, 3]`` float64 (None without a points3D file).

    Raises:
        UserError: no model there, damaged, or a camera model with distortion.
    """
    binary = (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file()
    if not binary and not is_colmap_model(folder):
        raise UserError(f"{folder} holds no COLMAP model; it needs cameras and images as .bin or .txt")
    try:
        images = _binary_images(folder) if binary else _text_images(folder)
        points = _binary_points(folder) if binary else _text_points(folder)
    except (struct.error, ValueError, IndexError, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the COLMAP model in {folder} is damaged ({error}); export it again") from None
    return images, points


def _pinhole(folder: Path, model: str, params: list[float], width: int, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    known = {name: (count, focals) for name, count, focals in MODELS.values()}
    if model not in known or model in NOT_PERSPECTIVE:
        raise UserError(f"{folder} uses the camera model {model}; undistort the photos first (colmap image_undistorter)")
    count, focals = known[model]
    if len(params) != count:
        raise ValueError(f"{model} with {len(params)} parameters")
    if any(abs(k) > 1e-12 for k in params[focals + 2 :]):
        raise UserError(f"the cameras in {folder} are distorted ({model}); undistort the photos first (colmap image_undistorter)")
    cx, cy = params[focals], params[focals + 1]
    return np.array([[params[0], 0, cx], [0, params[focals - 1], cy], [0, 0, 1.0]]), (height, width)


def _rows(path: Path) -> list[str]:
    """Lines that are not comments. Empty ones stay: an image without observations has an empty second line."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _text_images(folder: Path) -> list[ColmapImage]:
    cameras = {}
    for row in _rows(folder / "cameras.txt"):
        if row:
            key, model, width, height, *params = row.split()
            cameras[int(key)] = _pinhole(folder, model, [float(p) for p in params], int(width), int(height))
    images = []
    rows = _rows(folder / "images.txt")
    for row in rows[0::2]:
        if row:
            fields = row.split(maxsplit=9)
            pose = np.array([float(f) for f in fields[1:8]])
            images.append(ColmapImage(fields[9], pose[:4], pose[4:], *cameras[int(fields[8])]))
    return images


def _text_points(folder: Path) -> np.ndarray | None:
    path = folder / "points3D.txt"
    if not path.is_file():
        return None
    return np.array([[float(v) for v in row.split(maxsplit=4)[1:4]] for row in _rows(path) if row]).reshape(-1, 3)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 0

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("the file ends too early")

    def name(self) -> str:
        end = self.data.index(b"\0", self.at)
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text


def _binary_images(folder: Path) -> list[ColmapImage]:
    reader, cameras = _Reader(folder / "cameras.bin"), {}
    for _ in range(reader.take("Q")[0]):
        key, model, width, height = reader.take("iiQQ")
        name, count, _ = MODELS[model]
        cameras[key] = _pinhole(folder, name, list(reader.take(f"{count}d")), width, height)
    reader, images = _Reader(folder / "images.bin"), []
    for _ in range(reader.take("Q")[0]):
        _, *pose, camera = reader.take("i7di")
        name = reader.name()
        reader.skip(reader.take("Q")[0] * struct.calcsize("<ddq"))
        images.append(ColmapImage(name, np.array(pose[:4]), np.array(pose[4:]), *cameras[camera]))
    return images


def _binary_points(folder: Path) -> np.ndarray | None:
    path = folder / "points3D.bin"
    if not path.is_file():
        return None
    reader, points = _Reader(path), []
    for _ in range(reader.take("Q")[0]):
        points.append(reader.take("Q3d")[1:])
        reader.take("3Bd")
        reader.skip(reader.take("Q")[0] * struct.calcsize("<ii"))
    return np.array(points).reshape(-1, 3)
