"""A path through five photos, its four clips shared by processes with a GPU each, beside one process with all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fvgen.bench.device import GpuWatch
from fvgen.bench.kernels import Say
from fvgen.bench.model import BenchModel, clip_size
from fvgen.bench.sampler import describe, short_name
from fvgen.bench.timing import Timing, strict_kernels, time_once
from fvgen.data.synthetic.depth import backproject
from fvgen.data.synthetic.pairs import intrinsics
from fvgen.data.synthetic.raycast import render_view
from fvgen.data.synthetic.world import sample_paths, sample_worlds
from fvgen.pipeline import FVGenPipeline, Prepared, prepare
from fvgen.types import Cameras, ImageSet, Scene
from fvgen.workers import Workers

SEGMENTS, STEPS = 4, 4
WARM_UP = 3  # the first call compiles, the second one records
COUNTED = "from the renders on the first process's device to all frames in its main memory"


def measure_views(
    model: BenchModel, among: Workers, rounds: int = 10, quick: bool = False, say: Say = lambda _: None
) -> Iterator[dict[str, Any]]:
    """Records of the wall time of all new views: of the processes together, then of the first one alone while the others wait.

    A reading counts from the renders on the first process's device to all frames in its main memory: sending photos, geometry and
    renders to the other processes, noise, encode, steps and decode of each process's clips, gathering the frames, and
    copying them. It is what :meth:`FVGenPipeline.__call__` does after the renders. The first process alone is measured with the
    batches of the processes together, whose frames have to be the same bytes, and with all clips at once.

    Args:
        model: what each process loads onto its device.
        among: the processes, two to four; all of them make this call, and the first gets the records.
        rounds: readings, after three calls that are not counted.
        quick: clips of 4 frames and 64 x 96 pixels.
        say: told what is measured next.
    """
    device, each = among.device, math.ceil(SEGMENTS / among.world)
    say(f"loading {model.name} in {among.world} processes")
    pipeline = FVGenPipeline(model.load(device), device)
    prepared = five_photos(model, device, quick) if among.main else None
    found: list[Tensor] = []

    def together() -> None:
        frames = pipeline.generate(among.share(lambda: prepared), STEPS, "few_step", clips_at_once=each, workers=among).video.rgb
        if among.main:
            found[:] = [frames.cpu()]

    def start() -> None:
        among.gather({})  # nobody is late

    say(f"{model.name}, {SEGMENTS} clips on {among.world} processes")
    with strict_kernels(), GpuWatch(device) as watch:
        times = _readings(together, device, rounds, quick, start)
    if among.main:
        assert prepared is not None
        new = len(prepared.renders.rgb) - len(prepared.photo_frames)
        facts = {**describe(model, "pipeline", quick), "suite": "views", "steps": STEPS, "new_views": new}
        facts |= {"counted": COUNTED, "unit": "s"}
        medians, same = [], False
        for clips in dict.fromkeys((SEGMENTS, each)):
            say(f"{model.name}, {SEGMENTS} clips on one process, {clips} at once")
            alone, timing = _alone(pipeline, prepared, clips, device, rounds, quick)
            same = torch.equal(found[0], alone)  # in the end with the same batches
            medians.append(timing.median_ms)
            name = short_name(f"views{new}_x1" + ("" if clips == SEGMENTS else f"_by{clips}"), model)
            yield {"name": name, **facts, "processes": 1, "clips_at_once": clips, **timing.seconds()}
        state = {k: v for k, v in watch.facts.items() if k != "peak_memory_bytes"}
        own: dict[str, Any] = {"processes": among.world, "clips_at_once": each, "times_as_fast": min(medians) / times.median_ms}
        own |= {"same_bytes": same, "peak_memory_bytes": watch.facts["peak_memory_bytes"], "gpu_state": state}
        own |= {} if same else {"failed": "the frames differ from those of one process"}
        yield {"name": short_name(f"views{new}_x{among.world}", model), **facts, **own, **times.seconds()}
    among.gather({})  # the others wait


def _alone(
    pipeline: FVGenPipeline, prepared: Prepared, clips: int, device: str, rounds: int, quick: bool
) -> tuple[Tensor, Timing]:
    """Frames and times of one process that generates so many clips at once."""
    frames: list[Tensor] = []

    def call() -> None:
        frames[:] = [pipeline.generate(prepared, STEPS, "few_step", clips_at_once=clips).video.rgb.cpu()]

    with strict_kernels():
        timing = _readings(call, device, rounds, quick)
    return frames[0], timing


def _readings(
    call: Callable[[], None], device: str, rounds: int, quick: bool, start: Callable[[], None] = lambda: None
) -> Timing:
    """Times of single calls, each after ``start``, which does not count."""
    readings, warm_up = [], 1 if quick else WARM_UP
    for _ in range(warm_up + rounds):
        start()
        readings.append(time_once(call, device))
    return Timing.of(readings[warm_up:], "perf_counter")


@torch.no_grad()
def five_photos(model: BenchModel, device: str, quick: bool = False) -> Prepared:
    """A path through five photos of the synthetic world, with its true geometry, and the renders on ``device``."""
    frames, height, width = clip_size(model.index, quick)
    size = height, width
    seeds = torch.zeros(1, dtype=torch.int64, device=device)
    path = sample_paths(seeds, SEGMENTS + 1)
    world, K = sample_worlds(seeds, path), intrinsics(path.focal, size)
    views = [render_view(world, pose, K, size) for pose in path.world_from_cam.unbind(1)]
    poses, count = path.world_from_cam[0], len(views)
    points = torch.cat([backproject(depth, K, pose[None]) for (_, depth), pose in zip(views, poses, strict=True)])
    photos = ImageSet(torch.cat([rgb for rgb, _ in views]).cpu())
    cameras = Cameras(K.repeat(count, 1, 1), poses, size).to("cpu")
    scene = Scene(photos, cameras, points.cpu(), torch.ones(count, *size))
    return prepare(
        photos, scene.cameras, "smooth", frames, size, device, estimator=_Known(scene), compositor=model.index.compositor
    )


class _Known:
    """In the place of an estimator, where the scene is known."""

    fewest = 2

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def __call__(self, *_arguments: Any, **_options: Any) -> Scene:
        return self._scene
