"""From one photo on, clip after clip: what was generated becomes photos for the geometry of the next clip (arXiv 2409.02048)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fvgen.geometry.resize import fit
from fvgen.geometry.trajectory import ELEVATED, Trajectory, parse_trajectory
from fvgen.pipeline import FVGenPipeline, Photos, Result, photo_set
from fvgen.types import Cameras, ImageSet, RenderClip, VideoClip
from fvgen.utils.errors import UserError
from fvgen.utils.stopwatch import Progress

ORIGINS = ("latest", "photo")
EVERY = 6  # frames between two that become photos


def explore(
    pipeline: FVGenPipeline,
    photo: Photos,
    paths: Sequence[str | Trajectory],
    origin: str = "latest",
    num_frames: int = 25,
    callback: Progress | None = None,
    **sampling: Any,
) -> list[Result]:
    """One clip per path. After each, some of its frames join the photo, and the geometry is estimated from all of them.

    Args:
        pipeline: with an estimator that needs one photo only, such as DUSt3R.
        photo: one, or the path of its file.
        paths: camera paths that start at one photo: orbit, spiral, dolly, target, txt, or nbv, which looks for the least known
            view. Their ``photo`` is set here.
        origin: "latest": each clip starts where the one before ended; "photo": all start at the photo.
        num_frames: of each clip; about every sixth of them and the last become photos.
        callback: called with (stage, fraction in [0, 1]).
        sampling: ``steps``, ``sampler``, ``seed`` of :meth:`FVGenPipeline.__call__`; the seed grows by one per clip.

    Returns:
        A result per clip, each in the world of its own geometry: the photo's camera, and the median depth of its points as unit.

    Raises:
        UserError: not one photo, no path, a path that does not start at a photo, or an estimator that needs more photos.
    """
    if origin not in ORIGINS:
        raise UserError(f"a path goes on from {' or '.join(ORIGINS)}, not from {origin!r}")
    if pipeline.estimator.fewest > 1:
        raise UserError("going on from one photo needs a geometry that makes do with one; give DUSt3R weights")
    parsed = [path if isinstance(path, Trajectory) else parse_trajectory(path) for path in paths]
    unfit = [path.name for path in parsed if path.name in ("smooth", "interp", "cameras")]
    if unfit or not parsed:
        raise UserError(f"the path {(unfit or ['none'])[0]} does not start at one photo; use orbit, dolly, target, txt or nbv")
    images = _one(photo)
    images, _ = fit(images, None, pipeline.clip_size(images))
    seed, tilt, results = sampling.pop("seed", 0), 0.0, []
    for number, path in enumerate(parsed):
        start = len(images) - 1 if origin == "latest" else 0
        numbers = {**path.numbers, "photo": start}
        if path.name in ELEVATED:
            numbers["elevation"] -= tilt
        result = pipeline(
            images, None, replace(path, numbers=numbers), num_frames, seed=seed + number, callback=callback, **sampling
        )
        results.append(result)
        followed = result.prepared.trajectory
        tilt += followed.numbers.get("theta", 0.0) if followed and origin == "latest" else 0.0
        if number + 1 < len(parsed):
            chosen = result.video.rgb[kept_frames(num_frames)].cpu()
            names = tuple(f"clip{number}-{frame}" for frame in kept_frames(num_frames))
            images = ImageSet(torch.cat([images.rgb, chosen]), (*images.names, *names))
    return results


def kept_frames(count: int) -> list[int]:
    """Which frames of a clip become photos: equally spaced, about every sixth, the last one always, the first never."""
    steps = math.ceil((count - 1) / EVERY)
    return [round(n * (count - 1) / steps) for n in range(1, steps + 1)]


def joined(results: Sequence[Result], origin: str = "latest") -> Result:
    """The clips of :func:`explore` one after the other; where one starts with the last frame of another, it is shown once.

    Cameras remain in the world of each clip's own geometry. Photos, scene and quality are those of the last clip.
    """
    skip = 1 if origin == "latest" else 0
    firsts = [skip if n else 0 for n in range(len(results))]

    def cut(name: str) -> Tensor:
        return torch.cat([getattr(r.renders, name)[first:] for r, first in zip(results, firsts, strict=True)])

    cameras = [r.cameras[slice(first, None)] for r, first in zip(results, firsts, strict=True)]
    K, poses = (torch.cat([getattr(c, name) for c in cameras]) for name in ("K", "world_from_cam"))
    renders = RenderClip(cut("rgb"), cut("depth"), cut("coverage"), Cameras(K, poses, cameras[0].image_size))
    video = torch.cat([r.video.rgb[first:] for r, first in zip(results, firsts, strict=True)])
    ends = [0, *accumulate(len(c) for c in cameras)]
    timings: dict[str, float] = {}
    for result in results:
        timings |= {stage: timings.get(stage, 0.0) + seconds for stage, seconds in result.timings.items()}
    segments = tuple(range(a - first, b) for (a, b), first in zip(pairwise(ends), firsts, strict=True))
    prepared = replace(
        results[-1].prepared, renders=renders, photo_frames=(0,), photo_indices=(0,), segments=segments, timings=timings
    )
    return Result(VideoClip(video), renders, renders.cameras, prepared, timings)


def _one(photo: Photos) -> ImageSet:
    images = photo_set(photo)
    if len(images) != 1:
        raise UserError(f"going on from one photo takes one photo, not {len(images)}; leave the others out")
    return replace(images, names=images.names or ("photo",))
