"""How near a clip comes to the true frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvgen.evaluation.metrics import psnr
from fvgen.types import Cameras


def frames_to_score(count: int, photo_frames: tuple[int, ...]) -> list[int]:
    """Frames strictly between photos; for a path that meets fewer than two, all that show no photo."""
    inside = range(photo_frames[0], photo_frames[-1]) if len(photo_frames) > 1 else range(count)
    return [f for f in inside if f not in photo_frames]


def nearer_photo(path: Cameras, photos: Cameras) -> list[int]:
    """For every frame the photo that was taken nearest to it."""
    path_at, photos_at = path.world_from_cam[:, :3, 3].double().cpu(), photos.world_from_cam[:, :3, 3].double().cpu()
    return torch.cdist(path_at, photos_at).argmin(1).tolist()


def compare(clips: dict[str, Tensor], truth: Tensor, covered: Tensor, scored: list[int]) -> dict[str, Any]:
    """PSNR in dB, over whole frames and, as ``NAME_covered``, over the pixels that a point covers.

    Args:
        clips: name to ``[T, 3, H, W]``.
        truth: ``[T, 3, H, W]``.
        covered: ``[T, H, W]`` bool.
        scored: the frames that count.

    Returns:
        ``{"frames": [...], name: {"mean": dB, "per_frame": [dB]}}``; None where a frame has no covered pixel or no error at all.
    """
    truth, covered = truth[scored].cpu(), covered[scored].cpu()
    result: dict[str, Any] = {"frames": scored}
    for name, clip in clips.items():
        for suffix, mask in (("", None), ("_covered", covered)):
            values = psnr(clip[scored].cpu(), truth, mask)
            finite = values[values.isfinite()]
            per_frame = [round(v, 4) if abs(v) < float("inf") else None for v in values.nan_to_num(float("inf")).tolist()]
            mean = round(float(finite.mean()), 4) if len(finite) else None
            result[name + suffix] = {"mean": mean, "per_frame": per_frame}
    return result
