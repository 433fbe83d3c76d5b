from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Photos, Run


def _refused(result: tuple[int, str, str], words: str, tmp_path: Path, before: set[str]) -> None:
    status, out, err = result
    assert status == 2, err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("fvgen: error: ")]
    assert len(errors) == 1, err
    assert err.splitlines()[-1] == errors[0]
    assert "Traceback" not in err
    assert words in errors[0]
    assert {str(p) for p in tmp_path.rglob("*")} == before


@pytest.fixture
def files(tmp_path: Path, scene: Photos) -> dict[str, str]:
    """Bad files by name."""
    good = Path(scene.photos[0]).read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (300, 200)).save(tmp_path / "other_size.png")
    rng = np.random.default_rng(0)
    for name in ("noise_a", "noise_b"):
        Image.fromarray(rng.integers(0, 255, (120, 192, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    data = json.loads(Path(scene.cameras).read_text())
    data["frames"][0]["transform_matrix"][0][3] = math.nan
    (tmp_path / "nan.json").write_text(json.dumps(data))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "no_images").mkdir()
    return {p.name: str(p) for p in tmp_path.iterdir()}


# words of the message, then the command; {a} and {b} are good photos, other names are files of the fixtures
CASES = {
    "missing": ("does not exist", "{a} missing.jpg"),
    "folder": ("is a folder", "{a} {no_images}"),
    "truncated": ("cut short", "{a} {cut.png}"),
    "text": ("not an image", "{a} {text.jpg}"),
    "empty": ("not an image", "{a} {empty.jpg}"),
    "one photo": ("two or more are needed", "{a}"),
    "one photo without DUSt3R": ("or give --dust3r-weights", "{a} --trajectory orbit:deg=10"),
    "no photo": ("PHOTO", ""),
    "the same photo": ("", "{a} {a}"),
    "sizes": ("differ in size", "{a} {other_size.png}"),
    "no overlap": ("", "{noise_a.png} {noise_b.png}"),
    "no camera file": ("does not exist", "{a} {b} --cameras none.json"),
    "broken cameras": ("not a transforms.json", "{a} {b} --cameras {broken.json}"),
    "NaN pose": ("NaN", "{a} {b} --cameras {nan.json}"),
    "photo without camera": ("is not in the camera file", "{noise_a.png} {noise_b.png} --cameras {cameras}"),
    "trajectory": ("unknown camera path 'loop'", "{a} {b} --trajectory loop"),
    "trajectory value": ("finite number", "{a} {b} --trajectory orbit:deg=nan"),
    "trajectory photo": ("there is no photo 5", "{a} {b} --cameras {cameras} --trajectory orbit:photo=5"),
    "trajectory file": ("does not exist", "{a} {b} --trajectory cameras:none.json"),
    "trajectory range": ("0 to 4", "{a} {b} --cameras {cameras} --trajectory cameras:{cameras}:2-9"),
    "one frame": ("--frames: must be a whole number from 2 to 64", "{a} {b} --frames 1"),
    "many frames": ("--frames: must be", "{a} {b} --frames 1000000"),
    "frames": ("--frames: must be", "{a} {b} --frames many"),
    "seed": ("--seed: must be", "{a} {b} --seed -1"),
    "fps": ("--fps: must be", "{a} {b} --fps 0"),
    "device": ("unknown device 'tpu'", "{a} {b} --device tpu"),
    "truth folder": ("does not exist", "{a} {b} --truth none"),
    "truth count": ("holds 0 images and the clip has 16 frames", "{a} {b} --truth {no_images}"),
    "option": ("unrecognized arguments", "{a} {b} --colour red"),
}
GENERATE = {
    "where without --then": ("add --then or leave it out", "{a} {b} --then-from photo"),
    "no steps": ("--steps: must be", "{a} {b} --steps 0"),
    "many steps": ("--steps: must be", "{a} {b} --steps 1001"),
    "sampler": ("--sampler: invalid choice", "{a} {b} --sampler magic"),
    "model": ("there is no model 'huge'", "{a} {b} --model huge"),
    "fast teacher": ("--fast shortens the few-step sampler", "{a} {b} --fast --sampler teacher"),
    "fast teacher, unsaid": ("--fast shortens the few-step sampler", "{a} {b} --fast --model tiny_teacher"),
}
RENDER = {
    "no size": ("--size: must be", "{a} {b} --size 0x0"),
    "absurd size": ("--size: must be", "{a} {b} --size 1000000x1000000"),
    "size": ("--size: must be", "{a} {b} --size big"),
    "radius": ("--radius: must be", "{a} {b} --radius nan"),
    "points per pixel": ("--points-per-pixel: must be", "{a} {b} --points-per-pixel 0"),
    "compositor": ("--compositor: invalid choice", "{a} {b} --compositor over"),
}
ALL = [("generate", k, *v) for k, v in {**CASES, **GENERATE}.items()] + [
    ("render", k, *v) for k, v in {**CASES, **RENDER}.items()
]


@pytest.mark.parametrize(("command", "words", "line"), [(c, w, t) for c, _, w, t in ALL], ids=[f"{c}-{k}" for c, k, _, _ in ALL])
def test_refused(
    fvgen: Run, scene: Photos, model: str, files: dict[str, str], tmp_path: Path, command: str, words: str, line: str
) -> None:
    names = {**files, "a": scene.photos[0], "b": scene.photos[1], "cameras": scene.cameras}
    for name, path in names.items():
        line = line.replace("{" + name + "}", path)
    extra = ["--model", model] if command == "generate" and "--model" not in line else []
    before = {str(p) for p in tmp_path.rglob("*")}
    _refused(fvgen(command, *line.split(), *extra, "--output", tmp_path / "out"), words, tmp_path, before)


def _without(part: str) -> Callable[[Path], None]:
    return lambda root: (root / part).unlink()


def _of_another_kind(root: Path) -> None:
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def _cut_weights(root: Path) -> None:
    file = root / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without("vae/diffusion_pytorch_model.safetensors"), "incomplete"),
        (_without("model_index.json"), "not a model directory"),
        (_of_another_kind, "StableDiffusionPipeline"),
        (_cut_weights, "unet"),
    ],
    ids=["incomplete", "no index", "another kind", "truncated"],
)
def test_bad_model(fvgen: Run, scene: Photos, model: str, tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    root = tmp_path / "model"
    shutil.copytree(model, root)
    damage(root)
    before = {str(p) for p in tmp_path.rglob("*")}
    _refused(fvgen("generate", *scene.photos[:2], "--model", root, "--output", tmp_path / "out"), words, tmp_path, before)


@pytest.mark.parametrize("damage", ["report.json", "SHA256SUMS"])
@pytest.mark.parametrize("command", ["generate", "render"])
def test_dust3r_directory_without_its_report(
    fvgen: Run,
    scene: Photos,
    model: str,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    damage: str,
) -> None:
    """What the report of a run says about the weights is found out before the work, not after it."""
    root = tmp_path / "dust3r"
    shutil.copytree(converted, root)
    (root / damage).unlink()
    before = {str(p) for p in tmp_path.rglob("*")}

    def work(*_arguments: object, **_options: object) -> None:
        raise AssertionError("photos are read before the weights were checked")

    monkeypatch.setattr(f"fvgen.cli.{command}.photo_set", work)
    extra = ["--model", model] if command == "generate" else []
    result = fvgen(command, *scene.photos[:2], "--dust3r-weights", root, *extra, "--output", tmp_path / "out")
    _refused(result, "no directory written by `fvgen convert dust3r`", tmp_path, before)


def test_no_gpu(fvgen: Run, scene: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in ("generate", "render"):
        result = fvgen(command, *scene.photos[:2], "--device", "cuda", "--output", tmp_path / "out")
        _refused(result, "no usable GPU", tmp_path, set())


@pytest.mark.parametrize("command", ["generate", "render"])
def test_nameless_output(fvgen: Run, scene: Photos, tmp_path: Path, command: str) -> None:
    _refused(fvgen(command, *scene.photos[:2], "--output", ""), "give --output a name", tmp_path, set())


def test_foreign_output(fvgen: Run, scene: Photos, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    before = {str(p) for p in tmp_path.rglob("*")}
    command = ["render", *scene.photos[:2], "--output", out]
    _refused(fvgen(*command), "exists", tmp_path, before)
    _refused(fvgen(*command, "--overwrite"), "other files", tmp_path, before)
    _refused(fvgen("render", *scene.photos[:2], "--output", out / "thesis.txt"), "not a directory", tmp_path, before)
    _refused(fvgen("render", *scene.photos[:2], "--output", out / "thesis.txt" / "deep"), "cannot write", tmp_path, before)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output(fvgen: Run, scene: Photos, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    _refused(fvgen("render", *scene.photos[:2], "--output", tmp_path / "out"), "cannot write", tmp_path, set())
    tmp_path.chmod(0o700)


def test_too_little_memory(fvgen: Run, scene: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1000)
    _refused(fvgen("render", *scene.photos[:2], "--output", tmp_path / "out"), "of memory", tmp_path, set())


def test_memory_ran_out(fvgen: Run, scene: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_a: object, **_k: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fvgen.cli.render.prepare", fail)
    _refused(fvgen("render", *scene.photos[:2], "--output", tmp_path / "out"), "memory ran out", tmp_path, set())


def test_bugs_show_their_traceback(fvgen: Run, scene: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_a: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("fvgen.cli.output.write_ply", fail)
    command = ["render", *scene.photos[:2], "--cameras", scene.cameras, "--size", "48x32", "--frames", 2]
    with pytest.raises(RuntimeError, match="a bug"):
        fvgen(*command, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())
