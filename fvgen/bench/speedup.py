"""How much time the four-step student saves against the guided teacher: both end to end, alternating, in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fvgen.bench.device import GpuWatch
from fvgen.bench.kernels import Say
from fvgen.bench.model import BenchModel, render_call
from fvgen.bench.runner import Runners, find_runners
from fvgen.bench.sampler import GUIDANCE, describe, named
from fvgen.bench.timing import Timing, inference, time_once

LEAST_PERCENT = 90.0


def _whole(clip: Callable[[Tensor, int], Tensor], render: Callable[[], Tensor], seed: int) -> Tensor:
    return clip(render(), seed)


def measure_speedup(
    model: BenchModel,
    device: str,
    batch: int = 1,
    rounds: int = 5,
    teacher_steps: int = 50,
    quick: bool = False,
    runners: Runners | None = None,
    say: Say = lambda _: None,
) -> list[dict[str, Any]]:
    """Records of the student's clip, the teacher's clip and the reduction of time in percent (the last one).

    A clip counts from the points on the device to the decoded frames: render, noise, encode, sample, decode.

    Args:
        model: used by both samplers.
        device: "cpu", "cuda" or "cuda:N".
        batch: clips at once.
        rounds: clips of each; they alternate, so that both meet the same clocks.
        teacher_steps: DDIM steps, guided with scale 7.5.
        quick: clips of 4 frames and 64 x 96 pixels.
        runners: makes the samplers; None takes the engine.
        say: told what is measured next.
    """
    make = runners or find_runners("engine")
    say(f"loading {model.name}")
    bundle = model.load(device)
    student, teacher = make.student(bundle), make.teacher(bundle, teacher_steps, GUIDANCE)
    with inference(), GpuWatch(device) as watch:
        render = render_call(model.index, device, batch, quick)
        clips: dict[str, Callable[[Tensor, int], Tensor]] = {"student": student.clip, "teacher": teacher.clip}
        readings: dict[str, list[float]] = {name: [] for name in clips}
        say("warm-up of both samplers")
        student.clip(render(), 0)
        teacher.clip(render(), 0, 2)
        for n in range(rounds):
            say(f"[{n + 1}/{rounds}] student and teacher")
            for name, clip in clips.items():
                readings[name].append(time_once(partial(_whole, clip, render, n), device))
    times = {name: Timing.of(values, "perf_counter") for name, values in readings.items()}
    memory = {"peak_memory_bytes": watch.facts["peak_memory_bytes"], "graph_memory_bytes": student.graph_memory}
    facts = {**describe(model, student.label, quick), "suite": "speedup", "batch": batch, **memory}
    tag = named(model, batch)
    own = {"steps": student.steps, "guidance_scale": 1.0, "unit": "ms", **times["student"].fields()}
    theirs = {"steps": teacher_steps, "guidance_scale": GUIDANCE, "unit": "s", **times["teacher"].seconds()}
    ratio = times["teacher"].median_ms / times["student"].median_ms
    percent = {"value": 100 * (1 - 1 / ratio), "unit": "%", "times_as_fast": ratio, "teacher_steps": teacher_steps}
    return [
        {"name": f"speedup_student_{tag}_ms", **facts, **own},
        {"name": f"speedup_teacher{teacher_steps}_{tag}_s", **facts, **theirs},
        {"name": f"speedup_percent_{tag}", **facts, **percent},
    ]
