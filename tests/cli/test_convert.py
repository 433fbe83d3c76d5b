"""Checkpoints in the reference layout through ``fvgen convert`` and on to a video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fvgen.models.dust3r import read_dust3r
from tests.cli.conftest import Photos, Run
from tests.reference_dust3r import random_state

Report = Callable[[Path], dict]


def test_dust3r(fvgen: Run, checkpoint: Path, report: Report, tmp_path: Path) -> None:
    state, network = random_state()
    status, out, err = fvgen("convert", "dust3r", checkpoint, "--output", tmp_path / "new" / "dust3r")
    assert status == 0, err
    told = report(tmp_path / "new" / "dust3r")
    keys = told["keys"]
    unused = {reason: len(names) for reason, names in keys["unused"].items()}
    assert sum(unused.values()) == 9
    assert keys["second_names_of_the_same_tensor"] == 8
    assert keys["in_the_checkpoint"] == len(state) == keys["converted"] + 8 + 9
    assert not keys["second_decoder_copied_from_the_first"]
    assert f"{len(state)} in the checkpoint: {keys['converted']} converted, 8 second names" in out
    assert "1: the mask token" in out
    assert told["parameters"] == sum(p.numel() for p in network.parameters())
    assert told["source"]["name"] == "random.pth"
    found = read_dust3r(tmp_path / "new" / "dust3r")
    assert found.config["image_size"] == 64
    for name, value in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_dust3r_checksums(fvgen: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dust3r"
    assert fvgen("convert", "dust3r", checkpoint, "--dtype", "float16", "--output", folder)[0] == 0
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert {v.dtype for v in load_file(weights).values()} == {torch.float16}
    assert {p.dtype for p in read_dust3r(folder).parameters()} == {torch.float32}
    status, out, _ = fvgen("convert", "dust3r", "--verify", "--output", folder)
    assert status == 0
    assert "config.json" in out
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    status, _, err = fvgen("convert", "dust3r", "--verify", "--output", folder)
    assert status == 2
    assert "differs from its checksum" in err


def test_safetensors_and_one_decoder(fvgen: Run, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights alone tell no sizes: they are those of the published model, which does not fit here."""
    state, _ = random_state()
    one = {k: v.clone().contiguous() for k, v in state.items() if not k.startswith("dec_blocks2.")}
    save_file(one, tmp_path / "weights.safetensors")
    status, _, err = fvgen("convert", "dust3r", tmp_path / "weights.safetensors", "--output", tmp_path / "out")
    assert status == 2
    assert "does not fit" in err
    assert not (tmp_path / "out").exists()
    torch.save({"args": _arguments(), "model": one}, tmp_path / "one.pth")
    status, out, err = fvgen("convert", "dust3r", tmp_path / "one.pth", "--output", tmp_path / "out")
    assert status == 0, err
    assert "one decoder, which stands for both" in out
    assert report(tmp_path / "out")["keys"]["second_decoder_copied_from_the_first"]


def _arguments() -> object:
    import argparse

    from tests.reference_dust3r import CONSTRUCTOR

    return argparse.Namespace(model=CONSTRUCTOR)


def test_nothing_is_left_of_a_failure(fvgen: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    (tmp_path / "garbage.pth").write_bytes(b"\x00garbage")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    cases: dict[str, list[object]] = {
        "no checkpoint of PyTorch": ["dust3r", tmp_path / "garbage.pth"],
        "there is no checkpoint file": ["dust3r", tmp_path / "none.pth"],
        "give the checkpoint file": ["dust3r"],
        "--variant belongs to viewcrafter": ["dust3r", checkpoint, "--preset", "viewcrafter_512"],
        "none of state_dict, module, model": ["viewcrafter", tmp_path / "other.pth"],
        "is a checkpoint of DUSt3R; use `fvgen convert dust3r": ["viewcrafter", checkpoint],
        "download it again": ["viewcrafter", tmp_path / "garbage.pth"],
        "is not a model directory": ["viewcrafter", "--verify"],
        "no directory written by": ["dust3r", "--verify"],
    }
    for words, command in cases.items():
        status, _, err = fvgen("convert", *command, "--output", tmp_path / "out")
        assert status == 2, words
        assert words in err
    status, _, err = fvgen("convert", "viewcrafter", checkpoint, "--output", tmp_path / "garbage.pth" / "deep")
    assert status == 2
    assert "cannot write into" in err
    monkeypatch.setattr("fvgen.models.weights_file.file_sha256", _interrupt)
    assert fvgen("convert", "dust3r", checkpoint, "--output", tmp_path / "out")[0] == 130
    assert {p.name for p in tmp_path.iterdir()} == before | {"garbage.pth", "other.pth"}


def _interrupt(*_: object) -> str:
    raise KeyboardInterrupt


@pytest.mark.parametrize("count", [1, 2, 3])
def test_from_checkpoint_to_video(
    fvgen: Run, scene: Photos, model: str, converted: Path, report: Report, tmp_path: Path, count: int
) -> None:
    """Random weights make no sense of photos; everything around them has to work, and to give the same bytes again."""
    path = ["--trajectory", "dolly:forward=0.1"] if count == 1 else []
    command = ["generate", *scene.photos[:count], "--geometry", "dust3r", "--dust3r-weights", converted, *path, "--frames", 3]
    runs = []
    for name in ("a", "b") if count == 1 else ("a",):
        status, _, err = fvgen(*command, "--model", model, "--steps", 2, "--output", tmp_path / name)
        assert status == 0, err
        runs.append({p.name: p.read_bytes() for p in (tmp_path / name / "frames").iterdir()})
    assert runs[0] == runs[-1]
    told = report(tmp_path / "a")
    assert told["geometry"]["estimator"] == "dust3r, estimated cameras"
    assert len(told["geometry"]["coverage"]) == count
    assert told["arguments"]["dust3r_weights"] == str(converted)
    assert len(told["geometry_weights_sha256"]) == 64
    assert told["frames"] == 2 * max(1, count - 1) + 1


def test_clip_after_clip(
    fvgen: Run, scene: Photos, model: str, converted: Path, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fvgen.geometry.dust3r.spanning_tree.optimise", lambda start, *_a, **_k: (start, []))
    command = ["generate", scene.photos[0], "--dust3r-weights", converted, "--trajectory", "orbit:deg=4", "--frames", 8]
    command += ["--model", model, "--steps", 1]
    status, _, err = fvgen(*command, "--then", "nbv:phi=5", "dolly:forward=0.1", "--output", tmp_path / "out")
    assert status == 0, err
    told = report(tmp_path / "out")
    assert told["frames"] == len(list((tmp_path / "out" / "frames").iterdir())) == 22
    assert told["segments"] == [[0, 7], [7, 14], [14, 21]]
    assert len(told["geometry"]["coverage"]) == 5
    status, _, err = fvgen(*command, "--then", "loop", "--output", tmp_path / "bad")
    assert (status, "unknown camera path" in err) == (2, True)
    status, _, err = fvgen(*command, "--then", "orbit", "--cameras", scene.cameras, "--output", tmp_path / "bad")
    assert (status, "without --cameras" in err) == (2, True)
    assert not (tmp_path / "bad").exists()


def test_render_with_dust3r(fvgen: Run, scene: Photos, checkpoint: Path, report: Report, tmp_path: Path) -> None:
    command = ["render", scene.photos[0], "--trajectory", "orbit:deg=4", "--frames", 3, "--dust3r-weights", checkpoint]
    status, _, err = fvgen(*command, "--output", tmp_path / "out")
    assert status == 0, err
    told = report(tmp_path / "out")["geometry"]
    assert told["estimator"].startswith("dust3r")
    assert told["coverage"][0] > 0
    status, _, err = fvgen(*command, "--min-confidence", 1e6, "--output", tmp_path / "none")
    assert status == 0, err
    assert report(tmp_path / "none")["geometry"]["coverage"] == [0.0]
    assert "only 0% of photo 1 has points" in err


def test_photos_of_several_sizes(fvgen: Run, scene: Photos, checkpoint: Path, report: Report, tmp_path: Path) -> None:
    """Three, whose poses need no sure points. The clip has the frame of the first."""
    files = [scene.photos[0], str(tmp_path / "portrait.png"), str(tmp_path / "small.png")]
    photo = Image.open(scene.photos[1])
    photo.crop((50, 0, 142, 120)).save(files[1])
    photo.resize((96, 60)).save(files[2])
    command = ["render", *files, "--frames", 2, "--size", "64x40", "--dust3r-weights", checkpoint]
    status, _, err = fvgen(*command, "--output", tmp_path / "out")
    assert status == 0, err
    told = report(tmp_path / "out")
    assert told["frames"] == 3
    assert told["sizes"] == {"photos": [192, 120], "geometry": [64, 64], "clip": [64, 40]}
    status, _, err = fvgen(*command, "--cameras", scene.cameras, "--output", tmp_path / "bad")
    assert (status, "bring all photos to one size and orientation" in err) == (2, True)


def test_refused(fvgen: Run, scene: Photos, checkpoint: Path, tmp_path: Path) -> None:
    cases = {
        "needs weights": ["--geometry", "dust3r"],
        "takes no DUSt3R weights": ["--geometry", "classical", "--dust3r-weights", str(checkpoint)],
        "there are no DUSt3R weights": ["--dust3r-weights", "none"],
        "--min-confidence belongs to": ["--min-confidence", "2"],
        "--min-confidence: must be": ["--dust3r-weights", str(checkpoint), "--min-confidence", "0.5"],
        "needs two photos or more": ["--dust3r-weights", str(checkpoint)],
    }
    for words, options in cases.items():
        photos = scene.photos[:1] if "two photos" in words else scene.photos[:2]
        status, out, err = fvgen("render", *photos, *options, "--output", tmp_path / "out")
        assert (status, out) == (2, "")
        assert words in err
        assert not (tmp_path / "out").exists()
