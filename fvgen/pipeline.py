"""Photos to video: the one file that knows every stage."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.diffusion.noise import NoiseSource
from fvgen.estimators import ClassicalEstimator, Estimator, make_estimator
from fvgen.geometry.coincide import coincident_photos
from fvgen.geometry.mixed import read_mixed_images
from fvgen.geometry.resize import fit, fit_cameras, scale_cameras
from fvgen.geometry.trajectory import Trajectory, next_view_targets, parse_trajectory, target_cameras
from fvgen.io import read_cameras, read_images
from fvgen.render import put_photos, render_scene
from fvgen.sampling import ModelSampler, choose_sampling
from fvgen.types import Cameras, ImageSet, RenderClip, Scene, VideoClip
from fvgen.utils.device import choose_device
from fvgen.utils.errors import UserError
from fvgen.utils.stopwatch import Progress, Stopwatch
from fvgen.workers import Workers

Photos = ImageSet | Tensor | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
BUNDLED = {name: Path(__file__).parent / "assets" / name for name in ("tiny", "tiny_teacher")}
MAX_FRAMES = 64  # generated together
BATCH_PIXELS = 4 * 16 * 320 * 512  # of all clips generated together: more at once is hardly faster and takes more memory


@dataclass(frozen=True)
class Prepared:
    """Everything up to the renders.

    Attributes:
        scene: photos, cameras and point maps at the working resolution of the geometry.
        photos: ``[V, 3, H, W]`` the photos at the size of the clip.
        renders: the clip; frames that coincide with a photo hold the photo.
        photo_frames: the frames that coincide with a photo, ascending; empty when the path meets none.
        photo_indices: which photo each of them shows.
        segments: frame ranges that are generated together; neighbours share one frame.
        timings: seconds per stage.
        trajectory: the path that was followed; a next best view shows as the target that was chosen.
    """

    scene: Scene
    photos: Tensor
    renders: RenderClip
    photo_frames: tuple[int, ...]
    photo_indices: tuple[int, ...]
    segments: tuple[range, ...]
    timings: dict[str, float]
    trajectory: Trajectory | None = None


@dataclass(frozen=True)
class Result:
    """What the pipeline returns.

    Attributes:
        video: the generated frames ``[T, 3, H, W]`` in [0, 1].
        renders: the point-cloud renders they were made from.
        cameras: the ``T`` cameras of the frames.
        prepared: photos, geometry and segments behind them.
        timings: seconds per stage.
    """

    video: VideoClip
    renders: RenderClip
    cameras: Cameras
    prepared: Prepared
    timings: dict[str, float] = field(default_factory=dict)


def prepare(
    images: Photos,
    cameras: Cameras | str | os.PathLike[str] | None = None,
    trajectory: str | Trajectory = "smooth",
    num_frames: int = 16,
    size: tuple[int, int] | list[tuple[int, int]] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    *,
    estimator: Estimator | None = None,
    compositor: str = "norm",
    radius: float = 0.01,
    points_per_pixel: int = 10,
) -> Prepared:
    """Photos to renders along a camera path; needs no model.

    Args:
        images: two or more overlapping photos in the order in which neighbours overlap: paths, ``[V, 3, H, W]`` in [0, 1],
            or an ``ImageSet``. One suffices for DUSt3R, and then its path. With DUSt3R and without ``cameras`` files may differ
            in size; the clip has the frame of the first.
        cameras: their cameras (at the photos' size), or a ``transforms.json`` or COLMAP model to read them from; estimated
            if None.
        trajectory: see ``fvgen generate --help``; "smooth" passes through all photos.
        num_frames: frames per segment, that is, between neighbouring photos with both of them.
        size: (H, W) of the renders; of a list of sizes the one with the photos' aspect; None takes the working resolution of
            the geometry.
        device: where the points are rendered.
        progress: called with (stage, fraction in [0, 1]).
        estimator: makes the scene, see :func:`fvgen.estimators.make_estimator`; None takes the classical one.
        compositor, radius, points_per_pixel: how points become pixels, see :func:`fvgen.render.render_points`.

    Raises:
        UserError: bad photos, cameras, path or sizes.
    """
    if not 2 <= num_frames <= MAX_FRAMES:
        raise UserError(f"a clip has 2 to {MAX_FRAMES} frames between two photos, not {num_frames}; change --frames")
    parsed = parse_trajectory(trajectory) if isinstance(trajectory, str) else trajectory
    options: dict[str, Any] = {"compositor": compositor, "radius": radius, "points_per_pixel": points_per_pixel}
    watch = Stopwatch(torch.device(device), progress)
    with watch.stage("read"):
        photos = photo_set(images, cameras is None and getattr(estimator, "mixed", False))
        known = read_cameras(cameras, photos.names) if isinstance(cameras, str | os.PathLike) else cameras
    with watch.stage("geometry") as report:
        scene = (estimator or ClassicalEstimator())(photos, known, progress=report)
    with watch.stage("path"):
        clip_size = nearest_aspect(size, photos.size) if isinstance(size, list) else size or scene.photo_cameras.image_size
        full_size = replace(scene, cameras=scale_cameras(scene.photo_cameras, photos.size))
        if parsed.name == "nbv":
            parsed = _next_view(full_size, parsed, clip_size, torch.device(device), options)
        path = target_cameras(full_size, parsed, num_frames)
        shown = coincident_photos(path, full_size.cameras)
        path, (fitted, _) = fit_cameras(path, clip_size), fit(photos, None, clip_size)
    with watch.stage("render") as report:
        renders = _render(scene, path, torch.device(device), options, report)
        if shown:
            renders = put_photos(renders, fitted.rgb[list(shown.values())], list(shown))
    cuts = sorted({0, *shown, len(path) - 1})
    segments = tuple(range(a, b + 1) for a, b in pairwise(cuts))
    return Prepared(scene, fitted.rgb, renders, tuple(shown), tuple(shown.values()), segments, watch.timings, parsed)


def _next_view(
    scene: Scene, path: Trajectory, size: tuple[int, int], device: torch.device, options: dict[str, Any]
) -> Trajectory:
    """The target whose view the points cover least; the first of equals."""
    targets = next_view_targets(path)
    ends = [target_cameras(scene, target, 2) for target in targets]
    poses = torch.cat([end.world_from_cam[-1:] for end in ends])
    views = fit_cameras(replace(ends[0], K=ends[0].K[-1:].expand(len(ends), -1, -1), world_from_cam=poses), size)
    covered = _render(scene, views, device, options, lambda _stage, _fraction: None).coverage.float().mean((1, 2))
    return targets[int(covered.argmin())]


def _render(scene: Scene, path: Cameras, device: torch.device, options: dict[str, Any], report: Progress) -> RenderClip:
    """A few frames at a time, which bounds memory and shows progress."""
    points, rgb = (x.to(device) for x in scene.cloud())
    height, width = path.image_size
    chunk = max(1, (2**25 if device.type == "cuda" else 2**17) // (height * width))
    parts = []
    for first in range(0, len(path), chunk):
        report("render", first / len(path))
        parts.append(render_scene(points, rgb, path[first : first + chunk].to(str(device)), **options))
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("rgb", "depth", "coverage")}
    return RenderClip(**joined, cameras=path.to(str(device)))


class FVGenPipeline:
    """Photographs to novel-view video.

    Example:
        >>> pipe = FVGenPipeline.from_pretrained("tiny")
        >>> result = pipe(["left.jpg", "right.jpg"])
        >>> result.video.rgb.shape
        torch.Size([16, 3, 160, 256])
    """

    def __init__(
        self,
        bundle: Any,
        device: str | torch.device = "cpu",
        fast: bool = False,
        estimator: Estimator | None = None,
        cpu_offload: bool = False,
    ) -> None:
        self.bundle, self._fast, self.estimator = bundle, fast, estimator or ClassicalEstimator()
        self._offload = cpu_offload
        self.device = torch.device(device)
        self._sampler: ModelSampler | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str] = "tiny",
        device: str = "auto",
        fast: bool = False,
        geometry: str = "auto",
        dust3r_weights: str | os.PathLike[str] | None = None,
        cpu_offload: bool = False,
        min_confidence: float | None = None,
        verify: bool = False,
        prompt: str | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> FVGenPipeline:
        """Loads a model.

        Args:
            name_or_dir: "tiny" (bundled) or a model directory.
            device: "auto" (CUDA if there is a GPU), "cpu", "cuda", "cuda:1", ...
            fast: approximate every second step of the few-step sampler, see :class:`fvgen.inference.clip.ClipEngine`.
            geometry: "classical", "dust3r", or "auto": DUSt3R where its weights are given.
            dust3r_weights: directory written by ``fvgen convert dust3r``.
            cpu_offload: for GPUs with little memory: what a stage does not need stays in the processor's memory, see
                :class:`fvgen.inference.clip.ClipEngine`; slower.
            min_confidence: DUSt3R's pixels at or below it get no point; None = log 3, of values above 1.
            verify: compare the files of the model, and of DUSt3R, with their checksums first.
            prompt: text in the place of the one that the model was trained with; the model has to have its text tower.
            tokenizer: folder with the files of CLIP's tokenizer, for a prompt of your own.

        Raises:
            UserError: unknown name, incomplete directory, no such device, a file that differs from its checksum, a prompt that
                the model cannot read.
        """
        from fvgen.models.bundle import ModelBundle
        from fvgen.models.prompts import check_prompt, embed_prompt
        from fvgen.models.tokenizer import PROMPT

        model = find_model(name_or_dir)
        check_prompt(model, prompt, tokenizer)
        chosen = choose_device(device)
        estimator = make_estimator(geometry, dust3r_weights, chosen, cpu_offload, min_confidence, verify)
        place = "cpu" if cpu_offload else chosen
        bundle = ModelBundle.from_pretrained(model, device=place, verify=verify)
        if prompt == "":
            bundle.prompt = bundle.empty
        elif prompt not in (None, PROMPT):
            bundle.prompt = embed_prompt(model, str(prompt), tokenizer).to(bundle.prompt)
        return cls(bundle, chosen, fast, estimator, cpu_offload)

    def clip_size(self, images: Photos) -> tuple[int, int]:
        """(H, W) of the clip the model makes of these photos: portrait for portrait photos where the model knows that."""
        return nearest_aspect(self.bundle.index.sizes(), photo_set(images, getattr(self.estimator, "mixed", False)).size)

    def __call__(
        self,
        images: Photos,
        cameras: Cameras | str | os.PathLike[str] | None = None,
        trajectory: str | Trajectory = "smooth",
        num_frames: int = 16,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        callback: Progress | None = None,
        clips_at_once: int | None = None,
        workers: Workers | None = None,
    ) -> Result:
        """Generates the video. The same inputs and seed give the same video.

        Args:
            images, cameras, trajectory, num_frames: see :func:`prepare`.
            steps: network calls per clip ("few_step") or DDIM steps ("teacher": two calls per step if guided); None = what the
                model was made for, see :func:`fvgen.sampling.choose_sampling`.
            sampler: "few_step" or "teacher"; None = what the model was made for.
            seed: of the sampling noise.
            callback: called with (stage, fraction in [0, 1]).
            clips_at_once: segments of one length that are generated together; None = as many as make ``BATCH_PIXELS``.
            workers: processes that share the segments, see :mod:`fvgen.workers`; all of them make this call and get the result.
                It has the same bytes as that of one process. The first does everything up to the renders.

        Raises:
            UserError: bad input; the message says what to do.
        """
        index = self.bundle.index
        sampler, steps = choose_sampling(index, sampler, steps)
        how: dict[str, Any] = {"compositor": index.compositor, "estimator": self.estimator}
        among = workers or Workers()
        prepared = among.share(
            lambda: prepare(images, cameras, trajectory, num_frames, index.sizes(), self.device, callback, **how)
        )
        return self.generate(prepared, steps, sampler, seed, callback, clips_at_once, workers)

    @torch.inference_mode()
    def generate(
        self,
        prepared: Prepared,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        callback: Progress | None = None,
        clips_at_once: int | None = None,
        workers: Workers | None = None,
    ) -> Result:
        """Cleans and completes the renders; arguments as in :meth:`__call__`."""
        sampler, steps = choose_sampling(self.bundle.index, sampler, steps)
        check_segments(prepared.segments)
        watch = Stopwatch(self.device, callback)
        if self._sampler is None:
            self._sampler = ModelSampler(self.bundle, fast=self._fast, offload=self.device if self._offload else None)
        model, among = self._sampler, workers or Workers()
        parts = batches(prepared.segments, prepared.renders.cameras.image_size, clips_at_once)
        mine = range(len(parts))[among.rank :: among.world]
        clips = [torch.stack([prepared.renders.rgb[list(s)] for s in parts[i]]) for i in mine]
        noises = [model.noise(batch_seed(seed, i)) for i in mine]
        graphs = {clip.shape: sampler == "few_step" and model.graph(clip.shape, steps) for clip in clips}
        made: list[Tensor] = []
        if clips and all(graphs.values()):
            with watch.stage("generate"):
                for clip, noise in zip(clips, noises, strict=True):
                    graph = graphs[clip.shape]
                    assert graph
                    made.append(graph(clip, model.clip_noise(clip.shape, steps, noise)).clone())
        elif clips:
            made = self._by_stages(model, clips, sampler, steps, noises, watch)
        found = among.gather(dict(zip(mine, made, strict=True)))
        frames = [clip for i in range(len(parts)) for clip in found[i].unbind(0)]
        video = torch.cat([frames[0], *(f[1:] for f in frames[1:])])  # neighbours share a frame
        timings = {**prepared.timings, **watch.timings}
        return Result(VideoClip(video), prepared.renders, prepared.renders.cameras, prepared, timings)

    @staticmethod
    def _by_stages(
        model: ModelSampler, clips: list[Tensor], sampler: str, steps: int, noises: list[NoiseSource], watch: Stopwatch
    ) -> list[Tensor]:
        """Frames of every batch ``[B, T, 3, H, W]``, with the progress of each step."""
        if model.device.type == "cuda":
            with watch.stage("compile"):
                for clip in clips:
                    model.prepare(clip.shape)
        guided = sampler == "teacher" and model.index.guidance_scale != 1.0
        with watch.stage("encode"):
            conditions = [model.condition(clip, guided) for clip in clips]
        sample = model.few_step if sampler == "few_step" else model.ddim
        latents: list[Tensor] = []
        with watch.stage("sample") as report:
            for done, (condition, noise) in enumerate(zip(conditions, noises, strict=True)):

                def tick(step: int, total: int, _x0: Tensor, done: int = done) -> None:
                    report("sample", (done + step / total) / len(conditions))

                latents.append(sample(condition, steps, noise=noise, callback=tick))
        frames: list[Tensor] = []
        with watch.stage("decode") as report:
            each = 1 if model.device.type == "cpu" else max(map(len, latents))  # slow enough there to show progress
            for part in (part for batch in latents for part in batch.split(each)):
                report("decode", len(frames) / sum(len(clip) for clip in clips))
                frames += model.decode(part).unbind(0)
        taken = iter(frames)
        return [torch.stack(list(islice(taken, len(batch)))) for batch in latents]


def batches(segments: Sequence[range], size: tuple[int, int], clips_at_once: int | None = None) -> list[tuple[range, ...]]:
    """Segments that are generated together, in their order: some at a time where all have one length, else each alone.

    Args:
        segments: frame ranges.
        size: (H, W) of the frames.
        clips_at_once: None = as many as make ``BATCH_PIXELS``, one at least.
    """
    if len({len(s) for s in segments}) > 1:
        return [(s,) for s in segments]
    each = clips_at_once or max(1, BATCH_PIXELS // (len(segments[0]) * size[0] * size[1]))
    return [tuple(segments[i : i + each]) for i in range(0, len(segments), each)]


def batch_seed(seed: int, number: int) -> int:
    """The seed of a batch's noise: the first has that of the video."""
    return (seed + number * 0x9E3779B97F4A7C15) % 2**63


def find_model(name_or_dir: str | os.PathLike[str]) -> Path:
    """The directory of a model given by name or path; UserError where there is none."""
    path = BUNDLED.get(str(name_or_dir), Path(name_or_dir))
    if path.exists():
        return path
    if str(name_or_dir) in BUNDLED:
        raise UserError(f"this installation lacks the bundled model {name_or_dir}; install fvgen again or give a model directory")
    raise UserError(f"there is no model {str(name_or_dir)!r}; use {', '.join(BUNDLED)} or the path of a model directory")


def check_segments(segments: Sequence[range]) -> None:
    """Raises UserError for more frames between two photos than are generated together."""
    longest = max(len(s) for s in segments)
    if longest > MAX_FRAMES:
        raise UserError(
            f"the path has {longest} frames in a row without a photo, at most {MAX_FRAMES} can be generated together; "
            "shorten it, for example with cameras:FILE:FIRST-LAST"
        )


def nearest_aspect(sizes: Sequence[tuple[int, int]], of: tuple[int, int]) -> tuple[int, int]:
    """The one of ``sizes`` (H, W) whose shape is most like ``of``."""
    return min(sizes, key=lambda s: abs(math.log(s[0] / s[1] * of[1] / of[0])))


def photo_set(images: Photos, mixed: bool = False) -> ImageSet:
    """Photos from files; one name is one photo. Those in memory as they are.

    Args:
        mixed: sizes and orientations may differ, see :func:`fvgen.geometry.mixed.in_first_frame`.

    Raises:
        UserError: a file is no photo, or the sizes differ where they may not.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, Tensor):
        return ImageSet(images)
    paths = [images] if isinstance(images, str | os.PathLike) else list(images)
    return read_mixed_images(paths) if mixed else read_images(paths)
