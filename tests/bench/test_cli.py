from __future__ import annotations

import json
from pathlib import Path

import pytest

import fvgen.cli.bench as bench
from tests.bench.conftest import ORIGIN, Run, timed

QUICK = ("bench", "kernels", "--quick", "--ops", "geglu", "--no-compile", "--rounds", 2, "--device", "cpu")


def test_kernels_to_a_file_and_compared(fvgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVGEN_COMMIT", "c0ffee")
    file = tmp_path / "deep" / "new.json"
    status, out, err = fvgen(*QUICK, "--json", file)
    assert status == 0, err
    assert "kernel_geglu_small_ms" in out
    assert "[1/1] geglu small" in err
    records = json.loads(file.read_text())
    names = ["device_copy_bandwidth", "device_matmul_rate", "kernel_geglu_small_ms", "kernel_geglu_bandwidth_fraction"]
    assert [r["name"] for r in records] == names
    for record in records:
        assert set(ORIGIN) | {"unit", "gpu_state"} <= set(record)
        assert record["commit"] == "c0ffee"
        assert (
            record["command"] == "fvgen bench kernels --quick --no-compile --ops geglu --rounds 2 --device cpu --json RESULT.json"
        )
    assert str(tmp_path) not in file.read_text()

    old = tmp_path / "old.json"
    for factor, expected in ((1e3, 0), (1e-3, 1)):
        old.write_text(json.dumps([timed("kernel_geglu_small_ms", factor * records[2]["median_ms"])]))
        status, out, err = fvgen(*QUICK, "--compare", old)
        assert status == expected, err
        assert ("REGRESSION" in out) == (expected == 1)
    assert [line for line in err.splitlines() if line.startswith("fvgen: ")] == [
        "fvgen: 1 of 1 figures got worse by more than 5 % or failed: kernel_geglu_small_ms"
    ]


def test_report(fvgen: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([timed(f"{name}_ms", 1.0)]))
    command = ("bench", "report", tmp_path / "a.json", tmp_path / "b.json", "--output", tmp_path / "out")
    status, out, err = fvgen(*command)
    assert (status, out.strip()) == (0, str(tmp_path / "out" / "report.md")), err
    assert {"`a_ms`", "`b_ms`"} <= set((tmp_path / "out" / "report.md").read_text().split())
    (tmp_path / "old.json").write_text(json.dumps([timed("a_ms", 0.5)]))
    assert fvgen(*command, "--compare", tmp_path / "old.json")[0] == 1


@pytest.mark.parametrize(
    ("saved", "quick", "expected"), [(92.0, [], 0), (89.9, [], 1), (89.9, ["--quick"], 0)], ids=["enough", "too little", "quick"]
)
def test_speedup_below_90_percent_fails(
    fvgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: float, quick: list[str], expected: int
) -> None:
    import fvgen.bench.speedup as suite

    record = {"name": "speedup_percent_tiny", "suite": "speedup", "model": "tiny", "value": saved, "unit": "%"}
    monkeypatch.setattr(suite, "measure_speedup", lambda *_a, **_k: [record])
    status, _, err = fvgen("bench", "speedup", *quick, "--device", "cpu", "--json", tmp_path / "s.json")
    assert status == expected
    assert ("fvgen: four steps save 89.9 % of the teacher's time with tiny, less than 90 %" in err) == (expected == 1)
    assert json.loads((tmp_path / "s.json").read_text())[0]["value"] == saved


FIGURES = (
    "unet_forward_tiny_ms",
    "vae_encode_tiny_ms",
    "vae_decode_tiny_ms",
    "image_tower_tiny_ms",
    "render_tiny_ms",
    "step4_tiny_ms",
    "clip_tiny_ms",
    "teacher3_tiny_s",
    "clips_per_s_tiny_b8",
    "views56_tiny_s",
    "first_call_tiny_s",
    "clip_tiny_offload_ms",
)


@pytest.mark.slow
def test_every_figure_of_a_model(fvgen: Run, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    command = ("bench", "sampler", "--quick", "--device", "cpu", "--rounds", 1, "--teacher-steps", 3, "--json", file)
    status, _, err = fvgen(*command)
    assert status == 0, err
    records = {r["name"]: r for r in json.loads(file.read_text())}
    assert set(FIGURES) <= set(records)
    assert not [r for r in records.values() if r.get("failed")]
    assert {r["runner"] for r in records.values()} == {"engine", "engine, DDIM", "engine, offloaded"}


def test_the_runner_is_chosen_and_recorded(fvgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fvgen.bench.speedup as suite

    used = []
    monkeypatch.setattr(suite, "measure_speedup", lambda *a, **_k: used.append(a[6]) or [])
    for kind in ([], ["--runner", "modules"], ["--runner", "engine"]):
        assert fvgen("bench", "speedup", "--quick", "--device", "cpu", *kind)[0] == 0
    assert [r.student.label for r in used] == ["engine", "modules", "engine"]


def test_interrupted_runs_keep_what_they_have(fvgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def suite(*_arguments: object):
        yield {"name": "first_ms", "median_ms": 1.0, "unit": "ms"}
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_suite", suite)
    file = tmp_path / "new.json"
    status, _, err = fvgen("bench", "raster", "--quick", "--device", "cpu", "--json", file)
    assert status == 130
    assert f"interrupted; 1 records are in {file}" in err
    assert [r["name"] for r in json.loads(file.read_text())] == ["first_ms"]


def test_memory_ran_out(fvgen: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def suite(*_arguments: object):
        raise MemoryError
        yield

    monkeypatch.setattr(bench, "_suite", suite)
    status, _, err = fvgen("bench", "train", "--quick", "--device", "cpu")
    assert status == 2
    assert "smaller --batch" in err


CASES = {
    "no suite": ("arguments are required: SUITE (see", ""),
    "suite": ("invalid choice", "sound"),
    "operator": ("there is no operator 'gelu'", "kernels --ops gelu"),
    "no shapes": ("--quick", "kernels --ops composite_points"),
    "rounds": ("--rounds: must be", "raster --rounds 0"),
    "batch": ("--batch: must be", "sampler --batch 1 x"),
    "steps": ("--teacher-steps: must be", "speedup --teacher-steps 0"),
    "model": ("there is no model 'huge'", "sampler --model huge --quick"),
    "preset without GPU": ("measured on a GPU", "speedup --model viewcrafter_512 --device cpu"),
    "device": ("unknown device 'tpu'", "train --device tpu"),
    "ops elsewhere": ("--ops belongs to kernels", "raster --ops geglu"),
    "model elsewhere": ("--model belongs to sampler and speedup and train", "raster --model tiny"),
    "step of a full model without GPU": ("measured on a GPU", "train --model viewcrafter_512 --device cpu"),
    "step of no preset": ("train measures a preset, not 'huge'", "train --model huge"),
    "step without model": ("--stage belongs to train with --model", "train --stage 2"),
    "step elsewhere": ("--no-checkpointing belongs to train with --model", "sampler --model tiny --no-checkpointing"),
    "profile of stage 1": ("--profile looks at stage 2", "train --model tiny --stage 1 --profile {folder}/p.md"),
    "existing profile": ("exists", "train --model tiny --profile {good}"),
    "single alone": ("--single is for the scaling", "train --model tiny --single {good}"),
    "shard alone": ("torchrun", "train --model tiny --quick --shard --device cpu"),
    "runner": ("--runner: invalid choice", "speedup --runner fast"),
    "runner elsewhere": ("--runner belongs to sampler and speedup", "kernels --runner engine"),
    "views alone": ("start it with torchrun", "views --quick"),
    "runner of views": ("--runner belongs to sampler and speedup", "views --runner modules"),
    "output elsewhere": ("--output belongs to report", "all --output x"),
    "report without file": ("needs a result file", "report"),
    "report with rounds": ("--rounds belongs to measurements", "report {good} --rounds 3"),
    "file elsewhere": ("one word too many", "kernels {good}"),
    "missing result": ("cannot be read", "report none.json"),
    "broken result": ("not valid JSON", "report {broken}"),
    "missing old": ("cannot be read", "kernels --quick --compare none.json"),
    "broken old": ("not valid JSON", "kernels --quick --compare {broken}"),
    "empty old": ("no records to compare with", "kernels --quick --compare {empty}"),
    "existing result": ("exists", "raster --quick --json {good}"),
    "folder": ("is a folder", "raster --quick --json {folder}"),
    "below a file": ("cannot write", "raster --quick --json {good}/deep.json"),
    "nothing in common": ("no record name in common", "report {good} --compare {other} --output {folder}"),
}


@pytest.mark.parametrize(("words", "line"), CASES.values(), ids=CASES)
def test_refused(fvgen: Run, tmp_path: Path, words: str, line: str) -> None:
    names = {"good": "good.json", "other": "other.json", "broken": "broken.json", "empty": "empty.json", "folder": ""}
    (tmp_path / "good.json").write_text(json.dumps([timed("a_ms", 1.0)]))
    (tmp_path / "other.json").write_text(json.dumps([timed("b_ms", 1.0)]))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.json").write_text("[]")
    for name, file in names.items():
        line = line.replace("{" + name + "}", str(tmp_path / file))
    status, _, err = fvgen("bench", *line.split())
    assert status == 2, err
    (message,) = [text for text in err.splitlines() if text.startswith("fvgen: error: ")]
    assert words in message
    assert "Traceback" not in err
    assert json.loads((tmp_path / "good.json").read_text()) == [timed("a_ms", 1.0)]


def test_help_teaches(fvgen: Run) -> None:
    status, out, _ = fvgen("bench", "--help")
    assert status == 0
    for word in ("examples:", "fvgen bench speedup", "--compare OLD.json", "kernels", "raster", "report", "exit status"):
        assert word in out
