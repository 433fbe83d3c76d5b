"""Each guard stops at what it watches for, not before, and leaves a checkpoint to go on from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fvgen.distill import checkpoint
from fvgen.distill.guards import GuardLimits, Guards, TrainingStopped

from .small import CADENCE, Latents, small_trainer

GOOD = {"latent_mean": 0.1, "latent_std": 1.0, "real_mean": 0.0, "real_std": 1.1, "saturation": 1e-4}
LOGITS = {"logit_real": 2.0, "logit_fake": -2.0}


def record(i: int, **values: Any) -> dict[str, Any]:
    return {"stage": 1, "iteration": i, "update": "critic", **GOOD, **LOGITS, **values}


# just inside and just outside of each limit
LIMITS = {
    "mean has drifted": ({"latent_mean": 0.54}, {"latent_mean": 0.56}),
    "mean has drifted -": ({"latent_mean": -0.54}, {"latent_mean": -0.56}),
    "standard deviation": ({"latent_std": 2.19}, {"latent_std": 2.21}),
    "the standard deviation": ({"latent_std": 0.551}, {"latent_std": 0.549}),
    "saturated": ({"saturation": 0.049}, {"saturation": 0.051}),
    "logit gap": ({"logit_real": 13.9}, {"logit_real": 14.1}),
}


@pytest.mark.parametrize("words", LIMITS)
def test_limits(words: str) -> None:
    inside, outside = LIMITS[words]
    limits = GuardLimits(window=5)
    Guards(limits).check([record(i, **inside) for i in range(20)])
    Guards(limits).check([record(i, **outside) for i in range(4)])  # not yet a window
    guards = Guards(limits)
    guards.check([record(i) for i in range(5)])
    guards.check([record(5, **outside)])  # one bad batch among good ones
    with pytest.raises(TrainingStopped, match=words):
        guards.check([record(i, **outside) for i in range(6, 30)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["head_loss", "student_gradient"])
def test_one_value_that_is_no_number_is_enough(name: str, value: float) -> None:
    with pytest.raises(TrainingStopped, match=f"{name} is {value} at stage 1, iteration 7"):
        Guards().check([record(6), record(7, **{name: value})])


def broken(source: Latents, first: int) -> Latents:
    """Clips that are not numbers from index ``first`` on."""
    read = source.read

    def sometimes(indices: Any) -> Any:
        batch = read(indices)
        if max(indices) >= first:
            batch.clean.fill_(math.nan)
        return batch

    source.read = sometimes  # type: ignore[method-assign]
    return source


def test_a_run_stops_and_can_go_on(tmp_path: Path) -> None:
    """The data is broken in the fourth iteration; statistics are looked at every second one, checkpoints are as frequent."""
    clips = 3 * 2 * 4 + 4
    trainer = small_trainer(tmp_path, source=broken(Latents(), clips))
    with pytest.raises(TrainingStopped, match="iteration 3"):
        trainer.run(6)
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found.name == "stage2-000002"
    assert all(x.isfinite().all() for x in checkpoint.read_tensors(found, "student").values())
    again = small_trainer(tmp_path)  # the data is mended
    assert again.run(4)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "stage2-000004"


def test_a_run_that_breaks_at_once_leaves_its_start(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, source=broken(Latents(), 0))
    start = {k: v.clone() for k, v in trainer.roles.trained["student"].state_dict().items()}
    with pytest.raises(TrainingStopped, match="iteration 0"):
        trainer.run(4)
    found = checkpoint.read_tensors(checkpoint.latest(tmp_path / "checkpoints"), "student")
    assert all(torch.equal(found[k], v) for k, v in start.items())
    assert CADENCE.log == 2
