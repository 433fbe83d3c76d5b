"""Clips, stage by stage and as a whole: batch sizes, throughput, and the teacher in the same process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from fvgen.bench.device import GpuWatch, read_gpu
from fvgen.bench.kernels import Say, reason
from fvgen.bench.model import BenchModel, clip_size, render_call
from fvgen.bench.offload import measure_offload, peak
from fvgen.bench.runner import ClipRunner, Runners, find_runners
from fvgen.bench.timing import Timing, inference, synchronize, time_calls, time_once
from fvgen.models.spec import ModelIndex

GUIDANCE = 7.5
MODEST = 16 * 320 * 512  # pixels of a clip, up to which batches and the teacher are measured unasked
STAGE_S, TEACHER_S = 2.0, 40.0  # about so long are the readings of one stage, and those of the teacher's clip
VIEWS_BATCH, VIEWS_FRAMES = 4, 16  # clips of this length that make 56 new views between five photos


def default_batches(index: ModelIndex, quick: bool = False) -> list[int]:
    """Clips at once where nothing else is asked for."""
    return [1, VIEWS_BATCH, 8] if quick or is_modest(index) else [1]


def is_modest(index: ModelIndex) -> bool:
    """Whether a clip is so small that many of them can be measured."""
    return index.frames * index.height * index.width <= MODEST


def measure_sampler(
    model: BenchModel,
    device: str,
    batches: Sequence[int] = (1,),
    rounds: int = 20,
    teacher_steps: int = 50,
    quick: bool = False,
    runners: Runners | None = None,
    say: Say = lambda _: None,
    offload: bool = False,
) -> Iterator[dict[str, Any]]:
    """Records of loading, of each stage at the first batch size, of whole clips at each, and of the teacher's clip.

    At the first batch size whole clips are measured in fast mode too. A clip counts from the points on the device to the decoded
    frames: render, noise, encode, steps, decode. Peak memory counts everything of the process, the model in float32 included, and
    for a recorded clip also its recording.

    Args:
        model: what to load.
        device: "cpu", "cuda" or "cuda:N".
        batches: clips at once.
        rounds: readings per time; fewer of what takes long.
        teacher_steps: DDIM steps of the teacher, guided with scale 7.5; 0 leaves it out.
        quick: clips of 4 frames and 64 x 96 pixels.
        runners: what samples; None takes the engine.
        say: told what is measured next.
        offload: also measure clips with CPU offload, whatever ``runners`` are.
    """
    make = runners or find_runners("engine")
    say(f"loading {model.name}")
    start = _now(device)
    bundle = model.load(device)
    loaded = _now(device) - start
    runner = make.student(bundle)
    facts = describe(model, runner.label, quick)
    load = {"batch": batches[0], "stage": "load", "median_s": loaded, "unit": "s", "count": 1, "method": "perf_counter"}
    yield {"name": f"load_{model.tag}_s", **facts, **load}
    say(f"{model.name}, batch {batches[0]}, stage by stage")
    with inference():
        stages = stage_calls(runner, model, device, batches[0], quick)
    shared = {**facts, "steps": runner.steps}
    for stage, call in stages.items():
        if stage != "clip":
            with inference():
                timing = time_calls(call, device, rounds, seconds=STAGE_S)
            where = {"batch": batches[0], "stage": stage}
            yield {"name": f"{stage}_{named(model, batches[0])}_ms", **shared, **where, "unit": "ms", **timing.fields()}
    del stages, call  # the last call would keep the runner in memory to the end
    for batch in batches:
        say(f"{model.name}, batch {batch}, whole clips")
        runner.release()
        _empty_cache(device)
        try:
            with inference():
                records = _clips(runner, model, device, batch, rounds, quick, {**shared, "batch": batch})
        except torch.cuda.OutOfMemoryError as error:
            failed = {"stage": "clip", "unit": "ms", "median_ms": None, "failed": reason(error)}
            records = [{"name": f"clip_{named(model, batch)}_ms", **shared, "batch": batch, **failed}]
        yield from records
        if batch == batches[0] and runner.fast is not None:
            say(f"{model.name}, batch {batch}, whole clips in fast mode")
            runner.fast = True
            _empty_cache(device)
            with inference():
                yield _fast_clip(runner, model, device, batch, rounds, quick, {**shared, "batch": batch})
            runner.fast = False
    if teacher_steps:
        runner.release()
        _empty_cache(device)
        say(f"{model.name}, teacher with {teacher_steps} steps")
        teacher = make.teacher(bundle, teacher_steps, GUIDANCE)
        with inference(), GpuWatch(device) as watch:
            render = render_call(model.index, device, batches[0], quick)
            teacher.clip(render(), 0, 2)
            readings = [time_once(lambda: teacher.clip(render(), 0), device)]
            wanted = teacher_readings(1e-3 * readings[0], rounds)
            readings += [time_once(lambda: teacher.clip(render(), 0), device) for _ in range(wanted - 1)]
        name = f"teacher{teacher_steps}_{named(model, batches[0])}_s"
        how = {"steps": teacher_steps, "guidance_scale": GUIDANCE, "runner": teacher.label, "stage": "teacher clip"}
        memory = {"peak_memory_bytes": watch.facts["peak_memory_bytes"]}
        times = Timing.of(readings, "perf_counter").seconds()
        yield {"name": name, **facts, "batch": batches[0], **how, "unit": "s", **times, **memory}
        del teacher
    if offload:
        say(f"{model.name}, clips with CPU offload")
        del runner
        _empty_cache(device)
        yield from measure_offload(model, bundle, device, max(1, rounds // 4), quick, facts)


def named(model: BenchModel, batch: int) -> str:
    """Model and batch in the name of a figure: "512", "512_b8"."""
    return model.tag if batch == 1 else f"{model.tag}_b{batch}"


def _now(device: str) -> float:
    synchronize(device)
    return time.perf_counter()


def teacher_readings(seconds: float, rounds: int) -> int:
    """How often a teacher's clip of so many seconds is read: a quarter of the rounds, but not longer than ``TEACHER_S``."""
    return max(1, min(rounds // 4, int(TEACHER_S / seconds)))


def _empty_cache(device: str) -> None:
    gc.collect()  # recorded calls and the networks that they belong to refer to each other
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def describe(model: BenchModel, label: str, quick: bool) -> dict[str, Any]:
    """What every record about a model's clips says."""
    frames, height, width = clip_size(model.index, quick)
    what = {"suite": "sampler", "model": model.name, "weights": model.weights, "runner": label}
    return {**what, "frames": frames, "image_size": [height, width]}


def stage_calls(runner: ClipRunner, model: BenchModel, device: str, batch: int, quick: bool) -> dict[str, Callable[[], Any]]:
    """Calls that repeat one stage of a clip each, in its order, then the network alone and the whole clip from the points on.

    To be called in that order: recorded stages share memory.
    """
    render = render_call(model.index, device, batch, quick)
    renders = render()
    condition = runner.encode(renders)
    state = runner.start(condition, 0)
    stages: dict[str, Callable[[], Any]] = {"render": render}
    stages |= runner.encode_parts(renders) or {"encode": lambda: runner.encode(renders)}
    stages["noise"] = lambda: runner.start(condition, 0)
    stages["unet_forward"] = partial(runner.forward, state, 0, condition)
    for number in range(runner.steps):
        stages[f"step{number + 1}"] = partial(runner.step, state, number, condition)
        state = runner.step(state, number, condition)
    return {**stages, "vae_decode": partial(runner.decode, state), "clip": lambda: runner.clip(render(), 0)}


def _clips(
    runner: ClipRunner, model: BenchModel, device: str, batch: int, rounds: int, quick: bool, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Records of whole clips at one batch size: time, throughput, and for the right sizes the time of 56 views."""
    render = render_call(model.index, device, batch, quick)

    def call() -> Any:
        return runner.clip(render(), 0)

    with GpuWatch(device) as watch:
        call()  # records, where clips are recorded, so that its memory is counted
        timing = time_calls(call, device, rounds)
    memory = {"peak_memory_bytes": watch.facts["peak_memory_bytes"], "graph_memory_bytes": runner.graph_memory}
    what = {**facts, "stage": "clip", "graph_memory_bytes": runner.graph_memory}
    rate, energy = 1e3 * batch / timing.median_ms, _energy(call, device, batch)
    clip = {**facts, "stage": "clip", **memory, "clips_per_second": rate, "energy_per_clip_j": energy}
    records = [
        {"name": f"clip_{named(model, batch)}_ms", **clip, "unit": "ms", **timing.fields()},
        {"name": f"clips_per_s_{model.tag}_b{batch}", **facts, **memory, "value": rate, "unit": "clips/s"},
    ]
    records += peak(f"clip_{named(model, batch)}_peak_gb", what, watch.facts["peak_memory_bytes"])
    if batch == VIEWS_BATCH and model.index.frames == VIEWS_FRAMES:
        records.append({"name": short_name("views56", model), **facts, **memory, "unit": "s", **timing.seconds()})
    return records


def _fast_clip(
    runner: ClipRunner, model: BenchModel, device: str, batch: int, rounds: int, quick: bool, facts: dict[str, Any]
) -> dict[str, Any]:
    """Record of whole clips in fast mode."""
    render = render_call(model.index, device, batch, quick)
    timing = time_calls(lambda: runner.clip(render(), 0), device, rounds)
    return {"name": f"clip_{named(model, batch)}_fast_ms", **facts, "stage": "fast clip", "unit": "ms", **timing.fields()}


def short_name(figure: str, model: BenchModel) -> str:
    """A figure in seconds that is quoted for the 320 x 512 preset, whose size its name leaves out."""
    return f"{figure}_s" if model.tag == "512" else f"{figure}_{model.tag}_s"


def first_call_name(model: BenchModel) -> str:
    """Name of the figure of :mod:`fvgen.bench.first_call`."""
    return short_name("first_call", model)


def _energy(call: Callable[[], Any], device: str, batch: int, seconds: float = 2.0) -> float | None:
    """Joules per clip over about two seconds of clips, None without the GPU's counter."""
    if read_gpu(device).energy_j is None:
        return None
    with GpuWatch(device) as watch:
        count, end = 0, time.perf_counter() + seconds
        while count == 0 or time.perf_counter() < end:
            call()
            synchronize(device)
            count += 1
    energy = watch.facts["energy_j"]
    return None if energy is None else energy / (count * batch)
