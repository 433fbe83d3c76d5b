"""``fvgen convert viewcrafter`` on a small random checkpoint in the reference layout."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fvgen.models.bundle import ModelBundle, read_index
from fvgen.models.unet import VideoUNet
from fvgen.pipeline import BUNDLED, FVGenPipeline
from fvgen.utils.errors import UserError
from tests.cli.conftest import Photos, Run
from tests.reference_checkpoints import viewcrafter_spec, viewcrafter_state, write_viewcrafter

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return viewcrafter_state(viewcrafter_spec("tiny"))


@pytest.fixture(scope="module")
def source(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model_sparse.ckpt"
    write_viewcrafter(path, state)
    return path


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The presets that were asked for; each is a small one here."""
    names: list[str] = []
    monkeypatch.setattr("fvgen.recipes.presets.get_preset", lambda name: names.append(name) or viewcrafter_spec("tiny"))
    return names


@pytest.mark.parametrize(
    ("options", "preset", "dtype"),
    [
        ([], "viewcrafter_512", torch.float16),
        (["--variant", "1024", "--dtype", "bf16"], "viewcrafter_1024", torch.bfloat16),
        (["--preset", "viewcrafter_1024", "--dtype", "float32"], "viewcrafter_1024", torch.float32),
        (["--variant", "512", "--dtype", "fp32"], "viewcrafter_512", torch.float32),
    ],
)
def test_variants_and_precision(
    fvgen: Run, source: Path, state: dict, asked: list[str], tmp_path: Path, options: list[str], preset: str, dtype: torch.dtype
) -> None:
    out = tmp_path / "out"
    status, said, err = fvgen("convert", "viewcrafter", source, "--output", out, *options)
    assert status == 0, err
    assert asked == [preset]
    weights = load_file(out / "unet" / WEIGHTS)
    assert {value.dtype for value in weights.values()} == {dtype}
    expected = state["model.diffusion_model.out.2.weight"].to(dtype)
    assert torch.equal(weights["conv_out.weight"], expected)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert digest in said
    card = (out / "README.md").read_text()
    for fact in ("model_sparse.ckpt", digest, preset.removeprefix("viewcrafter_"), str(dtype)[6:], "## Licence", "Drexubery"):
        assert fact in card
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_wrong_words(fvgen: Run, source: Path, tmp_path: Path) -> None:
    for option, value, words in (
        ("--dtype", "int8", "must be bf16, fp16, fp32"),
        ("--variant", "256", "must be 512 or 1024"),
        ("--preset", "tiny", "must be 512 or 1024"),
    ):
        status, _, err = fvgen("convert", "viewcrafter", source, "--output", tmp_path / "out", option, value)
        assert status == 2
        assert words in err


def test_checksums(fvgen: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fvgen("convert", "viewcrafter", source, "--output", out)[0] == 0
    status, said, err = fvgen("convert", "viewcrafter", "--verify", "--output", out)
    assert status == 0, err
    assert said == (out / "SHA256SUMS").read_text()
    assert len(said.splitlines()) == 4 * 2 + 3
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, check=True, capture_output=True)
    ModelBundle.from_pretrained(out, verify=True)
    weights = out / "vae" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ModelBundle.from_pretrained(out)  # cannot be noticed without being asked for
    for load in (ModelBundle.from_pretrained, FVGenPipeline.from_pretrained):
        with pytest.raises(UserError, match=rf"vae/{WEIGHTS} differs from its checksum"):
            load(out, verify=True)
    status, _, err = fvgen("convert", "viewcrafter", "--verify", "--output", out)
    assert (status, "differs from its checksum" in err) == (2, True)
    weights.unlink()
    assert "is missing" in fvgen("convert", "viewcrafter", "--verify", "--output", out)[2]


def test_lists_that_prove_nothing(fvgen: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fvgen("convert", "viewcrafter", source, "--output", out)[0] == 0
    sums = out / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    unet = next(line for line in lines if f"unet/{WEIGHTS}" in line)
    for text, words in (
        ("", "is damaged"),
        ("".join(line for line in lines if line != unet), f"says nothing about unet/{WEIGHTS}"),
        ("nonsense\n", "is damaged"),
        (None, "has no SHA256SUMS"),
    ):
        sums.unlink() if text is None else sums.write_text(text)
        status, _, err = fvgen("convert", "viewcrafter", "--verify", "--output", out)
        assert (status, words in err) == (2, True), err


def test_large_components_are_in_several_files(fvgen: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvgen.models.tensor_files.MAX_SHARD", 500_000)
    assert fvgen("convert", "viewcrafter", source, "--output", tmp_path / "many", "--dtype", "fp32")[0] == 0
    monkeypatch.undo()
    unet = tmp_path / "many" / "unet"
    shards = sorted(unet.glob("diffusion_pytorch_model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert not (unet / WEIGHTS).exists()
    assert all(file.stat().st_size < 600_000 for file in shards)
    bundle = ModelBundle.from_pretrained(tmp_path / "many", verify=True)
    theirs = VideoUNet.from_pretrained(unet, low_cpu_mem_usage=False)
    assert all(torch.equal(a, b) for a, b in zip(bundle.unet.parameters(), theirs.parameters(), strict=True))
    shards[0].unlink()
    with pytest.raises(UserError, match=rf"incomplete: unet/{shards[0].name} missing"):
        ModelBundle.from_pretrained(tmp_path / "many")
    (unet / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(UserError, match="names no files"):
        ModelBundle.from_pretrained(tmp_path / "many")


def test_values_that_cannot_be_stored(fvgen: Run, state: dict, tmp_path: Path) -> None:
    name, path = "model.diffusion_model.out.2.bias", tmp_path / "file.ckpt"
    for value, dtype, words in (
        (1e6, "fp16", "the weight conv_out.bias holds values that are too large for float16; use --dtype bf16"),
        (float("nan"), "fp32", "the weight conv_out.bias holds values that are not finite"),
        (float("inf"), "fp16", "the weight conv_out.bias holds values that are not finite"),
    ):
        write_viewcrafter(path, state | {name: torch.full_like(state[name], value)})
        status, _, err = fvgen("convert", "viewcrafter", path, "--dtype", dtype, "--output", tmp_path / "out")
        assert (status, words in err) == (2, True), err
        assert [p.name for p in tmp_path.iterdir()] == ["file.ckpt"]
    write_viewcrafter(path, state | {name: torch.full_like(state[name], 1e6)})
    assert fvgen("convert", "viewcrafter", path, "--dtype", "bf16", "--output", tmp_path / "out")[0] == 0


def test_damaged_bytes(fvgen: Run, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    status, _, err = fvgen("convert", "viewcrafter", path, "--output", tmp_path / "out")
    assert (status, "is damaged at" in err) == (2, True), err
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.ckpt"]


@pytest.mark.parametrize("kind", ["viewcrafter", "dust3r"])
def test_too_little_space(
    fvgen: Run, source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(10**9, 10**9 - 10**6, 10**6))
    file = source if kind == "viewcrafter" else checkpoint
    status, _, err = fvgen("convert", kind, file, "--output", tmp_path / "out")
    assert (status, "MB are needed; free some space" in err) == (2, True), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["viewcrafter", "dust3r"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_leave_nothing(
    fvgen: Run,
    source: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: int,
    status: int,
) -> None:
    from fvgen.models.tensor_files import stored

    seen: list[str] = []

    def kill(name: str, *rest: object) -> torch.Tensor:
        seen.append(name)
        if len(seen) == 3:
            assert list(tmp_path.iterdir()) != []
            os.kill(os.getpid(), number)
        return stored(name, *rest)

    monkeypatch.setattr("fvgen.models.tensor_files.stored", kill)
    # whoever started the tests may have had signals ignored, as nohup does
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        weights = source if kind == "viewcrafter" else checkpoint
        found, _, err = fvgen("convert", kind, weights, "--output", tmp_path / "new" / "out")
    finally:
        signal.signal(number, before)
    assert (found, "nothing was left behind" in err) == (status, True)
    assert len(seen) == 3
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("kind", ["viewcrafter", "dust3r"])
def test_an_empty_directory_is_taken(fvgen: Run, source: Path, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    file = source if kind == "viewcrafter" else checkpoint
    (tmp_path / "out").mkdir()
    status, _, err = fvgen("convert", kind, file, "--output", tmp_path / "out")
    assert status == 0, err
    status, _, err = fvgen("convert", kind, file, "--output", tmp_path / "out")
    assert (status, "--overwrite" in err) == (2, True)
    assert fvgen("convert", kind, file, "--output", tmp_path / "out", "--overwrite")[0] == 0


def test_bundled_models_have_checksums(fvgen: Run, scene: Photos, model: str, converted: Path, tmp_path: Path) -> None:
    for folder in BUNDLED.values():
        ModelBundle.from_pretrained(folder, verify=True)
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    command = ["generate", *scene.photos[:2], "--model", copy, "--frames", 3, "--steps", 1, "--verify"]
    with (copy / "prompt.safetensors").open("ab") as stream:
        stream.write(b"\0")
    status, _, err = fvgen(*command, "--output", tmp_path / "out")
    assert (status, "prompt.safetensors differs from its checksum" in err) == (2, True)
    weights = tmp_path / "dust3r"
    shutil.copytree(converted, weights)
    with (weights / "config.json").open("a") as text:
        text.write("\n")
    command[command.index(copy)] = model
    status, _, err = fvgen(*command, "--dust3r-weights", weights, "--output", tmp_path / "out")
    assert (status, "config.json differs from its checksum" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert read_index(model).preset == "tiny"


def test_prompts(fvgen: Run, source: Path, scene: Photos, model: str, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    assert fvgen("convert", "viewcrafter", source, "--keep-text-tower", "--output", out)[0] == 0
    assert (out / "text_encoder" / WEIGHTS).is_file()
    command = [
        "generate",
        *scene.photos[:2],
        "--cameras",
        scene.cameras,
        "--frames",
        3,
        "--steps",
        1,
        "--output",
        tmp_path / "out",
    ]
    for options, words in (
        (["--model", model, "--prompt", "A cat"], "has no text tower"),
        (["--model", out, "--prompt", "A cat"], "--tokenizer"),
        (["--model", model, "--tokenizer", tmp_path], "only for a prompt of your own"),
    ):
        status, _, err = fvgen(*command, *options)
        assert (status, words in err) == (2, True), err
        assert not (tmp_path / "out").exists()
    status, _, err = fvgen(*command, "--model", model, "--prompt", "")
    assert status == 0, err
