"""What flows between the stages: one frozen dataclass per arrow.

Conventions everywhere: OpenCV camera axes (x right, y down, z forward), ``world_from_cam`` rigid 4x4, intrinsics in pixels of
the image they belong to with pixel centres at +0.5, depth = z in the camera frame, colours float32 RGB in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Photographs of one size, or cut to that of the first.

    Attributes:
        rgb: ``[V, 3, H, W]`` float32 in [0, 1].
        names: one name per photo, usually the file path.
        focal_px: EXIF focal length per photo in pixels of ``rgb``, or None where the file does not tell.
        whole: where the photos differ in size, all of them uncut, ``[3, h, w]`` each; ``rgb`` is what
            :func:`fvgen.geometry.resize.fit` cuts from them. Else empty.
    """

    rgb: Tensor
    names: tuple[str, ...] = ()
    focal_px: tuple[float | None, ...] = ()
    whole: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.rgb.ndim != 4 or self.rgb.shape[1] != 3:
            raise ValueError(f"ImageSet.rgb must have shape [V, 3, H, W], got {tuple(self.rgb.shape)}")

    def __len__(self) -> int:
        return self.rgb.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.rgb.shape[2], self.rgb.shape[3]


@dataclass(frozen=True)
class Cameras:
    """Pinhole cameras that share one image size.

    Attributes:
        K: ``[V, 3, 3]`` intrinsics in pixels, pixel centres at +0.5.
        world_from_cam: ``[V, 4, 4]`` rigid, OpenCV axes, world units.
        image_size: (H, W) in pixels.
    """

    K: Tensor
    world_from_cam: Tensor
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.K.ndim != 3 or tuple(self.K.shape[1:]) != (3, 3):
            raise ValueError(f"Cameras.K must have shape [V, 3, 3], got {tuple(self.K.shape)}")
        if tuple(self.world_from_cam.shape) != (self.K.shape[0], 4, 4):
            raise ValueError(
                f"Cameras.world_from_cam must have shape [{self.K.shape[0]}, 4, 4], got {tuple(self.world_from_cam.shape)}"
            )

    def __len__(self) -> int:
        return self.K.shape[0]

    def __getitem__(self, index: slice | list[int]) -> Cameras:
        return replace(self, K=self.K[index], world_from_cam=self.world_from_cam[index])

    def to(self, device: str) -> Cameras:
        return replace(self, K=self.K.to(device), world_from_cam=self.world_from_cam.to(device))


@dataclass(frozen=True)
class GeometryQuality:
    """How far the geometry can be trusted; None where a figure does not apply to the estimator."""

    estimator: str
    shared_tracks: int | None = None
    reprojection_error_px: float | None = None
    triangulation_angle_deg: float | None = None
    view_angle_deg: float | None = None
    coverage: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Photographs with cameras and a 3-D point per pixel.

    Attributes:
        images: the photos that the point maps belong to, ``[V, 3, H, W]``; of several sizes, each in the middle, black around it.
        cameras: their cameras at the same (H, W).
        points: ``[V, H, W, 3]`` float32, world units; undefined where ``confidence`` is 0.
        confidence: ``[V, H, W]`` float32, 0 = no point.
        quality: figures about the estimate.
        frames: where the photos differ in size, the cameras of the photos cut to the frame of the first (``ImageSet.rgb``), at
            the size of the first among ``images``. Else None: those are ``cameras``.
    """

    images: ImageSet
    cameras: Cameras
    points: Tensor
    confidence: Tensor
    quality: GeometryQuality = field(default_factory=lambda: GeometryQuality("unknown"))
    frames: Cameras | None = None

    @property
    def photo_cameras(self) -> Cameras:
        """Cameras of the photos as they are shown, all in the frame of the first."""
        return self.cameras if self.frames is None else self.frames

    def cloud(self, min_confidence: float = 0.0, views: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Coloured cloud ``(points [P, 3], rgb [P, 3])`` of every pixel whose confidence exceeds ``min_confidence``."""
        pick = slice(None) if views is None else views
        keep = self.confidence[pick] > min_confidence
        return self.points[pick][keep], self.images.rgb[pick].permute(0, 2, 3, 1)[keep]


@dataclass(frozen=True)
class RenderClip:
    """Point-cloud renders along a camera path.

    Attributes:
        rgb: ``[T, 3, H, W]`` float32 in [0, 1], black where nothing was hit.
        depth: ``[T, H, W]`` z of the nearest point, world units, 0 where nothing was hit.
        coverage: ``[T, H, W]`` bool, True where at least one point was hit.
        cameras: the ``T`` target cameras.
    """

    rgb: Tensor
    depth: Tensor
    coverage: Tensor
    cameras: Cameras


@dataclass(frozen=True)
class Condition:
    """What the network sees besides the noisy latents.

    Attributes:
        latents: ``[B, C, T, h, w]`` scaled VAE latents of the render clip.
        context: ``[B, 77 + N, D]`` text tokens followed by projected image tokens.
        uncond_context: the same for the empty prompt and a grey image; None without guidance.
        fps: ``[B]`` int64.
    """

    latents: Tensor
    context: Tensor
    uncond_context: Tensor | None
    fps: Tensor


@dataclass(frozen=True)
class VideoClip:
    """Generated frames ``[T, 3, H, W]`` float32 in [0, 1]."""

    rgb: Tensor
