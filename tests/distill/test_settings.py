"""Every setting reaches the methods, and can be said."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fvgen.distill.classifier import ClassifierConfig
from fvgen.distill.configs import MatchingConfig, StageOneConfig
from fvgen.distill.overrides import override, setting_types
from fvgen.distill.parallel import Parallel
from fvgen.distill.run import make_methods
from fvgen.distill.settings import TrainSettings, changed_settings
from fvgen.utils.errors import UserError

ONE = Parallel(0, 1, torch.device("cpu"))
UNUSUAL: dict[str, Any] = {
    "times": (999, 499),
    "inputs": "rollout",
    "critic_updates": 3,
    "guidance": 2.5,
    "rescale": 0.4,
    "divergence": "jensen_shannon",
    "clip": 4.0,
    "adversarial_weight": 0.25,
    "score_span": (0.1, 0.9),
    "fake_span": (0.2, 0.8),
    "classifier_span": (0.05, 0.95),
    "r1_weight": 0.3,
    "r1_sigma": 0.02,
}


@pytest.mark.parametrize("run", ["fvgen", "stage_one_only", "no_stage_one", "reverse_kl", "dmd2", "causvid"])
def test_every_choice_reaches_the_methods(run: str) -> None:
    for method in make_methods(TrainSettings("tiny", run=run, **UNUSUAL), 0.7, ONE):
        for f in fields(method.config):
            assert getattr(method.config, f.name) == UNUSUAL[f.name], f"{type(method).__name__}.{f.name}"


def test_what_is_not_said_is_the_methods_own() -> None:
    (dmd2,) = make_methods(TrainSettings("tiny", run="dmd2"), 0.7, ONE)
    assert (dmd2.config.divergence, dmd2.config.adversarial_weight, dmd2.config.critic_updates) == ("reverse_kl", 5e-3, 5)
    first, second = make_methods(TrainSettings("tiny"), 0.7, ONE)
    assert first.config == StageOneConfig()
    assert second.config == MatchingConfig()


def test_the_running_mean_is_made_where_it_is_asked_for() -> None:
    _, plain = make_methods(TrainSettings("tiny"), 0.7, ONE)
    _, normalised = make_methods(TrainSettings("tiny", normalise_weight=True, divergence="forward_kl"), 0.7, ONE)
    assert plain.weight_mean is None
    assert normalised.weight_mean.value.item() == 1.0  # h(1) of forward KL


def test_settings_as_text() -> None:
    texts = ["r1_weight=0.1", "score_span=0.05,0.9", "betas=0,0.99", "head.width=96", "head.layers=2", "normalise_weight=true"]
    texts += ["critic_updates=none", "fake_lr=1e-3", "times=999,499", "trajectories=64", "teacher_dtype=bfloat16", "clip_norm=2"]
    found = override(TrainSettings("tiny", critic_updates=3), texts)
    expected = replace(TrainSettings("tiny"), r1_weight=0.1, score_span=(0.05, 0.9), betas=(0.0, 0.99), normalise_weight=True)
    expected = replace(expected, fake_lr=1e-3, times=(999, 499), trajectories=64, teacher_dtype="bfloat16", clip_norm=2.0)
    assert found == replace(expected, head=ClassifierConfig(width=96, layers=2))
    assert isinstance(found.clip_norm, float)
    assert {"adversarial_weight", "clip", "fake_span", "weight_decay", "head.groups"} <= set(setting_types())


def test_the_documentation_lists_every_setting() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    cells = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([\w.]+)`", cells)) - {"tiny"} == set(setting_types())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("r1=0.1", "there is no setting 'r1' for --set; choose one of adversarial_weight, betas"),
        ("recipe=tiny", "there is no setting"),
        ("head.in_channels=3", "there is no setting"),
        ("r1_weight", "NAME=VALUE"),
        ("r1_weight=much", "takes a number"),
        ("r1_weight=nan", "takes a number"),
        ("r1_weight=-1", "at least 0"),
        ("trajectories=1.5", "takes a whole number"),
        ("trajectories=0", "at least 1"),
        ("normalise_weight=1", "true or false"),
        ("score_span=0.1", "2 values with commas"),
        ("score_span=0.9,0.1", "two rising fractions"),
        ("fake_span=0,2", "two rising fractions"),
        ("fake_lr=-1", "at least 0"),
        ("clip_norm=0", "above 0"),
        ("ema=1", "between 0 and 1"),
        ("betas=0.9,1", "below 1"),
        ("times=499,999", "falling time steps"),
        ("inputs=both", "real or rollout"),
        ("divergence=kl", "softened_rkl"),
        ("teacher_dtype=float8", "float32 or bfloat16"),
        ("head.width=100", "divisible by 32"),
    ],
)
def test_bad_settings_are_told(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        override(TrainSettings("tiny"), [text])


def test_a_run_from_before_a_setting_was_there_goes_on() -> None:
    now = TrainSettings("tiny").to_dict()
    before = {k: v for k, v in now.items() if k not in ("r1_weight", "score_span", "clip", "adversarial_weight")}
    assert changed_settings(before, now) == []
    assert changed_settings(before, {**now, "r1_weight": 0.1}) == ["r1_weight"]


def test_a_lead_that_leaves_the_student_nothing_is_told() -> None:
    settings = TrainSettings("tiny", lead=20, iterations=(3, 100))
    assert "0 of 3 iterations" in (settings.idle() or "")
    assert "10 of 30 iterations" in (replace(settings, iterations=(100, 30)).idle() or "")
    assert replace(settings, iterations=(150, 100)).idle() is None
    assert replace(settings, stages=(2,)).idle() is None
    assert replace(settings, lead=0).idle() is None
    assert replace(settings, run="causvid", stages=(1,)).idle() is None  # no critics, so nobody leads
