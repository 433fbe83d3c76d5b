"""Held-out scores with models whose score is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fvgen import sampling
from fvgen.data.synthetic import synthetic_pairs
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.evaluation import heldout
from fvgen.evaluation.heldout import HELD_OUT_SEED, clip_scores, held_out_scores
from fvgen.models.bundle import ModelBundle
from fvgen.recipes.presets import get_preset
from fvgen.sampling import ModelSampler
from fvgen.types import Condition
from fvgen.utils.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    preset = get_preset("tiny")
    spec = replace(
        preset,
        index=replace(preset.index, height=32, width=64, frames=4),
        unet={**preset.unet, "model_channels": 32, "context_dim": 32, "temporal_length": 4},
        vae={**preset.vae, "block_out_channels": (16, 16, 16, 16)},
        image_encoder={**preset.image_encoder, "image_size": 64, "width": 32},
        image_projector={**preset.image_projector, "input_dim": 32, "output_dim": 32, "dim": 32, "frames": 4},
    )
    return ModelBundle.random(spec)


def test_a_network_that_knows_the_truth_scores_what_the_vae_scores(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """v = (a x - s x0) / b is the velocity that leads to x0 from any x; DDIM adds a little noise at its end."""
    index = bundle.index
    truth = synthetic_pairs(torch.tensor([HELD_OUT_SEED]), (32, 64), 4, compositor=index.compositor).target
    clean = ModelSampler(bundle).codec.encode(truth)
    schedule = NoiseSchedule.create(index.base_scale)

    def oracle(*_: object) -> object:
        def predict_v(x: torch.Tensor, t: torch.Tensor, _condition: Condition) -> torch.Tensor:
            a, b, s = schedule.rates(t, x)
            return (a * x - s * clean) / b

        return predict_v

    monkeypatch.setattr(sampling, "unet_predictor", oracle)
    scores = held_out_scores(bundle, clips=1, ddim_steps=())
    for kind in ("", "_covered", "_uncovered"):
        # float32 rounding of the latents alone separates the two
        assert scores[f"generated{kind}"] == pytest.approx(scores[f"vae{kind}"], abs=1e-3)


def test_render_scores_by_hand_and_masks_that_part_the_frame(bundle: ModelBundle) -> None:
    scores = held_out_scores(bundle, clips=2, batch=1, ddim_steps=(1,))
    names = ("render", "generated", "fast", "teacher1", "vae")
    assert set(scores) == {f"{n}{k}" for n in names for k in ("", "_covered", "_uncovered")} | {"coverage"}
    pairs = synthetic_pairs(torch.tensor([0, 1]) + HELD_OUT_SEED, (32, 64), 4, compositor="norm")
    error = (pairs.render - pairs.target)[:, 1:-1].double().square().mean(2)
    assert scores["render"] == pytest.approx(float((-10 * error.mean((2, 3)).log10()).mean()), abs=0.02)
    assert scores["coverage"] == pytest.approx(float(pairs.coverage[:, 1:-1].double().mean()), abs=1e-3)
    again = held_out_scores(bundle, clips=2, batch=2, ddim_steps=(1,))
    assert again["vae"] == pytest.approx(scores["vae"], abs=0.02)


def test_clip_scores() -> None:
    """Errors 0.1 on the covered half and 0.01 elsewhere: 20 dB, 40 dB and, together, -10 log10(0.00505), without end frames."""
    truth = torch.full((2, 4, 3, 8, 8), 0.5)
    covered = torch.zeros(2, 4, 8, 8, dtype=torch.bool)
    covered[..., :4] = True
    video = truth + torch.where(covered[:, :, None], 0.1, 0.01)
    video[:, [0, -1]] = 0
    scores = clip_scores("x", video, truth, covered)
    assert scores["x_covered"] == pytest.approx([20, 20], abs=1e-3)
    assert scores["x_uncovered"] == pytest.approx([40, 40], abs=1e-2)
    assert scores["x"] == pytest.approx([22.967, 22.967], abs=1e-3)
    none = clip_scores("x", video, truth, torch.ones_like(covered))
    assert all(torch.tensor(none["x_uncovered"]).isnan())


def test_bad_numbers(bundle: ModelBundle) -> None:
    with pytest.raises(UserError, match="at least one clip"):
        held_out_scores(bundle, clips=0)


def test_command_line(
    bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("FVGEN_COMMIT", "abc")
    heldout.main([str(tmp_path / "model"), "--clips", "1", "--device", "cpu", "--json", str(tmp_path / "out" / "scores.json")])
    assert "generated, 4 steps" in capsys.readouterr().out
    records = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {r["name"] for r in records} == {f"tiny_{name}" for name in ("psnr_generated", "psnr_fast", "psnr_render", "vae_psnr")}
    assert all({"value", "unit", "gpu", "driver", "torch", "cuda", "command"} <= set(r) for r in records)
    assert {r["commit"] for r in records} == {"abc"}
    with pytest.raises(SystemExit) as stop:
        heldout.main([str(tmp_path / "nowhere"), "--device", "cpu"])
    assert stop.value.code == 2
