"""Which clips a capture gives, and their pixels and cameras."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvgen.data.layouts.capture import Capture, Frame
from fvgen.io import read_images
from fvgen.io.cameras import checked_pose, intrinsics
from fvgen.types import Cameras, ImageSet
from fvgen.utils.errors import UserError

MAX_SIDE = 2048  # larger photos are shrunk while they are read: no clip size and no geometry needs more


class Rejected(Exception):
    """A clip that is left out: ``reason`` is one of a few words to count by, ``detail`` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@contextmanager
def rejected_as(reason: str) -> Iterator[None]:
    """Bad input within the block rejects the clip instead of ending the run."""
    try:
        yield
    except UserError as error:
        raise Rejected(reason, str(error)) from None


@dataclass(frozen=True)
class Clip:
    """Every ``stride``-th frame of the capture ``scene`` from ``first`` on; ``number`` counts the scene's clips."""

    scene: str
    number: int
    first: int
    stride: int

    def frames(self, count: int) -> range:
        """The positions of its ``count`` frames in the capture."""
        return range(self.first, self.first + (count - 1) * self.stride + 1, self.stride)


@dataclass(frozen=True)
class ClipPhotos:
    """A clip as it was photographed, without lens distortion.

    Attributes:
        images: ``[T, 3, H, W]``.
        cameras: ``T`` at the same (H, W).
        depth: ``[2, h, w]`` float32 z-depth of the first and last frame in world units, not positive where unknown; None if the
            capture has none. It shows what the photos show, at its own resolution.
    """

    images: ImageSet
    cameras: Cameras
    depth: Tensor | None


def choose_clips(seed: int, scene: str, available: int, frames: int, max_stride: int, count: int) -> list[Clip]:
    """Up to ``count`` different clips of a scene, the same in every process.

    Each draws its stride uniformly from 1 .. ``max_stride``, as far as ``frames`` frames fit into the ``available`` ones and a
    start is left, and then one of the starts that are left. The first clips do not depend on ``count``.
    """
    starts = {s: list(range(available - (frames - 1) * s)) for s in range(1, max_stride + 1)}
    clips = []
    for number in range(count):
        fitting = [s for s, left in starts.items() if left]
        if not fitting:
            break
        stride = fitting[_draw(seed, scene, number, "stride") % len(fitting)]
        left = starts[stride]
        clips.append(Clip(scene, number, left.pop(_draw(seed, scene, number, "first") % len(left)), stride))
    return clips


def _draw(*key: object) -> int:
    """64 random bits that depend on the key alone."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, key)).encode()).digest()[:8], "little")


def clip_poses(capture: Capture, frames: Sequence[int]) -> Tensor:
    """``world_from_cam [T, 4, 4]`` float64 of frames; Rejected where one is not finite or not rigid."""
    with rejected_as("bad camera"):
        poses = [checked_pose(capture.frames[i].camera, capture.cameras) for i in frames]
    return torch.from_numpy(np.stack(poses))


def clip_cameras(capture: Capture, frames: Sequence[int], image_size: tuple[int, int]) -> Cameras:
    """Cameras of frames for images of ``image_size`` (H, W), distortion aside; Rejected where they cannot be."""
    with rejected_as("bad camera"):
        K = [intrinsics(capture.frames[i].camera, image_size, capture.cameras) for i in frames]
    return Cameras(torch.from_numpy(np.stack(K)).float(), clip_poses(capture, frames).float(), image_size)


def load_clip(capture: Capture, frames: Sequence[int], with_depth: bool = True) -> ClipPhotos:
    """Reads the frames of a clip; those with lens distortion come out as a pinhole camera sees them.

    Args:
        capture: the scene.
        frames: positions of the clip's frames in it.
        with_depth: also read the depth of the first and last frame, where both have one.

    Raises:
        Rejected: an image or depth map that is missing, damaged or of another size; bad cameras.
    """
    chosen = [capture.frames[i] for i in frames]
    with rejected_as("unreadable image"):
        images = read_images([f.image for f in chosen], max_side=MAX_SIDE)
    cameras = clip_cameras(capture, frames, images.size)
    depth = _end_depth(chosen[0], chosen[-1]) if with_depth else []
    lenses = [f.camera.distortion for f in chosen]
    if any(lenses):
        depth = [_straighten(d, cameras.K[at], images.size, lenses[at])[0] for d, at in zip(depth, (0, -1), strict=False)]
        seen = zip(images.rgb.permute(0, 2, 3, 1).numpy(), cameras.K, lenses, strict=True)
        straight = [_straighten(rgb, K, images.size, lens) for rgb, K, lens in seen]
        rgb = torch.from_numpy(np.stack([image for image, _ in straight])).permute(0, 3, 1, 2).contiguous()
        images, cameras = replace(images, rgb=rgb), replace(cameras, K=torch.stack([K for _, K in straight]))
    return ClipPhotos(images, cameras, torch.from_numpy(np.stack(depth)) if depth else None)


def _end_depth(first: Frame, last: Frame) -> list[np.ndarray]:
    """Depth of two frames, empty where one has none."""
    if first.depth is None or last.depth is None:
        return []
    with rejected_as("unreadable depth"):
        depth = [read_depth(f.depth, f.depth_unit) for f in (first, last) if f.depth is not None]
    if depth[0].shape != depth[1].shape:
        raise Rejected("unreadable depth", f"{first.depth} and {last.depth} differ in size")
    return depth


def read_depth(path: Path, unit: float) -> np.ndarray:
    """``[h, w]`` float32 in world units of an image or ``.npy`` file whose values count ``unit`` each; 0 where not finite.

    Raises:
        UserError: missing, damaged or not a single channel.
    """
    import cv2

    if not path.is_file():
        raise UserError(f"the depth map {path} does not exist; export it again")
    try:
        values = np.load(path, allow_pickle=False) if path.suffix == ".npy" else cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except (OSError, ValueError, EOFError, cv2.error) as error:
        raise UserError(f"the depth map {path} is damaged ({error}); export it again") from None
    if values is None or np.squeeze(values).ndim != 2 or values.dtype.kind not in "uif":
        raise UserError(f"the depth map {path} is not a readable image or array with one channel; export it again")
    depth = np.squeeze(values).astype(np.float32) * np.float32(unit)
    return np.where(np.isfinite(depth), depth, 0)


def _straighten(image: np.ndarray, K: Tensor, size: tuple[int, int], distortion: tuple[float, ...]) -> tuple[np.ndarray, Tensor]:
    """Undistorted ``image`` (``[h, w, 3]`` colour or ``[h, w]`` depth) and its new ``K``.

    ``K`` belongs to images of ``size``. The new one shows only what the lens has seen, so that no border is left empty.
    """
    import cv2

    if not distortion:
        return image, K
    half = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # OpenCV counts pixel centres as whole numbers
    lens = np.array(distortion)
    new = cv2.getOptimalNewCameraMatrix(K.double().numpy() - half, lens, (size[1], size[0]), 0)[0] + half
    scale = np.diag([image.shape[1] / size[1], image.shape[0] / size[0], 1.0])
    old_here, new_here = scale @ K.double().numpy() - half, scale @ new - half
    maps = cv2.initUndistortRectifyMap(old_here, lens, None, new_here, (image.shape[1], image.shape[0]), cv2.CV_32FC1)
    method = cv2.INTER_LINEAR if image.ndim == 3 else cv2.INTER_NEAREST
    return cv2.remap(image, *maps, method, borderMode=cv2.BORDER_REPLICATE), torch.from_numpy(new).to(K)
