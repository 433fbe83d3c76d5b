"""``fvgen prepare`` from folders to shards: the same bytes in one go, in parts and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fvgen.data.prepare as prepare_module
from fvgen.data.clips import Clip
from fvgen.data.encode import PairEncoder
from fvgen.data.layouts import find_captures, read_capture
from fvgen.data.pairs import build_pair
from fvgen.data.prepare import Plan, read_plan
from fvgen.data.shards import CLIP_KEYS, KEPT_KEYS, ShardSet, shard_name
from fvgen.geometry.resize import fit
from fvgen.io import read_images
from fvgen.io.durable import is_partial
from fvgen.models.bundle import ModelBundle
from fvgen.sampling import ModelSampler
from fvgen.utils.errors import UserError
from tests.data.scenes import truth, write_colmap_scene, write_realestate_scene, write_transforms_scene

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
Run = Callable[..., tuple[int, str, str]]
OPTIONS = ("--frames", 4, "--max-stride", 2, "--clips-per-scene", 3, "--clips-per-shard", 2, "--min-coverage", 0.05)


def contents(root: Path) -> dict[str, bytes]:
    """Of all files but those that a killed process has left in work."""
    return {p.name: p.read_bytes() for p in sorted(root.iterdir()) if not is_partial(p)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three usable captures, one that is too short and one that cannot be read: 9 clips, 5 shards."""
    root = tmp_path_factory.mktemp("captures")
    write_transforms_scene(root / "a" / "depth", "png")
    write_colmap_scene(root / "b")
    write_realestate_scene(root / "c", "clip")
    made = truth()
    short = replace(made, rgb=made.rgb[:2], cameras=made.cameras[:2], depth=made.depth[:2])
    write_transforms_scene(root / "short", None, short)
    (root / "torn").mkdir()
    (root / "torn" / "transforms.json").write_text("{")
    return root


@pytest.fixture(scope="module")
def prepared(folder: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fvgen.cli import main

    output = tmp_path_factory.mktemp("sets") / "one"
    command = ["prepare", folder, "--output", output, "--model", model, *OPTIONS]
    assert main([str(c) for c in command]) == 0
    return output


def test_a_set(prepared: Path, folder: Path) -> None:
    found = ShardSet(prepared)
    report = json.loads((prepared / "report.json").read_text())
    assert len(found) == report["clips"]["written"] == 9 - report["clips"]["rejected"]
    assert len(found) >= 6
    assert report["scene_reasons"] == {"too few frames": 1, "unreadable cameras": 1}
    assert {s["scene"] for s in report["rejected_scenes"]} == {"short", "torn"}
    text = (prepared / "report.md").read_text()
    assert "short: too few frames (2 frames; a clip has 4)" in text
    assert str(folder) not in text
    info = found.info
    assert (info["size"], info["frames"], info["seed"], info["max_stride"]) == ([40, 64], 4, 0, 2)
    assert info["model"]["preset"] == "tiny"
    assert len(info["model"]["sha256"]) == 64
    assert "torch" in info["versions"]
    assert {found.describe(i)["scene"] for i in range(len(found))} == {"a/depth", "b", "c/clip"}
    clip = found[0]
    assert clip["clean"].shape == clip["render"].shape == (8, 4, 10, 16)
    assert clip["world_from_cam"].shape == (4, 4, 4)
    assert clip["K"].shape == (4, 3, 3)
    assert int(clip["fps"]) == 10
    assert found.constants["text_tokens"].shape == (77, 64)
    assert found.constants["uncond_context"].shape == (77 + len(clip["image_tokens"]), 64)
    with Image.open(prepared / "contact_sheet.png") as sheet:
        assert sheet.width == 5 * 64 + 4 * 2
        assert sheet.height in [rows * (40 + 18) for rows in range(3, 9)]  # a clip of each scene at least


def test_latents_and_tokens_are_those_of_the_pipeline(prepared: Path, folder: Path, model: str) -> None:
    """Made again by hand for one clip: frames from the clip's own builder, latents by the sampler that generates videos."""
    found = ShardSet(prepared)
    bundle = ModelBundle.from_pretrained(model)
    sampler = ModelSampler(bundle)
    for i in (0, len(found) - 1):
        told = found.describe(i)
        capture = next(f for f in find_captures(folder) if f.name == told["scene"])
        clip = Clip(told["scene"], told["number"], told["first"], told["stride"])
        limits = read_plan(prepared).settings["limits"]
        pair = build_pair(
            read_capture(capture, (40, 64)), clip, 4, (40, 64), bundle.index.compositor, limits=prepare_module.Limits(**limits)
        )
        condition = sampler.condition(pair.renders.rgb, guidance=True)
        assert condition.uncond_context is not None
        with torch.no_grad():  # the network itself, frame by frame
            moments = torch.cat([bundle.vae.encode(2 * frame[None] - 1).latent_dist.mean for frame in pair.truth])
        clean = (moments * bundle.vae.config.scaling_factor).transpose(0, 1)
        got = found[i]
        for stored, wanted in (
            (got["clean"], clean),
            (got["render"], condition.latents[0]),
            (torch.cat([found.constants["text_tokens"], got["image_tokens"]]), condition.context[0]),
            (found.constants["uncond_context"], condition.uncond_context[0]),
        ):
            torch.testing.assert_close(stored, wanted, rtol=2**-11, atol=2e-5)  # half precision
        assert int(got["fps"]) == int(condition.fps[0])
        assert torch.equal(got["world_from_cam"], truth().cameras.world_from_cam[list(clip.frames(4))]) or i > 0


def test_parts_make_the_same_bytes(prepared: Path, folder: Path, model: str, fvgen: Run, tmp_path: Path) -> None:
    command = ["prepare", folder, "--output", tmp_path / "set", "--model", model, *OPTIONS]
    for part, left in (("3/3", 4), ("1/3", 2)):
        status, out, err = fvgen(*command, "--part", part)
        assert status == 0, err
        assert f"{left} of 5 shards are left" in out
    status, _, err = fvgen("prepare", "--output", tmp_path / "set", "--finish")
    assert status == 2
    assert "2 of 5 shards are not there yet (1, 4)" in err
    status, out, err = fvgen(*command, "--part", "2/3")  # the last one finishes
    assert status == 0, err
    assert contents(tmp_path / "set") == contents(prepared)
    status, out, _ = fvgen("prepare", "--output", tmp_path / "set", "--verify")
    assert status == 0
    assert "as they were written" in out


def test_a_capture_itself(folder: Path, model: str, fvgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scene carries its name, wherever the command is given."""
    command = ["--model", model, *OPTIONS, "--output"]
    assert fvgen("prepare", folder / "b", *command, tmp_path / "far")[0] == 0
    monkeypatch.chdir(folder / "b")
    assert fvgen("prepare", ".", *command, tmp_path / "near")[0] == 0
    found = ShardSet(tmp_path / "near")
    assert {found.describe(i)["scene"] for i in range(len(found))} == {"b"}
    assert contents(tmp_path / "near") == contents(tmp_path / "far")


def test_shares_of_a_launcher(monkeypatch: pytest.MonkeyPatch, fvgen: Run, tmp_path: Path) -> None:
    from fvgen import envs

    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert envs.launched() == (2, 4, 1)
    monkeypatch.setenv("RANK", "4")
    status, _, err = fvgen("prepare", tmp_path, "--output", tmp_path / "x", "--device", "cpu")
    assert status == 2
    assert "RANK" in err


@pytest.mark.slow
def test_killed_and_started_again(prepared: Path, folder: Path, model: str, tmp_path: Path) -> None:
    """SIGKILL while the third shard is in work, a torn shard, and what a killed writer leaves: the second run mends all."""
    output = tmp_path / "set"
    command = [sys.executable, "-m", "fvgen.cli", "prepare", folder, "--output", output, "--model", model, *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (output / shard_name(1)).exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "index.json").exists()
    kept = (output / shard_name(0)).stat().st_mtime_ns
    (output / shard_name(1)).write_bytes((output / shard_name(1)).read_bytes()[:1000])
    (output / f".{shard_name(2)}.partial-x").write_bytes(b"x")
    subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert (output / shard_name(0)).stat().st_mtime_ns == kept
    assert contents(output) == contents(prepared)


class Killed(BaseException):
    pass


def test_a_death_before_any_file(folder: Path, model: str, fvgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run dies at its second rename, so that every file is once the last one; until a run gets through."""
    command = ["prepare", folder / "c", "--model", model, *OPTIONS, "--output"]
    assert fvgen(*command, tmp_path / "whole")[0] == 0
    really, deaths = os.replace, 0
    for _ in range(20):
        left = [1]

        def replace_once(*places: str, left: list[int] = left) -> None:
            if not left:
                raise Killed
            left.pop()
            really(*places)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_once)
            patch.setattr(Path, "unlink", lambda *_a, **_k: None)
            try:
                fvgen(*command, tmp_path / "set")
                break
            except Killed:
                deaths += 1
        if deaths == 3:  # constants and both shards are there, the rest is written anew in every run
            break
    assert deaths == 3
    assert fvgen(*command, tmp_path / "set")[0] == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_kept_frames(folder: Path, model: str, fvgen: Run, tmp_path: Path) -> None:
    """Photos, rounded, at the size of the clip; the end frames stand in both clips; the rest of the tensors stay the same."""
    command = ["prepare", folder / "a", "--model", model, *OPTIONS, "--output"]
    assert fvgen(*command, tmp_path / "plain")[0] == 0
    status, _, err = fvgen(*command, tmp_path / "set", "--keep-frames")
    assert status == 0, err
    found, plain = ShardSet(tmp_path / "set", (*CLIP_KEYS, *KEPT_KEYS)), ShardSet(tmp_path / "plain")
    files = sorted((folder / "a" / "depth" / "images").iterdir())
    for i in range(len(found)):
        clip, told = found[i], found.describe(i)
        photos = read_images([files[told["first"] + told["stride"] * t] for t in range(4)])
        wanted = fit(photos, None, (40, 64))[0].rgb
        assert (clip["clean_rgb"].float() - wanted * 255).abs().max() <= 0.5 + 1e-4
        assert torch.equal(clip["clean_rgb"][[0, -1]], clip["render_rgb"][[0, -1]])
        inner = slice(1, -1)
        assert (clip["render_rgb"][inner].amax(1)[~clip["coverage"][inner]] == 0).all()
        assert float(clip["coverage"][inner].float().mean()) == pytest.approx(told["coverage"], abs=1e-4)
        assert all(torch.equal(clip[key], plain[i][key]) for key in CLIP_KEYS)


def test_rejected_clips_leave_no_row(folder: Path, model: str, fvgen: Run, tmp_path: Path) -> None:
    root = tmp_path / "captures"
    for name in ("good", "bad"):
        write_transforms_scene(root / name)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "bad" / "images" / "frame_00004.png")
    status, out, err = fvgen("prepare", root, "--output", tmp_path / "set", "--model", model, *OPTIONS)
    assert status == 0, err
    assert "unreadable image" in out
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    spoiled = [c for c in read_plan(tmp_path / "set").clips if c.scene == "bad" and 3 in c.frames(4)]
    assert report["reasons"] == {"unreadable image": len(spoiled)}
    assert spoiled
    assert len(ShardSet(tmp_path / "set")) == 6 - len(spoiled)

    status, _, err = fvgen("prepare", root, "--output", tmp_path / "none", "--model", model, *OPTIONS, "--min-psnr", 99)
    assert status == 2
    assert "all 6 clips were rejected" in err
    assert "99" not in (tmp_path / "none" / "report.md").read_text().split("rejected because")[0]
    assert not (tmp_path / "none" / "index.json").exists()


def test_latents_beyond_the_stored_type_are_rejected(folder: Path, model: str) -> None:
    bundle = ModelBundle.from_pretrained(model)
    capture = read_capture(find_captures(folder / "a")[0], (40, 64))
    pair = build_pair(capture, Clip("x", 0, 0, 1), 4, (40, 64), limits=prepare_module.Limits(min_coverage=0.05))
    with torch.no_grad():
        bundle.vae.quant_conv.bias.fill_(7e4)
    with pytest.raises(prepare_module.Rejected, match="not finite"):
        PairEncoder(bundle)(pair)
    assert PairEncoder(bundle, torch.float32)(pair)["clean"].max() > 65504


def test_bad_input(prepared: Path, folder: Path, model: str, fvgen: Run, tmp_path: Path) -> None:
    base = ["prepare", folder, "--model", model, *OPTIONS, "--output"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for command, told in (
        ([*base, prepared, "--seed", 4], "was begun with seed 0, not 4"),
        ([*base, prepared, "--min-psnr", 3], "was begun with limits"),
        ([*base, tmp_path / "full"], "holds other files"),
        ([*base, tmp_path / "x", "--part", "4/3"], "must be I/N"),
        ([*base, tmp_path / "x", "--part", "0/3"], "must be I/N"),
        ([*base, tmp_path / "x", "--frames", 2], "from 3 to 64"),
        ([*base, tmp_path / "x", "--frames", 40], "gives a clip"),
        ([*base, tmp_path / "x", "--model", "none"], "there is no model"),
        (["prepare", "--output", tmp_path / "x"], "FOLDER is missing"),
        (["prepare", "--output", tmp_path / "x", "--finish"], "holds no prepared clips"),
        (["prepare", "--output", tmp_path / "x", "--verify"], "holds no prepared clips"),
        (["prepare", tmp_path / "empty", "--model", model, "--output", tmp_path / "x"], "holds no clips"),
        (["prepare", tmp_path / "gone", "--model", model, "--output", tmp_path / "x"], "is not a folder"),
    ):
        status, _, err = fvgen(*command)
        assert (status, told in err) == (2, True), (command, err)
        assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_a_capture_that_changed_is_not_silently_rejected(model: str, fvgen: Run, tmp_path: Path) -> None:
    folder = write_transforms_scene(tmp_path / "captures")
    command = ["prepare", folder, "--output", tmp_path / "set", "--model", model, *OPTIONS]
    assert fvgen(*command, "--part", "2/2")[0] == 0
    (folder / "images" / "frame_00001.png").unlink()
    status, _, err = fvgen(*command)
    assert status == 2
    assert "had 8 frames" in err


def test_interrupted(folder: Path, model: str, fvgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "build_pair", interrupt)
    status, _, err = fvgen("prepare", folder, "--output", tmp_path / "set", "--model", model, *OPTIONS)
    assert status == 130
    assert "finished shards are kept" in err


def test_plan_as_text(prepared: Path) -> None:
    text = (prepared / "info.json").read_text()
    assert Plan.from_json(text).to_json() == text
    with pytest.raises(UserError, match="no prepared clips"):
        read_plan(prepared / "x")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real captures are not at {REAL}")
def test_real_captures(fvgen: Run, tmp_path: Path) -> None:
    """The bundled model on photos; the renders of what is kept agree with them."""
    command = ["prepare", REAL / "tum_desk", "--output", tmp_path / "set", "--clips-per-scene", 2, "--max-stride", 1]
    status, _, err = fvgen(*command)
    assert status == 0, err
    found = ShardSet(tmp_path / "set")
    assert len(found) == 2
    for told in map(found.describe, range(2)):
        assert told["psnr_covered"] > 24
        assert told["coverage"] > 0.4
        assert found[told["number"]]["clean"].shape == (8, 16, 20, 32)


def test_a_student_trains_on_it(folder: Path, model: str, fvgen: Run, tmp_path: Path) -> None:
    """The trainer reads what was prepared, for a teacher of clips as short as these captures."""
    teacher, shards, run = tmp_path / "teacher", tmp_path / "shards", tmp_path / "run"
    shutil.copytree(model, teacher)
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps({**index, "frames": 4}))
    status, _, err = fvgen("prepare", folder, "--output", shards, "--model", teacher, *OPTIONS)
    assert status == 0, err
    given = ["--teacher", teacher, "--data", shards, "--output", run, "--batch", 1, "--critic-updates", 1, "--iterations", 1]
    status, _, err = fvgen("distill", *given, "--stage", 1, "--validate-every", 0, "--device", "cpu")
    assert status == 0, err
    updates = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    assert [u["update"] for u in updates] == ["critic", "student"]
    held = ShardSet(shards)
    means = [float(held[i]["clean"].mean()) for i in range(len(held))]
    assert min(abs(updates[0]["real_mean"] - mean) for mean in means) < 1e-5
