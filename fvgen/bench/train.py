"""One training step of the tiny teacher, with the fused operators and in plain PyTorch."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from fvgen.bench.device import GpuWatch
from fvgen.bench.kernels import Say
from fvgen.bench.timing import Timing, kernels_in, synchronize
from fvgen.models.bundle import ModelBundle
from fvgen.pretrain.teacher import TeacherRecipe, TeacherRun
from fvgen.recipes.presets import get_preset

WARM_UP = 4


def measure_train(device: str, rounds: int = 40, quick: bool = False, say: Say = lambda _: None) -> list[dict[str, Any]]:
    """Records of milliseconds per step and of clips per second, which includes making the synthetic clips.

    Landscape clips of full length only, so that every step does the same. On a GPU also the step in plain PyTorch, under the name
    of the reference, and how many times as long it takes.

    Args:
        device: "cpu" or "cuda".
        rounds: steps measured, after four others.
        quick: two clips of 4 frames and 32 x 64 pixels a step.
        say: told what is measured next.
    """
    cuda = device.startswith("cuda")
    step, rate = _measure("strict", cuda, rounds, quick, say)
    found = [step, rate]
    if cuda:
        plain, _ = _measure("reference", cuda, rounds, quick, say)
        ratio = {"value": plain["median_ms"] / step["median_ms"], "unit": "x"}
        shared = {k: v for k, v in step.items() if k in ("suite", "model", "batch", "frames", "image_size", "new_clips")}
        found += [{**plain, "name": "train_tiny_step_reference_ms"}, {"name": "train_tiny_vs_reference", **shared, **ratio}]
    return found


def _measure(kernels: str, cuda: bool, rounds: int, quick: bool, say: Say) -> tuple[dict[str, Any], dict[str, Any]]:
    """Records of a step and of the clips per second with the operators in a mode of FVGEN_KERNELS."""
    spec = get_preset("tiny")
    recipe = TeacherRecipe(portrait_share=0.0, short_share=0.0, buffer=256, first_fill=32)
    if quick:
        spec = replace(spec, index=replace(spec.index, height=32, width=64, frames=4))
        recipe = replace(recipe, batch=2, pairs=1, buffer=4, first_fill=2)
    say(f"building the tiny teacher, kernels: {kernels}")
    device = "cuda" if cuda else "cpu"
    with kernels_in(kernels), GpuWatch(device) as watch:
        bundle = ModelBundle.random(spec)
        run = TeacherRun(recipe, spec, bundle.vae, bundle.prompt, bundle.empty, device, compile=cuda)
        say(f"{WARM_UP} steps of warm-up, then {rounds}")
        readings = []
        for n in range(WARM_UP + rounds):
            start = time.perf_counter()
            run.advance(n / (WARM_UP + rounds))
            synchronize(device)
            readings.append(time.perf_counter() - start)
    measured = readings[WARM_UP:]
    facts = {
        "suite": "train",
        "model": "tiny",
        "batch": recipe.batch,
        "frames": spec.index.frames,
        "image_size": [spec.index.height, spec.index.width],
        "kernels": kernels,
        "new_clips": f"{recipe.pairs} every {recipe.refill_every} steps",
        "peak_memory_bytes": watch.facts["peak_memory_bytes"],
        "gpu_state": {k: v for k, v in watch.facts.items() if k != "peak_memory_bytes"},
    }
    timing = Timing.of([1e3 * s for s in measured], "perf_counter")
    rate = recipe.batch * len(measured) / sum(measured)
    return (
        {"name": "train_tiny_step_ms", **facts, "unit": "ms", **timing.fields()},
        {"name": "train_tiny_clips_per_second", **facts, "value": rate, "unit": "clips/s"},
    )
