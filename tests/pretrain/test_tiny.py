"""The training of the bundled model, at a size that a CPU finishes in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fvgen.models.bundle import ModelBundle
from fvgen.models.spec import ModelSpec
from fvgen.models.vae import make_vae
from fvgen.pretrain import tiny
from fvgen.pretrain.teacher import CHECKPOINT_FILE, TeacherRecipe, TeacherRun, train_teacher
from fvgen.pretrain.tiny import train_model, train_tiny
from fvgen.pretrain.vae import VaeRecipe
from fvgen.recipes.presets import get_preset
from fvgen.utils.errors import UserError

VAE = VaeRecipe(steps=2, batch=2, worlds=1, frames_per_world=2, first_fill=1, buffer=8, held_out=1)
TEACHER = TeacherRecipe(steps=6, batch=2, refill_every=2, pairs=1, buffer=4, first_fill=2, short_frames=(3,))


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """The tiny preset with the same parts, made smaller still."""
    preset = get_preset("tiny")
    return replace(
        preset,
        index=replace(preset.index, height=32, width=64, frames=4),
        unet={**preset.unet, "model_channels": 32, "context_dim": 32, "temporal_length": 4},
        vae={**preset.vae, "block_out_channels": (16, 16, 16, 16)},
        image_encoder={**preset.image_encoder, "image_size": 64, "width": 32},
        image_projector={**preset.image_projector, "input_dim": 32, "output_dim": 32, "dim": 32, "frames": 4},
    )


def _weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [x.clone() for x in module.state_dict().values()]


def test_whole_run_and_what_it_leaves(spec: ModelSpec, tmp_path: Path) -> None:
    output = tmp_path / "run"
    scores = train_model(spec, VAE, TEACHER, output, "cpu", score_clips=1)
    left = {p.name for p in output.iterdir()}
    assert left == {"model", "vae", "training.json", "scores.json", "curves.png", "vae.jsonl", "teacher.jsonl"}
    stored = load_file(output / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in stored.values() if x.is_floating_point()} == {torch.float16}
    bundle = ModelBundle.from_pretrained(output / "model")
    fresh = ModelBundle.random(spec, TEACHER.seed)
    assert torch.equal(bundle.prompt, fresh.prompt.half().float())
    assert not torch.equal(bundle.unet.conv_in.weight, fresh.unet.conv_in.weight)
    assert bundle.vae.config.scaling_factor != 1.0
    record = json.loads((output / "training.json").read_text())
    assert record["runs"]["teacher"]["steps"] == TEACHER.steps
    assert record["runs"]["vae"]["steps"] == VAE.steps
    assert record["settings"]["teacher"]["batch"] == TEACHER.batch
    assert json.loads((output / "scores.json").read_text())["psnr_db"] == pytest.approx(scores, nan_ok=True)
    with pytest.raises(UserError, match="finished run"):
        train_model(spec, VAE, TEACHER, output, "cpu", score_clips=1)


def test_a_run_that_was_cut_ends_with_the_same_weights(spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = make_vae(**spec.vae)
    prompt, empty = torch.randn(2, 77, spec.context_dim).unbind(0)

    def run(output: Path, **options: object) -> list[torch.Tensor]:
        return _weights(train_teacher(TEACHER, vae, prompt, empty, output, "cpu", spec=spec, **options))

    whole = run(tmp_path / "whole")
    advance = TeacherRun.advance

    def cut(self: TeacherRun, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
        if self.step == 5:  # by then the buffer has overwritten its oldest clips
            raise KeyboardInterrupt
        return advance(self, fraction)

    monkeypatch.setattr(TeacherRun, "advance", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", checkpoint_minutes=0)
    monkeypatch.setattr(TeacherRun, "advance", advance)
    resumed = run(tmp_path / "cut", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "teacher.jsonl").read_text().splitlines()]
    assert steps == [0, TEACHER.steps]

    other = replace(TEACHER, peak_lr=1e-3)
    with pytest.raises(UserError, match="other settings"):
        train_teacher(other, vae, prompt, empty, tmp_path / "cut", "cpu", spec=spec, resume=True)
    (tmp_path / "cut" / CHECKPOINT_FILE).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not the state"):
        run(tmp_path / "cut", resume=True)


def test_interrupted_before_the_model_is_saved(spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "run"
    monkeypatch.setattr(tiny, "train_teacher", stop)
    with pytest.raises(KeyboardInterrupt):
        train_model(spec, VAE, TEACHER, output, "cpu")
    assert {p.name for p in output.iterdir()} == {"training.json", "vae", "vae.jsonl"}
    monkeypatch.undo()
    monkeypatch.setattr(tiny, "train_vae", stop)  # the finished VAE is not trained again
    with pytest.raises(UserError, match="other settings"):
        train_model(spec, VAE, replace(TEACHER, seed=1), output, "cpu")
    (output / ".model.partial-0").mkdir()  # of a process that was killed
    train_model(spec, VAE, TEACHER, output, "cpu", score_clips=1)
    assert not [p.name for p in output.iterdir() if p.name.startswith(".")]

    again = tmp_path / "again"
    train_model(spec, None, TEACHER, again, "cpu", vae_from=output / "model", score_clips=1)
    first, second = (load_file(p / "model" / "vae" / "diffusion_pytorch_model.safetensors") for p in (output, again))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_bad_settings(tmp_path: Path) -> None:
    for options in ({"seed": -1}, {"vae_steps": 0}, {"teacher_steps": 0}, {"vae_minutes": 0.0}, {"teacher_minutes": -1.0}):
        with pytest.raises(UserError, match="correct the settings"):
            train_tiny(tmp_path / "new", "cpu", **options)
    with pytest.raises(UserError, match="cpu or cuda"):
        train_tiny(tmp_path / "new", "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no usable GPU"):
            train_tiny(tmp_path / "new", "cuda")
    with pytest.raises(UserError, match="no VAE"):
        train_tiny(tmp_path / "new", "cpu", vae_from=tmp_path / "nowhere")
    make_vae(block_out_channels=(16, 16), norm_num_groups=16).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="the model needs"):
        train_tiny(tmp_path / "new", "cpu", vae_from=tmp_path / "other")
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        train_tiny(tmp_path / "full", "cpu")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_the_preset_is_small_enough_to_ship() -> None:
    """Two bytes per parameter, and 1 % for the headers."""
    counts = ModelBundle.random(get_preset("tiny")).parameter_counts()
    assert 2 * 1.01 * sum(counts.values()) < 16e6
