"""What a dry run counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.comparison import make_run
from fvgen.distill.logs import PROGRESS
from fvgen.distill.plan import activation_bytes, clips_left, measured_speed, memory_plan, validation_bytes
from fvgen.distill.rollout import Process
from fvgen.distill.settings import TrainSettings
from fvgen.models.bundle import build_component
from fvgen.recipes.presets import get_preset

METHODS = make_run("fvgen", Process.create(NoiseSchedule.create()))  # five critic updates and one of the student: six


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("preset", ["viewcrafter_512", "viewcrafter_1024"])
def test_attention_keeps_no_scores(preset: str, checkpointing: bool) -> None:
    """All that is kept grows with the number of pixels; scores would grow with its square, or with pixels times tokens."""

    def kept(height: int, text_tokens: int = 77) -> int:
        spec = get_preset(preset)
        spec = replace(spec, index=replace(spec.index, height=height))
        with torch.device("meta"):
            unet = build_component("unet", {**spec.unet, "text_tokens": text_tokens})
        return activation_bytes(unet, spec, 1, checkpointing)

    height = get_preset(preset).index.height
    once = kept(height)
    assert 1.9 * once < kept(2 * height) < 2.01 * once  # a little of it is of the tokens
    assert kept(height, 154) == pytest.approx(once, rel=0.01)


def test_validation_needs_no_second_student() -> None:
    spec = get_preset("viewcrafter_512")
    student = memory_plan(spec, METHODS[0], TrainSettings("viewcrafter_512"), 1280, 1)["running average"] * 1e9
    assert 1e8 < validation_bytes(spec, encodes=True) < student
    plan = memory_plan(spec, METHODS[0], TrainSettings("viewcrafter_512"), 1280, 1)
    assert validation_bytes(spec, False) - validation_bytes(spec, True) == pytest.approx(1e9 * plan["VAE, image branch"])
    assert memory_plan(spec, METHODS[0], TrainSettings("viewcrafter_512"), 1280, 1, encodes=False)["VAE, image branch"] == 0


def test_clips_that_are_left() -> None:
    settings = TrainSettings("tiny", iterations=(10, 20), batch=8, micro_batch=8)
    left = [
        [clips_left(METHODS[stage - 1], settings, stage, state) for stage in (1, 2)]
        for state in (
            None,
            {"stage": 1, "update": 45},
            {"stage": 1, "update": 60},
            {"stage": 2, "update": 30},
            {"stage": 2, "update": 126},
        )
    ]
    assert left == [[480, 960], [120, 960], [0, 960], [0, 720], [0, 0]]


def test_each_stage_has_its_own_speed(tmp_path: Path) -> None:
    lines = [{"stage": 1, "iteration": 19, "clips_per_second": 0.0}]
    lines += [{"stage": 1, "iteration": 20 * i + 39, "clips_per_second": 10.0} for i in range(5)]
    lines += [{"stage": 2, "iteration": 20 * i + 19, "clips_per_second": 2.0} for i in range(3)]
    torn = '{"stage": 2, "iteration": 79, "clips_per_sec'
    (tmp_path / PROGRESS).write_text("".join(json.dumps(line) + "\n" for line in lines) + torn + '{"stage": 2}\n' + torn)
    assert measured_speed(tmp_path, 1) == 10.0
    assert measured_speed(tmp_path, 2) == 2.0
    assert measured_speed(tmp_path, 3) is None
