from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from fvgen.bench.model import random_model, render_call, stored_model
from fvgen.bench.offload import measure_offload, peak
from fvgen.bench.record import value_of
from fvgen.bench.runner import RUNNERS, ModelRunner, Runners, TeacherRunner, find_runners
from fvgen.bench.sampler import default_batches, measure_sampler, teacher_readings
from fvgen.bench.speedup import measure_speedup
from fvgen.bench.train import measure_train
from fvgen.models.spec import COMPONENTS
from fvgen.pipeline import find_model
from fvgen.recipes.presets import get_preset
from fvgen.sampling import ModelSampler
from fvgen.utils.errors import UserError
from tests.bench.conftest import SLEEPERS, SleepingRunner


def test_stages_of_injected_runners(sleeper):
    records = list(measure_sampler(sleeper, "cpu", [1, 2], 3, teacher_steps=10, quick=True, runners=SLEEPERS))
    stages = ["render", "encode", "noise", "unet_forward", "step1", "step2", "vae_decode"]
    clips = ["clip_sleeper_ms", "clips_per_s_sleeper_b1", "clip_sleeper_b2_ms", "clips_per_s_sleeper_b2"]
    measured = [*clips[:2], "clip_sleeper_fast_ms", *clips[2:]]
    names = ["load_sleeper_s", *(f"{s}_sleeper_ms" for s in stages), *measured, "teacher10_sleeper_s"]
    assert [r["name"] for r in records] == names
    assert {(r["weights"], r["frames"], *r["image_size"]) for r in records} == {("random weights", 4, 64, 96)}
    assert {r["runner"] for r in records} == {"sleeper", "sleeper, DDIM"}
    found = {r["name"]: r for r in records}
    for stage, ms in {"encode": 2, "step1": 10, "step2": 10, "unet_forward": 8, "vae_decode": 5}.items():
        assert ms <= found[f"{stage}_sleeper_ms"]["median_ms"], stage
    clip, rate, twice = (found[n] for n in (*clips[:2], clips[3]))
    # the whole clip contains the render
    assert clip["min_ms"] >= 27 + found["render_sleeper_ms"]["min_ms"] / 4
    assert found["clip_sleeper_fast_ms"]["min_ms"] >= 17
    assert found["clip_sleeper_fast_ms"]["stage"] == "fast clip"
    assert rate["value"] == clip["clips_per_second"] == pytest.approx(1e3 / clip["median_ms"])
    assert twice["value"] == pytest.approx(2e3 / found[clips[2]]["median_ms"])
    assert (clip["peak_memory_bytes"], clip["graph_memory_bytes"], clip["energy_per_clip_j"]) == (None, 1000, None)
    seconds, unit = value_of(found["teacher10_sleeper_s"])
    assert 0.04 <= seconds < 4
    assert unit == "s"
    assert not torch.is_inference_mode_enabled()


def test_fast_mode_is_measured_once_and_left(sleeper):
    modes: list[bool | None] = []

    class Watched(SleepingRunner):
        def clip(self, renders, seed):
            modes.append(self.fast)
            return super().clip(renders, seed)

    list(measure_sampler(sleeper, "cpu", [1, 2], 1, 0, quick=True, runners=Runners(Watched, SLEEPERS.teacher)))
    changes = [mode for n, mode in enumerate(modes) if n == 0 or mode != modes[n - 1]]
    assert changes == [False, True, False]


def test_four_segments_are_56_views(sleeper):
    long = replace(sleeper, name="viewcrafter_512", index=replace(sleeper.index, frames=16))
    found = {r["name"]: r for r in measure_sampler(long, "cpu", [4], 1, teacher_steps=0, quick=True, runners=SLEEPERS)}
    assert found["views56_s"]["median_s"] == pytest.approx(1e-3 * found["clip_512_b4_ms"]["median_ms"])
    assert "teacher50_512_s" not in found
    records = measure_sampler(sleeper, "cpu", [4], 1, teacher_steps=0, quick=True, runners=SLEEPERS)
    assert not any("views56" in r["name"] for r in records)  # clips of four frames


def test_a_batch_that_does_not_fit_is_a_failed_record(sleeper):
    class Large(SleepingRunner):
        def clip(self, renders, seed):
            if len(renders) > 1:
                raise torch.cuda.OutOfMemoryError("too large")
            return super().clip(renders, seed)

    runners = Runners(Large, SLEEPERS.teacher)
    found = {r["name"]: r for r in measure_sampler(sleeper, "cpu", [1, 8], 1, 2, quick=True, runners=runners)}
    assert found["clip_sleeper_b8_ms"]["failed"] == "out of GPU memory"
    assert "teacher2_sleeper_s" in found


def test_a_slow_teacher_is_read_less_often():
    assert [teacher_readings(seconds, 20) for seconds in (0.1, 3.0, 18.0, 60.0)] == [5, 5, 2, 1]
    assert [teacher_readings(3.0, rounds) for rounds in (1, 8, 40)] == [1, 2, 10]


def test_what_is_measured_unasked():
    sizes = {name: get_preset(name).index for name in ("tiny", "viewcrafter_512", "viewcrafter_1024")}
    assert {n: default_batches(i) for n, i in sizes.items()} == {
        "tiny": [1, 4, 8],
        "viewcrafter_512": [1, 4, 8],
        "viewcrafter_1024": [1],
    }


def test_speedup_of_known_times(sleeper):
    student, teacher, percent = measure_speedup(sleeper, "cpu", rounds=2, quick=True, runners=SLEEPERS)
    names = ["speedup_student_sleeper_ms", "speedup_teacher50_sleeper_s", "speedup_percent_sleeper"]
    assert [r["name"] for r in (student, teacher, percent)] == names
    assert teacher["steps"] == 50
    assert teacher["median_s"] >= 0.2
    assert student["min_ms"] >= 27
    expected = 100 * (1 - 1e-3 * student["median_ms"] / teacher["median_s"])
    assert percent["value"] == pytest.approx(expected)
    assert percent["times_as_fast"] == pytest.approx(1e3 * teacher["median_s"] / student["median_ms"])
    assert percent["unit"] == "%"


@pytest.fixture(scope="module")
def tiny():
    model = stored_model("tiny", find_model("tiny"))
    return model, model.load("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNNERS)
def test_nothing_is_left_on_the_gpu_when_clips_are_offloaded(tiny, monkeypatch, kind):
    alive = []

    def watched(make):
        def made(*arguments):
            runner = make(*arguments)
            alive.append(weakref.ref(runner))
            return runner

        return made

    def offloaded(*_):
        assert [runner() for runner in alive] == [None, None]
        yield {"name": "offloaded"}

    monkeypatch.setattr("fvgen.bench.sampler.measure_offload", offloaded)
    runners = Runners(*map(watched, find_runners(kind)))
    *_, last = measure_sampler(tiny[0], "cpu", [1], 1, 1, quick=True, runners=runners, offload=True)
    assert last == {"name": "offloaded"}


def test_offloaded_clips():
    model = stored_model("tiny", find_model("tiny"))
    (time,) = measure_offload(model, model.load("cpu"), "cpu", 1, True, {"suite": "sampler"})
    assert (time["name"], time["runner"], time["steps"]) == ("clip_tiny_offload_ms", "engine, offloaded", 4)
    assert list(peak("clip_512_peak_gb", {"batch": 1}, 18_065_360_896)) == [
        {"name": "clip_512_peak_gb", "batch": 1, "value": 18.065360896, "unit": "GB"}
    ]


def test_the_stages_make_the_clip(tiny):
    model, bundle = tiny
    with torch.inference_mode():
        renders = render_call(model.index, "cpu", quick=True)()
        assert renders.shape == (1, 4, 3, 64, 96)
        assert renders.std() > 0.05
        runner = ModelRunner(bundle, steps=2)
        condition = runner.encode(renders)
        parts = {name: call() for name, call in runner.encode_parts(renders).items()}
        assert torch.equal(parts["vae_encode"], condition.latents)
        assert torch.equal(parts["image_tower"], condition.context)
        state = runner.start(condition, 3)
        for number in range(2):
            state = runner.step(state, number, condition)
        clip = runner.clip(renders, 3)
        assert torch.equal(runner.decode(state), clip)
        sampler = ModelSampler(bundle, seed=3)
        assert torch.equal(sampler.decode(sampler.few_step(sampler.condition(renders), 2)), clip)
        assert not torch.equal(runner.clip(renders, 4), clip)


def test_the_teacher_calls_the_network_twice_a_step(tiny):
    model, bundle = tiny
    calls = []
    handle = bundle.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        with torch.inference_mode():
            renders = render_call(model.index, "cpu", quick=True)()
            TeacherRunner(bundle, 2, 7.5).clip(renders, 0)
            assert len(calls) == 4
            TeacherRunner(bundle, 2, 1.0).clip(renders, 0)
            assert len(calls) == 6
            ModelRunner(bundle).clip(renders, 0)
            assert len(calls) == 10
    finally:
        handle.remove()


def test_models():
    assert stored_model("tiny", find_model("tiny")).weights == "trained"
    model = random_model("tiny")
    assert model.weights == "random weights"
    bundle = model.load("cpu")
    assert next(bundle.unet.parameters()).dtype == torch.float32
    for name in COMPONENTS:
        for key, parameter in getattr(bundle, name).named_parameters():
            assert parameter.any(), key
            assert not parameter.requires_grad, key
    assert 0.018 < bundle.unet.conv_out.weight.std() < 0.022  # begins as zeros
    assert model.tag == "tiny"
    assert random_model("viewcrafter_512").tag == "512"
    with pytest.raises(UserError, match="no preset"):
        random_model("huge")


def test_training_step():
    step, rate = measure_train("cpu", rounds=2, quick=True)
    assert (step["name"], rate["name"]) == ("train_tiny_step_ms", "train_tiny_clips_per_second")
    assert step["count"] == 2
    assert rate["value"] == pytest.approx(2 * 2 / (2e-3 * step["median_ms"]), rel=0.01)  # two readings: median = mean
    assert step["peak_memory_bytes"] is None
