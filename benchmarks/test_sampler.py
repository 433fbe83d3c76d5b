"""Clips of the bundled model, whole and by stage (small ones on the CPU), and of the full-size presets on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.conftest import Timed
from fvgen.bench.model import random_model, render_call, stored_model
from fvgen.bench.runner import RUNNERS, find_runners
from fvgen.bench.sampler import GUIDANCE, describe, stage_calls
from fvgen.pipeline import find_model

pytest.importorskip("pytest_benchmark")
STAGES = ("render", "vae_encode", "image_tower", "unet_forward", "step1", "step4", "vae_decode", "clip")


@pytest.fixture(scope="module", params=RUNNERS)
def stages(request: pytest.FixtureRequest, device: str) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    model = stored_model("tiny", find_model("tiny"))
    runner = find_runners(request.param).student(model.load(device))
    with torch.inference_mode():
        calls = stage_calls(runner, model, device, batch=1, quick=device == "cpu")
    return calls, describe(model, runner.label, device == "cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_stage_of_tiny(timed: Timed, stages: tuple[dict, dict], device: str, stage: str) -> None:
    calls, facts = stages
    with torch.inference_mode():
        timed([calls[stage]], device, 20 if device == "cuda" else 2, **facts)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["viewcrafter_512", "viewcrafter_1024"])
def test_clip_of_a_preset(timed: Timed, preset: str) -> None:
    model = random_model(preset)
    runner = find_runners("engine").student(model.load("cuda"))
    with torch.inference_mode():
        render = render_call(model.index, "cuda")
        timed([lambda: runner.clip(render(), 0)], "cuda", 5, **describe(model, runner.label, quick=False))


@pytest.mark.gpu
def test_teacher_clip_of_tiny(timed: Timed) -> None:
    model = stored_model("tiny", find_model("tiny"))
    teacher = find_runners("engine").teacher(model.load("cuda"), 50, GUIDANCE)
    with torch.inference_mode():
        render = render_call(model.index, "cuda")
        timed([lambda: teacher.clip(render(), 0)], "cuda", 3, **describe(model, teacher.label, quick=False), steps=50)
