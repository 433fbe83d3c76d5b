"""Known cameras from ``transforms.json`` (nerfstudio / instant-ngp) or a COLMAP model folder, and writing them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fvgen.geometry.conventions import opencv_from_opengl, opengl_from_opencv, world_from_cam_of_colmap
from fvgen.io.colmap import read_colmap
from fvgen.io.images import image_size as size_of_file
from fvgen.types import Cameras
from fvgen.utils.errors import UserError

DISTORTION = ("k1", "k2", "p1", "p2", "k3")  # in OpenCV's order


@dataclass(frozen=True)
class CameraEntry:
    """One camera of a file: K 3x3 for ``size`` (H, W), or the horizontal angle alone where the file states no size.

    ``distortion``: k1, k2, p1, p2, k3 as OpenCV defines them, empty for a pinhole.
    """

    name: str
    world_from_cam: np.ndarray
    K: np.ndarray | None
    size: tuple[int, int] | None
    angle_x: float | None = None
    distortion: tuple[float, ...] = ()


def read_cameras(path: str | PathLike[str], image_names: Sequence[str], image_size: tuple[int, int] | None = None) -> Cameras:
    """Cameras of the named photos, in their order.

    Args:
        path: a ``transforms.json`` file, a folder with one, or a COLMAP model folder (text or binary).
        image_names: photo paths; matched by longest common path ending, file name, then file name without its extension.
        image_size: (H, W) of the photos as they will be used; read from the photo files when left out.

    Returns:
        ``K`` in pixels of the photos (rescaled where the file speaks of another size with the same aspect),
        ``world_from_cam`` float32 with OpenCV axes.

    Raises:
        UserError: file missing or damaged, distorted cameras, a photo that the file does not have, another aspect, bad pose.
    """
    entries = read_entries(Path(path))
    chosen = [_find(entries, name, path) for name in image_names]
    if image_size is None:
        image_size = _photo_size(image_names, chosen)
    if any(entry.distortion for entry in chosen):
        raise UserError(
            f"the cameras in {path} are distorted (k or p is not 0); undistort the photos first (ns-process-data or colmap)"
        )
    K = np.stack([intrinsics(entry, image_size, path) for entry in chosen])
    poses = np.stack([checked_pose(entry, path) for entry in chosen])
    return Cameras(K=torch.from_numpy(K).float(), world_from_cam=torch.from_numpy(poses).float(), image_size=image_size)


def read_entries(path: Path) -> list[CameraEntry]:
    """All cameras of a file, unmatched and unchecked."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a transforms.json file or a COLMAP model folder")
    if path.is_dir() and (path / "transforms.json").is_file():
        path = path / "transforms.json"
    if path.is_file():
        return _transforms_entries(path)
    images, _ = read_colmap(path)
    return [
        CameraEntry(
            i.name,
            world_from_cam_of_colmap(torch.from_numpy(i.wxyz), torch.from_numpy(i.translation)).numpy(),
            i.K,
            i.size,
        )
        for i in images
    ]


def _transforms_entries(path: Path) -> list[CameraEntry]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [_transforms_entry(data, frame, path) for frame in data["frames"]]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a transforms.json camera file ({type(error).__name__}: {error}); export it again"
        ) from None


def _transforms_entry(data: dict[str, Any], frame: dict[str, Any], path: Path) -> CameraEntry:
    values = {**data, **frame}
    model = str(values.get("camera_model", "PINHOLE"))
    if "FISHEYE" in model or "EQUIRECTANGULAR" in model or values.get("is_fisheye"):
        raise UserError(f"{path} uses the camera model {model}; undistort the photos first (ns-process-data or colmap)")
    if abs(float(values.get("k4") or 0.0)) > 1e-12:
        raise UserError(f"{path} has a distortion k4; undistort the photos first (ns-process-data or colmap)")
    distortion = tuple(float(values.get(key) or 0.0) for key in DISTORTION)
    if all(abs(value) <= 1e-12 for value in distortion):
        distortion = ()
    size = (round(float(values["h"])), round(float(values["w"]))) if values.get("w") and values.get("h") else None
    pose = np.array(values["transform_matrix"], dtype=np.float64)
    if pose.shape == (3, 4):
        pose = np.vstack([pose, [0, 0, 0, 1]])
    if pose.shape != (4, 4):
        raise UserError(f"{path}: transform_matrix of {values.get('file_path')} is not 4x4; export the cameras again")
    world_from_cam = opencv_from_opengl(torch.from_numpy(pose)).numpy()
    name = str(values["file_path"])
    fl_x, fl_y = values.get("fl_x"), values.get("fl_y")
    focal_x = fl_y if fl_x is None else fl_x
    angle = values.get("camera_angle_x")
    if focal_x is not None and size is not None:
        focal_y = float(focal_x if fl_y is None else fl_y)
        cx, cy = float(values.get("cx", size[1] / 2)), float(values.get("cy", size[0] / 2))
        K = np.array([[float(focal_x), 0, cx], [0, focal_y, cy], [0, 0, 1.0]])
        return CameraEntry(name, world_from_cam, K, size, distortion=distortion)
    if focal_x is not None and "cx" in values and "cy" in values:
        raise UserError(f"{path} gives fl_x but no w and h; add the image size the focal length belongs to")
    if angle is None:
        raise UserError(f"{path} gives neither fl_x with w and h nor camera_angle_x; add one of them")
    return CameraEntry(name, world_from_cam, None, size, float(angle), distortion)


def _find(entries: list[CameraEntry], name: str, path: str | PathLike[str]) -> CameraEntry:
    wanted = PurePosixPath(Path(name).as_posix())
    by_name = [e for e in entries if _posix(e.name).name == wanted.name]
    by_stem = [e for e in entries if _stem(_posix(e.name)) == wanted.stem]
    found = by_name or by_stem
    if not found:
        raise UserError(f"the photo {name} is not in the camera file {path}; it lists {_some_names(entries)}")
    if len(found) == 1:
        return found[0]
    parts = [_common_ending(_posix(e.name), wanted) for e in found]
    if parts.count(max(parts)) > 1:
        raise UserError(f"the camera file {path} has several photos named {wanted.name}; give the photos unique names")
    return found[parts.index(max(parts))]


def _posix(name: str) -> PurePosixPath:
    return PurePosixPath(name.replace("\\", "/"))


def _stem(path: PurePosixPath) -> str:
    """File name without an image extension; other dots belong to the name."""
    return path.stem if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp") else path.name


def _common_ending(a: PurePosixPath, b: PurePosixPath) -> int:
    folders = list(zip(reversed(a.parts[:-1]), reversed(b.parts[:-1]), strict=False))
    return next((i for i, (x, y) in enumerate(folders) if x != y), len(folders))


def _some_names(entries: list[CameraEntry]) -> str:
    names = [e.name for e in entries]
    return "nothing" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _photo_size(image_names: Sequence[str], chosen: list[CameraEntry]) -> tuple[int, int]:
    sizes = []
    for name, entry in zip(image_names, chosen, strict=True):
        if Path(name).is_file():
            sizes.append(size_of_file(name))
        elif entry.size is not None:
            sizes.append(entry.size)
        else:
            raise UserError(f"the size of {name} is unknown; give the photo file or add w and h to the camera file")
    if len(set(sizes)) > 1:
        raise UserError("the photos differ in size; bring all photos to one size and orientation")
    return sizes[0]


def intrinsics(entry: CameraEntry, image_size: tuple[int, int], path: str | PathLike[str]) -> np.ndarray:
    """``K`` 3x3 of a camera for its photo resampled to ``image_size`` (H, W); ``path`` is the file to blame.

    Raises:
        UserError: another aspect than the camera was made for, or an impossible focal length or principal point.
    """
    height, width = image_size
    if entry.size is not None:
        scale_y, scale_x = height / entry.size[0], width / entry.size[1]
        # A size rounded to whole pixels may change the aspect by up to about one pixel.
        if abs(scale_x / scale_y - 1) > 1.5 / min(height, width) + 1e-6:
            raise UserError(
                f"{entry.name} is {width}x{height} but {path} speaks of {entry.size[1]}x{entry.size[0]}; "
                "give the photos in the aspect ratio the cameras were made for"
            )
    if entry.K is not None and entry.size is not None:
        K = np.array([[scale_x], [scale_y], [1.0]]) * entry.K
    else:
        assert entry.angle_x is not None
        if not 0.0 < entry.angle_x < math.pi:
            raise UserError(f"{path}: camera_angle_x must lie between 0 and pi radians; correct it")
        focal = 0.5 * width / math.tan(0.5 * entry.angle_x)
        K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    if not np.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0:
        raise UserError(f"{path} has an impossible focal length or principal point for {entry.name}; correct it")
    return K


def checked_pose(entry: CameraEntry, path: str | PathLike[str]) -> np.ndarray:
    """``world_from_cam`` 4x4 of a camera with an exact rotation; UserError where it has NaN or is not rigid."""
    pose = entry.world_from_cam
    if not np.isfinite(pose).all():
        raise UserError(f"{path} has a pose with NaN or infinity for {entry.name}; export the cameras again")
    rotation = pose[:3, :3]
    rigid = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) and np.linalg.det(rotation) > 0
    if not rigid or not np.allclose(pose[3], [0, 0, 0, 1], atol=1e-6):
        raise UserError(
            f"the pose of {entry.name} in {path} is not a rotation and a translation; remove scale, shear or mirroring"
        )
    u, _, vt = np.linalg.svd(rotation)
    return np.block([[u @ vt, pose[:3, 3:]], [np.zeros((1, 3)), np.ones((1, 1))]])


def write_transforms(path: str | PathLike[str], cameras: Cameras, names: Sequence[str]) -> None:
    """Write a nerfstudio-compatible ``transforms.json``: per-frame intrinsics, camera-to-world with OpenGL axes."""
    if len(names) != len(cameras):
        raise ValueError(f"write_transforms needs one name per camera, got {len(names)} names and {len(cameras)} cameras")
    height, width = cameras.image_size
    poses: Tensor = opengl_from_opencv(cameras.world_from_cam.double())
    frames = []
    for name, K, pose in zip(names, cameras.K.double().tolist(), poses.tolist(), strict=True):
        intrinsics = {"fl_x": K[0][0], "fl_y": K[1][1], "cx": K[0][2], "cy": K[1][2], "w": width, "h": height}
        frames.append({"file_path": str(name), **intrinsics, "transform_matrix": pose})
    data = {"camera_model": "PINHOLE", "w": width, "h": height, "frames": frames}
    Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
