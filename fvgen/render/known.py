"""Frames of a path whose image is known already."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fvgen.types import RenderClip


def put_photos(clip: RenderClip, photos: Tensor, frames: list[int]) -> RenderClip:
    """The clip with ``photos [N, 3, H, W]`` in place of the renders at ``frames``, as the teacher was trained on."""
    rgb = clip.rgb.clone()
    rgb[frames] = photos.to(rgb)
    return replace(clip, rgb=rgb)
