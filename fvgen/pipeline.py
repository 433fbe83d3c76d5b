"""Photos to video: the one file that knows every stage."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.geometry import estimate_scene
from fvgen.geometry.coincide import coincident_photos
from fvgen.geometry.resize import fit, fit_cameras, scale_cameras
from fvgen.geometry.trajectory import parse_trajectory, target_cameras
from fvgen.io import read_cameras, read_images
from fvgen.render import put_photos, render_scene
from fvgen.types import Cameras, ImageSet, RenderClip, Scene, VideoClip
from fvgen.utils.errors import UserError

Photos = ImageSet | Tensor | Sequence[str | os.PathLike[str]]
Progress = Callable[[str, float], None]
BUNDLED = {"tiny": Path(__file__).parent / "assets" / "tiny"}
SAMPLERS = ("few_step", "teacher")
MAX_FRAMES = 64  # generated together


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
    """

    scene: Scene
    photos: Tensor
    renders: RenderClip
    photo_frames: tuple[int, ...]
    photo_indices: tuple[int, ...]
    segments: tuple[range, ...]
    timings: dict[str, float]


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


class Stopwatch:
    """Seconds per stage, with the GPU's work finished before each reading; tells ``progress`` what begins."""

    def __init__(self, device: torch.device, progress: Progress | None) -> None:
        self.timings: dict[str, float] = {}
        self._device, self._progress = device, progress

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        report = self._progress or (lambda _stage, _fraction: None)
        report(name, 0.0)
        start = time.perf_counter()
        yield lambda _what, fraction: report(name, fraction)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.timings[name] = round(time.perf_counter() - start, 6)
        report(name, 1.0)


def prepare(
    images: Photos,
    cameras: Cameras | str | os.PathLike[str] | None = None,
    trajectory: str = "smooth",
    num_frames: int = 16,
    size: tuple[int, int] | list[tuple[int, int]] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    *,
    compositor: str = "norm",
    radius: float = 0.01,
    points_per_pixel: int = 10,
) -> Prepared:
    """Photos to renders along a camera path; needs no model.

    Args:
        images: two or more overlapping photos in the order in which neighbours overlap: paths, ``[V, 3, H, W]`` in [0, 1],
            or an ``ImageSet``.
        cameras: their cameras (at the photos' size), or a ``transforms.json`` or COLMAP model to read them from; estimated
            if None.
        trajectory: see ``fvgen generate --help``; "smooth" passes through all photos.
        num_frames: frames per segment, that is, between neighbouring photos with both of them.
        size: (H, W) of the renders; of a list of sizes the one with the photos' aspect; None takes the working resolution of
            the geometry.
        device: where the points are rendered.
        progress: called with (stage, fraction in [0, 1]).
        compositor, radius, points_per_pixel: how points become pixels, see :func:`fvgen.render.render_points`.

    Raises:
        UserError: bad photos, cameras, path or sizes.
    """
    if not 2 <= num_frames <= MAX_FRAMES:
        raise UserError(f"a clip has 2 to {MAX_FRAMES} frames between two photos, not {num_frames}; change --frames")
    parsed = parse_trajectory(trajectory)
    watch = Stopwatch(torch.device(device), progress)
    with watch.stage("read"):
        photos = _photos(images)
        known = read_cameras(cameras, photos.names) if isinstance(cameras, str | os.PathLike) else cameras
    with watch.stage("geometry") as report:
        scene = estimate_scene(photos, known, progress=report)
    with watch.stage("path"):
        clip_size = nearest_aspect(size, photos.size) if isinstance(size, list) else size or scene.images.size
        full_size = replace(scene, cameras=scale_cameras(scene.cameras, photos.size))
        path = target_cameras(full_size, parsed, num_frames)
        shown = coincident_photos(path, full_size.cameras)
        path, (fitted, _) = fit_cameras(path, clip_size), fit(photos, None, clip_size)
    with watch.stage("render") as report:
        options: dict[str, Any] = {"compositor": compositor, "radius": radius, "points_per_pixel": points_per_pixel}
        renders = _render(scene, path, torch.device(device), options, report)
        if shown:
            renders = put_photos(renders, fitted.rgb[list(shown.values())], list(shown))
    cuts = sorted({0, *shown, len(path) - 1})
    segments = tuple(range(a, b + 1) for a, b in pairwise(cuts))
    return Prepared(scene, fitted.rgb, renders, tuple(shown), tuple(shown.values()), segments, watch.timings)


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

    def __init__(self, bundle: Any, device: str | torch.device = "cpu") -> None:
        self.bundle = bundle
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike[str] = "tiny", device: str = "auto") -> FVGenPipeline:
        """Loads a model.

        Args:
            name_or_dir: "tiny" (bundled) or a model directory.
            device: "auto" (CUDA if there is a GPU), "cpu", "cuda", "cuda:1", ...

        Raises:
            UserError: unknown name, incomplete directory, no such device.
        """
        from fvgen.models.bundle import ModelBundle

        chosen = choose_device(device)
        return cls(ModelBundle.from_pretrained(find_model(name_or_dir), device=chosen), chosen)

    def clip_size(self, images: Photos) -> tuple[int, int]:
        """(H, W) of the clip the model makes of these photos: portrait for portrait photos where the model knows that."""
        return nearest_aspect(self.bundle.index.sizes(), _photos(images).size)

    def __call__(
        self,
        images: Photos,
        cameras: Cameras | str | os.PathLike[str] | None = None,
        trajectory: str = "smooth",
        num_frames: int = 16,
        steps: int = 4,
        sampler: str = "few_step",
        seed: int = 0,
        callback: Progress | None = None,
    ) -> Result:
        """Generates the video. The same inputs and seed give the same video.

        Args:
            images, cameras, trajectory, num_frames: see :func:`prepare`.
            steps: network calls per clip ("few_step") or DDIM steps ("teacher": two calls per step if guided).
            sampler: "few_step" or "teacher".
            seed: of the sampling noise.
            callback: called with (stage, fraction in [0, 1]).

        Raises:
            UserError: bad input; the message says what to do.
        """
        check_sampling(sampler, steps)
        index = self.bundle.index
        how = {"compositor": index.compositor}
        prepared = prepare(images, cameras, trajectory, num_frames, index.sizes(), self.device, callback, **how)
        return self.generate(prepared, steps, sampler, seed, callback)

    @torch.inference_mode()
    def generate(
        self, prepared: Prepared, steps: int = 4, sampler: str = "few_step", seed: int = 0, callback: Progress | None = None
    ) -> Result:
        """Cleans and completes the renders; arguments as in :meth:`__call__`."""
        from fvgen.codec import Conditioner, LatentCodec
        from fvgen.diffusion.ddim import ddim_sample
        from fvgen.diffusion.few_step import few_step_sample
        from fvgen.diffusion.noise import seeded_noise
        from fvgen.diffusion.predict import unet_predictor
        from fvgen.diffusion.schedule import NoiseSchedule

        check_sampling(sampler, steps)
        check_segments(prepared.segments)
        model, index = self.bundle, self.bundle.index
        watch = Stopwatch(self.device, callback)
        guidance = index.guidance_scale if sampler == "teacher" else 1.0
        codec = LatentCodec(model.vae)
        schedule = NoiseSchedule.create(index.base_scale)
        noise = seeded_noise(seed, self.device)
        predict = unet_predictor(model.unet, torch.bfloat16 if self.device.type == "cuda" else None)
        alike = len({len(s) for s in prepared.segments}) == 1  # clips of one length are generated together
        batches = [prepared.segments] if alike else [(s,) for s in prepared.segments]
        clips = [torch.stack([prepared.renders.rgb[list(s)] for s in batch]).to(self.device) for batch in batches]
        with watch.stage("encode"):
            make_condition = Conditioner(codec, model.image_encoder, model.image_projector, model.prompt, model.empty, index.fps)
            conditions = [make_condition(clip, guidance=guidance != 1.0) for clip in clips]
        latents = []
        with watch.stage("sample") as report:
            for done, condition in enumerate(conditions):

                def tick(step: int, total: int, _x0: Tensor, done: int = done) -> None:
                    report("sample", (done + step / total) / len(conditions))

                shape = condition.latents.shape
                if sampler == "few_step":
                    latents.append(few_step_sample(predict, schedule, condition, shape, noise, steps, callback=tick))
                else:
                    how = (steps, index.eta, guidance, index.guidance_rescale)
                    latents.append(ddim_sample(predict, schedule, condition, shape, noise, *how, callback=tick))
        frames: list[Tensor] = []
        with watch.stage("decode") as report:
            for clip in (clip for batch in latents for clip in batch.split(1)):
                report("decode", len(frames) / len(prepared.segments))
                frames.append(codec.decode(clip)[0])
        video = torch.cat([frames[0], *(f[1:] for f in frames[1:])])  # neighbours share a frame
        timings = {**prepared.timings, **watch.timings}
        return Result(VideoClip(video), prepared.renders, prepared.renders.cameras, prepared, timings)


def find_model(name_or_dir: str | os.PathLike[str]) -> Path:
    """The directory of a model given by name or path; UserError where there is none."""
    path = BUNDLED.get(str(name_or_dir), Path(name_or_dir))
    if path.exists():
        return path
    if str(name_or_dir) in BUNDLED:
        raise UserError(f"this installation lacks the bundled model {name_or_dir}; install fvgen again or give a model directory")
    raise UserError(f"there is no model {str(name_or_dir)!r}; use {', '.join(BUNDLED)} or the path of a model directory")


def choose_device(name: str) -> str:
    """ "auto" resolved; a device that is not there is a UserError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; use auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no usable GPU on this machine (see `fvgen doctor`); use --device cpu")
    if name.startswith("cuda:") and not (name[5:].isdigit() and int(name[5:]) < torch.cuda.device_count()):
        raise UserError(f"there is no device {name}; this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return name


def check_sampling(sampler: str, steps: int) -> None:
    """Raises UserError for an unknown sampler or a number of steps that makes no sense."""
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; use {' or '.join(SAMPLERS)}")
    if not 1 <= steps <= 1000:
        raise UserError(f"the number of steps must be between 1 and 1000, not {steps}")


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


def _photos(images: Photos) -> ImageSet:
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, Tensor):
        return ImageSet(images)
    return read_images(list(images))
