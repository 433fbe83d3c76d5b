"""The suite of DUSt3R: figures and units, and a plain loss that agrees with the fast one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fvgen.bench.dust3r import PlainObjective, noisy_predictions
from fvgen.geometry.dust3r.alignment import AlignmentState, Objective
from fvgen.geometry.dust3r.spanning_tree import initial_state
from tests.bench.conftest import Run

FIGURES = {"dust3r_pair_tf32_ms", "dust3r_pair_ms", "dust3r_align3_s", "dust3r_align3_plain_steps_s"}


def test_every_figure(fvgen: Run, tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    status, _, err = fvgen("bench", "dust3r", "--quick", "--device", "cpu", "--rounds", 1, "--json", file)
    assert status == 0, err
    records = {r["name"]: r for r in json.loads(file.read_text())}
    assert set(records) == FIGURES | {"dust3r_align3_loss_vs_plain"}
    aligned = records["dust3r_align3_s"]
    assert aligned["loss"] < 0.9 * aligned["loss_at_the_start"]
    # the same steps with sums in another order, which the curves of this loss amplify on the way but not at the end
    assert aligned["loss"] == pytest.approx(aligned["plain_loss"], rel=0.02)
    assert aligned["pairs"] == 6
    assert records["dust3r_pair_ms"]["dtype"] == "bfloat16"


def test_photos_in_different_numbers_of_pairs() -> None:
    """Photos are filled up with maps of weight zero: loss and gradients are those of one pair after the other, in float64."""
    kept = {(0, 1), (1, 0), (1, 2), (2, 1), (3, 1), (0, 3)}
    predictions = [p for p in noisy_predictions(4, (6, 8), "cpu") if (p.first, p.second) in kept]
    # the start makes the residuals of some pairs zero, where the gradient has no direction
    generator = torch.Generator().manual_seed(0)
    start = [p + 0.05 * torch.randn(p.shape, generator=generator) for p in initial_state(predictions, 4).parameters()]
    values = []
    for kind, dtype in ((Objective, torch.float32), (PlainObjective, torch.float64)):
        state = AlignmentState(*(p.to(dtype).requires_grad_() for p in start))
        loss = kind([_cast(p, dtype) for p in predictions])(state)
        values.append([loss, *torch.autograd.grad(loss, state.parameters())])
    for fast, plain in zip(*values, strict=True):
        scale = float(plain.detach().abs().max())
        torch.testing.assert_close(fast.double() / scale, plain / scale, rtol=0.0, atol=1e-5)


def _cast(prediction, dtype):
    from dataclasses import replace

    names = ("points_first", "confidence_first", "points_second", "confidence_second")
    return replace(prediction, **{name: getattr(prediction, name).to(dtype) for name in names})
