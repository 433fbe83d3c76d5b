"""Training pairs as the paper builds them: a cloud of the two end frames with imperfect depth, rendered along the path.

The target is the true frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.data.synthetic.depth import backproject, imperfect_depth, seen_by
from fvgen.data.synthetic.raycast import Shade, render_view, shade_rays
from fvgen.data.synthetic.world import Paths, Worlds, sample_paths, sample_worlds
from fvgen.render import render_scene
from fvgen.types import Cameras
from fvgen.utils.hash_random import HashRandom

_SUPERSAMPLING = 2
_PHOTO_SCALE = 2  # point maps are denser than the clip, as at inference


@dataclass(frozen=True)
class ClipPairs:
    """``B`` clips with their renders.

    Attributes:
        target: ``[B, T, 3, H, W]`` true frames in [0, 1].
        render: ``[B, T, 3, H, W]`` point-cloud renders; the first and last frame are the photos.
        coverage: ``[B, T, H, W]`` bool, hit by a point.
        cameras: one ``Cameras`` per clip, metres.
    """

    target: Tensor
    render: Tensor
    coverage: Tensor
    cameras: tuple[Cameras, ...]


@cache
def _shader(compile: bool) -> Shade:
    return torch.compile(shade_rays, dynamic=False) if compile else shade_rays


def intrinsics(focal: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, 3, 3]`` from focal lengths ``[B]`` in units of the long side, principal point in the middle."""
    height, width = size
    K = torch.zeros(focal.shape[0], 3, 3, device=focal.device)
    K[:, 0, 0] = K[:, 1, 1] = focal * max(size)
    K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = width / 2, height / 2, 1
    return K


def _true_clip(worlds: Worlds, paths: Paths, size: tuple[int, int], compile: bool) -> Tensor:
    """Antialiased frames along the paths, ``[B, T, 3, H, W]``."""
    fine = (size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING)
    K = intrinsics(paths.focal, fine)
    views = (render_view(worlds, pose, K, fine, _shader(compile))[0] for pose in paths.world_from_cam.unbind(1))
    return torch.stack([F.avg_pool2d(view, _SUPERSAMPLING) for view in views], 1)


def synthetic_frames(seeds: Tensor, size: tuple[int, int], frames: int = 1, compile: bool = False) -> Tensor:
    """True frames ``[B, T, 3, H, W]`` of the worlds ``seeds [B]``, without depth or renders."""
    paths = sample_paths(seeds, max(frames, 2))
    paths = replace(paths, world_from_cam=paths.world_from_cam[:, :frames])
    return _true_clip(sample_worlds(seeds, paths), paths, size, compile)


def synthetic_pairs(
    seeds: Tensor, size: tuple[int, int], frames: int = 16, compile: bool = False, compositor: str = "norm"
) -> ClipPairs:
    """Pairs of the worlds ``seeds``; the same seed gives the same pair in any batch.

    Args:
        seeds: ``[B]`` int64; its device does the work.
        size: (H, W) of the clip.
        frames: T.
        compile: fuse the ray caster with torch.compile (worth it on a GPU for many batches).
        compositor: how the points are blended, see :func:`fvgen.render.render_points`.
    """
    paths = sample_paths(seeds, frames)
    worlds = sample_worlds(seeds, paths)
    target = _true_clip(worlds, paths, size, compile)
    K, poses = intrinsics(paths.focal, size), paths.world_from_cam
    photo_size = (size[0] * _PHOTO_SCALE, size[1] * _PHOTO_SCALE)
    K_photo = intrinsics(paths.focal, photo_size)
    ends = (0, frames - 1)
    photos = [render_view(worlds, poses[:, t], K_photo, photo_size, _shader(compile)) for t in ends]
    true_points = [backproject(photos[i][1], K_photo, poses[:, t]) for i, t in enumerate(ends)]
    clouds = []
    for i, t in enumerate(ends):
        rgb, depth = photos[i]
        visible = seen_by(true_points[i], photos[1 - i][1], K_photo, poses[:, ends[1 - i]])
        noisy, valid = imperfect_depth(HashRandom(seeds, stream=3 + i), depth, rgb, visible)
        points = backproject(noisy, K_photo, poses[:, t])
        points = torch.where(valid[..., None], points, torch.nan)  # never hit; picking them out would wait for the GPU
        clouds.append((points.flatten(1, 2), rgb.permute(0, 2, 3, 1).flatten(1, 2)))
    points, colours = (torch.cat(parts, 1) for parts in zip(*clouds, strict=True))

    renders, coverage, cameras = [], [], []
    for b in range(seeds.shape[0]):
        path = Cameras(K[b].expand(frames, 3, 3).contiguous(), poses[b], size)
        clip = render_scene(points[b], colours[b], path, compositor=compositor)
        renders.append(clip.rgb)
        coverage.append(clip.coverage)
        cameras.append(path)
    render = torch.stack(renders)
    render[:, 0], render[:, -1] = target[:, 0], target[:, -1]
    return ClipPairs(target, render, torch.stack(coverage), tuple(cameras))
