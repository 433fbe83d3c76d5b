from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ablation import CURVE, ROWS, SCORES, Ablation, command_of
from fvgen.bench.model import fill_zeros
from fvgen.distill.classifier import ClassifierConfig
from fvgen.distill.parallel import Parallel
from fvgen.distill.settings import Cadence, default_settings
from fvgen.distill.synthetic import Reuse
from fvgen.models.bundle import ModelBundle
from fvgen.recipes.presets import get_preset


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    tiny = get_preset("tiny")
    small = {"model_channels": 32, "channel_mult": (1,), "attention_resolutions": (1,)}
    spec = replace(tiny, index=replace(tiny.index, height=32, width=64, frames=4), unet={**tiny.unet, **small})
    bundle = ModelBundle.random(spec)
    fill_zeros(bundle.unet)  # a network that predicts nothing has no guidance
    return bundle


def make(bundle: ModelBundle, output: Path, lr: float, student: ModelBundle | None = None) -> Ablation:
    settings = replace(
        default_settings("tiny"), batch=2, micro_batch=2, lr=lr, head=ClassifierConfig(width=8, layers=2, groups=4)
    )
    settings = replace(settings, critic_updates=1, trajectories=2, trajectory_steps=4, warmup=1, lead=0)
    cadence, alone = Cadence(log=1, checkpoint=10**9, keep=1, validate=1), Parallel(0, 1, torch.device("cpu"))
    return Ablation(bundle, output, settings, (1, 1), 2, 2, Reuse(2, 10**9, 2, 0.0), cadence, alone, {}, student, [2.0])


def test_without_learning_every_student_is_the_teacher(bundle: ModelBundle, tmp_path: Path) -> None:
    ablation = make(bundle, tmp_path, 0.0, bundle)
    ablation.baselines()
    for row in ROWS:
        ablation.run(row, 3)
    scores = {(s["row"], s["seed"]): s for s in json.loads((tmp_path / SCORES).read_text())}
    others = ("teacher4", "teacher50", "teacher50_guidance_2", "untrained", "student", "fast", "vae")
    assert set(scores) == {(r, 3) for r in ROWS} | {(r, 0) for r in others}
    for row in ROWS:
        for key in ("psnr", "ssim", "frechet"):
            assert scores[row, 3][key] == scores["untrained", 0][key]
    assert scores["vae", 0]["psnr"] != scores["untrained", 0]["psnr"]
    assert scores["teacher50_guidance_2", 0]["psnr"] != scores["teacher50", 0]["psnr"]
    for key in ("psnr", "ssim"):  # the same network by another path; with one resolution nothing is left out in fast mode
        assert scores["student", 0][key] == pytest.approx(scores["untrained", 0][key], rel=1e-3)
        assert scores["fast", 0][key] == pytest.approx(scores["student", 0][key], rel=1e-6)
    curve = [json.loads(line) for line in (tmp_path / "causvid-3" / CURVE).read_text().splitlines()]
    assert [(c["stage"], c["iteration"]) for c in curve] == [(1, 1), (2, 1)]
    before = (tmp_path / SCORES).read_text()
    again = make(bundle, tmp_path, 0.0)
    again.baselines()
    again.run("fvgen", 3)
    assert (tmp_path / SCORES).read_text() == before


def test_the_command_names_no_places() -> None:
    words = ["/home/me/found", "--real", "scenes/fox/", "0", "7", "--lr", "0.1", "--runs", "fvgen:0"]
    assert command_of(words) == "python -m benchmarks.ablation found --real fox 0 7 --lr 0.1 --runs fvgen:0"


def test_a_second_stage_goes_on_from_the_first(bundle: ModelBundle, tmp_path: Path) -> None:
    ablation = make(bundle, tmp_path, 1e-3)
    ablation.run("reverse_kl", 0)
    rows = {s["row"]: s for s in json.loads((tmp_path / SCORES).read_text())}
    assert list(rows) == ["stage_one_only", "reverse_kl"]
    record = json.loads((tmp_path / "reverse_kl-0" / "run.json").read_text())
    assert record["start"] == str(tmp_path / "stage_one_only-0")
    assert record["settings"]["run"] == "reverse_kl"
    assert rows["reverse_kl"]["psnr"] != rows["stage_one_only"]["psnr"]
