from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fvgen as package
from fvgen.cli import main
from tests.cli.conftest import Photos, Run

FILES = {"cameras.json", "contact_sheet.png", "points.ply", "render.mp4", "renders", "report.json"}
Report = Callable[[Path], dict]


def _contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_generate_is_reproducible(fvgen: Run, scene: Photos, model: str, report: Report, tmp_path: Path) -> None:
    command = ["generate", *scene.photos[:2], "--cameras", scene.cameras, "--frames", 4, "--model", model]
    runs = []
    for name in ("a", "b"):
        status, out, err = fvgen(*command, "--seed", 7, "--output", tmp_path / name)
        assert status == 0, err
        assert str(tmp_path / name / "video.mp4") in out
        runs.append(_contents(tmp_path / name))
    assert {p.name for p in (tmp_path / "a").iterdir()} == FILES | {"video.mp4", "frames"}
    reports = [json.loads(r.pop("report.json")) for r in runs]
    assert runs[0] == runs[1]
    timed = [r.pop("run") for r in reports]
    assert reports[0] == reports[1]
    assert set(timed[0]) == {"date", "output", "timings_s"}
    assert {"geometry", "render", "sample", "decode"} <= set(timed[0]["timings_s"])
    told = reports[0]
    assert told["frames"] == len(told["coverage"]) == 4
    assert told["sizes"]["clip"] == [64, 40]
    assert len(told["model"]["sha256"]) == 64
    assert len(json.loads(runs[0]["cameras.json"])["frames"]) == 4

    status, _, _ = fvgen(*command, "--seed", 8, "--output", tmp_path / "c")
    other = _contents(tmp_path / "c")
    assert status == 0
    assert other["frames/0001.png"] != runs[0]["frames/0001.png"]
    assert other["renders/0001.png"] == runs[0]["renders/0001.png"]


def test_three_photos_share_the_middle_one(fvgen: Run, scene: Photos, model: str, report: Report, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["generate", *scene.photos, "--cameras", scene.cameras, "--frames", 4, "--model", model, "--steps", 2]
    status, _, err = fvgen(*command, "--output", out)
    assert status == 0, err
    told = report(out)
    assert told["frames"] == len(list((out / "frames").iterdir())) == 7
    assert told["photo_frames"] == [0, 3, 6]
    assert told["segments"] == [[0, 3], [3, 6]]
    renders = [np.asarray(Image.open(out / "renders" / f"{i:04d}.png")) for i in range(7)]
    middle = np.asarray(Image.open(scene.photos[1]).resize((64, 40), Image.Resampling.BOX)).astype(float)
    distances = [np.abs(r - middle).mean() for r in renders]
    assert [d < 2 for d in distances] == [i == 3 for i in range(7)]


def test_teacher_and_truth(fvgen: Run, scene: Photos, model: str, report: Report, tmp_path: Path) -> None:
    truth = Path(scene.cameras).parent / "images"
    command = ["generate", *scene.photos[:2], "--cameras", scene.cameras, "--trajectory", f"cameras:{scene.cameras}:0-2"]
    command += ["--truth", truth, "--model", model, "--sampler", "teacher", "--steps", 3, "--output", tmp_path / "out"]
    status, out, err = fvgen(*command)
    assert status == 0, err
    assert "PSNR against the true frames" in out
    scores = report(tmp_path / "out")["psnr_db"]
    assert scores["frames"] == [1]
    assert {"generated", "render", "nearer_photo", "generated_covered", "render_covered"} <= set(scores)
    assert scores["render_covered"]["mean"] > max(25, scores["nearer_photo"]["mean"])


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ([], ("teacher", 3)),
        (["--steps", 2], ("teacher", 2)),
        (["--sampler", "few_step"], ("few_step", 4)),
        (["--sampler", "teacher", "--steps", 3], ("teacher", 3)),
    ],
)
def test_a_model_is_sampled_as_it_was_made_for(
    fvgen: Run, scene: Photos, model: str, report: Report, tmp_path: Path, options: list[object], used: tuple[str, int]
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(model, teacher)
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps({**index, "sampler": "ddim", "steps": 3}))
    command = ["generate", *scene.photos[:2], "--cameras", scene.cameras, "--frames", 2, "--model", teacher, *options]
    status, _, err = fvgen(*command, "--output", out)
    assert status == 0, err
    arguments = report(out)["arguments"]
    assert (arguments["sampler"], arguments["steps"]) == used


def test_render_into_true_cameras(fvgen: Run, scene: Photos, report: Report, tmp_path: Path) -> None:
    truth = Path(scene.cameras).parent / "images"
    out = tmp_path / "deep" / "out"
    command = ["render", scene.all[0], scene.all[4], "--cameras", scene.cameras, "--trajectory", f"cameras:{scene.cameras}"]
    status, _, err = fvgen(*command, "--truth", truth, "--size", "96x64", "--radius", 0.02, "--output", out)
    assert status == 0, err
    assert {p.name for p in out.iterdir()} == FILES
    told = report(out)
    assert told["photo_frames"] == [0, 4]
    assert told["psnr_db"]["frames"] == [1, 2, 3]
    assert told["sizes"]["clip"] == [96, 64]
    assert told["psnr_db"]["render_covered"]["mean"] > 25
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    names = [f["file_path"] for f in json.loads((out / "cameras.json").read_text())["frames"]]
    assert names == [f"renders/{i:04d}.png" for i in range(5)]


def test_orbit_starts_at_the_photo(fvgen: Run, scene: Photos, report: Report, tmp_path: Path) -> None:
    command = ["render", *scene.photos[:2], "--cameras", scene.cameras, "--trajectory", "orbit:deg=5,photo=1", "--frames", 3]
    assert fvgen(*command, "--compositor", "alpha", "--output", tmp_path / "out")[0] == 0
    assert report(tmp_path / "out")["photo_frames"] == [0]


def test_overwrite(fvgen: Run, scene: Photos, report: Report, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["render", *scene.photos[:2], "--cameras", scene.cameras, "--size", "48x32", "--output", out]
    assert fvgen(*command, "--frames", 2)[0] == 0
    assert fvgen(*command, "--frames", 3)[0] == 2
    assert report(out)["frames"] == 2
    assert fvgen(*command, "--frames", 3, "--overwrite")[0] == 0
    assert report(out)["frames"] == 3
    assert fvgen(*command, "--trajectory", "orbit:deg=5,photo=9", "--overwrite")[0] == 2
    assert report(out)["frames"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_interrupted(fvgen: Run, scene: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fvgen.cli.output.write_ply", stop)
    command = ["render", *scene.photos[:2], "--cameras", scene.cameras, "--size", "48x32", "--frames", 2]
    status, _, err = fvgen(*command, "--output", tmp_path / "new" / "out")
    assert status == 130
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["generate"], ["render"], ["demo"], ["doctor"], ["bench"], ["train-tiny"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage: fvgen" in text
    if command:
        assert f"fvgen {command[0]}" in text.partition("example")[2]


def test_help_is_instant() -> None:
    code = "import sys\nfrom fvgen.cli import main\ntry: main(['generate', '--help'])\nfinally: assert 'torch' not in sys.modules"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(package.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"fvgen {package.__version__}"


def test_doctor(fvgen: Run) -> None:
    status, out, _ = fvgen("doctor")
    assert status == 0
    for word in ("torch", "pytorch3d", "rasterize_fragments", "fvgen._C", "model tiny", "to do"):
        assert word in out
    assert len(out.splitlines()) < 60


def test_train_tiny_arguments(fvgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fvgen.pretrain import tiny

    seen: dict[str, object] = {}

    def train(**arguments: object) -> dict[str, float]:
        seen.update(arguments)
        return {"render": 20.0}

    monkeypatch.setattr(tiny, "train_tiny", train)
    command = ["train-tiny", "--vae-steps", 3, "--steps", 4, "--teacher-minutes", 0.5, "--seed", 2, "--device", "cpu"]
    assert fvgen(*command, "--output", tmp_path / "t")[0] == 0
    expected = {
        "output": str(tmp_path / "t"),
        "device": "cpu",
        "seed": 2,
        "vae_steps": 3,
        "teacher_steps": 4,
        "teacher_minutes": 0.5,
    }
    assert seen == expected


@pytest.mark.slow
def test_demo(fvgen: Run, report: Report, tmp_path: Path) -> None:
    status, out, err = fvgen("demo", "--output", tmp_path / "demo")
    assert status == 0, err
    scores = report(tmp_path / "demo")["psnr_db"]
    assert scores["frames"] == list(range(1, 15))
    assert scores["generated"]["mean"] > scores["nearer_photo"]["mean"] > scores["render"]["mean"]
    assert scores["render_covered"]["mean"] > 28
    assert min(report(tmp_path / "demo")["coverage"]) > 0.6
    assert "contact_sheet.png" in out


@pytest.mark.slow
def test_example_can_be_written_again(tmp_path: Path) -> None:
    from fvgen.cli.demo import EXAMPLE
    from fvgen.data.synthetic.example import write_example

    write_example(tmp_path / "example")
    names = sorted(str(p.relative_to(EXAMPLE)) for p in EXAMPLE.rglob("*.*"))
    assert names == sorted(str(p.relative_to(tmp_path / "example")) for p in (tmp_path / "example").rglob("*.*"))
    for name in ("frames/0000.png", "frames/0015.png", "photos/0001.jpg"):
        there, again = (np.asarray(Image.open(root / name)).astype(float) for root in (EXAMPLE, tmp_path / "example"))
        assert np.abs(there - again).mean() < 0.5
