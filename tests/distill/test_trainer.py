"""Single updates against the same worked out by hand, and what the log says of them."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fvgen.distill.calibration import calibration, weight_histogram
from fvgen.distill.ema import WeightAverage
from fvgen.distill.logs import LOSSES, PROGRESS
from fvgen.distill.networks import Draws, derived_seed
from fvgen.distill.plan import measured_speed
from fvgen.distill.settings import Cadence, TrainSettings, changed_settings, default_settings
from fvgen.utils.errors import UserError

from .small import SETTINGS, Latents, small_trainer


def by_hand(trainer, update: int) -> dict[str, list[torch.Tensor]]:
    """Weights after one update, from the method's losses and PyTorch's plain optimiser in float64."""
    settings, method = trainer.settings, trainer.method
    student = update % (method.critic_updates + 1) == method.critic_updates
    step = method.student_update if student else method.critic_update
    gradients: dict[str, list[torch.Tensor]] = {}
    for lane in range(settings.lanes):
        for module in trainer.roles.trained.values():
            module.zero_grad()
        first = update * settings.batch + lane * settings.micro_batch
        shared = derived_seed(settings.seed, "shared", trainer.stage, update)
        draws = Draws(shared, derived_seed(settings.seed, "own", trainer.stage, update, lane))
        found = step(trainer.roles.networks, Latents().read(range(first, first + settings.micro_batch)), draws)
        found.total.backward()
        for name in found.losses:
            mine = [p.grad.double() / settings.lanes for p in trainer.roles.trained[name].parameters()]
            gradients[name] = [a + b for a, b in zip(gradients[name], mine, strict=True)] if name in gradients else mine
    result = {}
    for name, gradient in gradients.items():
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        weights = [torch.nn.Parameter(p.detach().double().clone()) for p in trainer.roles.trained[name].parameters()]
        rate = settings.lr * (update // (method.critic_updates + 1) + 1) / settings.warmup
        optimiser = torch.optim.AdamW(weights, rate, settings.betas, weight_decay=settings.weight_decay, foreach=False)
        for w, g in zip(weights, gradient, strict=True):
            w.grad = g * min(1.0, settings.clip_norm / float(norm))
        optimiser.step()
        result[name] = [w.detach() for w in weights]
    for module in trainer.roles.trained.values():
        module.zero_grad()
    return result


@pytest.mark.parametrize(("stage", "clip_norm"), [(1, 1e9), (2, 1e-3)])
def test_updates_by_hand(stage: int, clip_norm: float, tmp_path: Path) -> None:
    """The critics' update, then the student's: mean over the forward calls, clipping, warm-up, decay; nothing else moves."""
    settings = replace(SETTINGS, micro_batch=2, clip_norm=clip_norm)
    trainer = small_trainer(tmp_path, settings, stage=stage)
    for update in (0, 1):
        expected = by_hand(trainer, update)
        before = {name: [p.detach().clone() for p in m.parameters()] for name, m in trainer.roles.trained.items()}
        trainer.advance()
        for name, module in trainer.roles.trained.items():
            for p, old, new in zip(module.parameters(), before[name], expected.get(name, before[name]), strict=True):
                # Adam's first step is lr g / (|g| + eps): where |g| is near eps, float32 rounding of g shows
                torch.testing.assert_close(p.detach().double(), new.double(), rtol=1e-5, atol=2e-5)
                assert name in expected or torch.equal(p, old)
        assert set(expected) == ({"student"} if update else set(trainer.roles.trained) - {"student"})
    trainer.close()


def test_the_critics_lead(tmp_path: Path) -> None:
    settings = replace(SETTINGS, lead=2, warmup=4, lr=1e-3, fake_lr=2e-3, head_lr=8e-3)
    assert [settings.rate("student", i) for i in range(7)] == pytest.approx([0, 0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert [settings.rate("head", i) for i in (0, 3, 9)] == pytest.approx([2e-3, 8e-3, 8e-3])
    assert settings.rate("fake", 0) == pytest.approx(5e-4)
    assert settings.rate("student", 0, alone=True) == pytest.approx(2.5e-4)
    trainer = small_trainer(tmp_path, settings, stage=2)
    changed = {}
    for iteration in range(3):
        before = {name: [p.detach().clone() for p in m.parameters()] for name, m in trainer.roles.trained.items()}
        while trainer.iteration == iteration:
            trainer.advance()
        for name, module in trainer.roles.trained.items():
            changed[name, iteration] = any(not torch.equal(a, b) for a, b in zip(module.parameters(), before[name], strict=True))
    trainer.close()
    assert [changed["student", i] for i in range(3)] == [False, False, True]
    assert all(changed[name, i] for name in ("fake", "head") for i in range(3))


def test_checkpointed_activations_give_the_same_updates(tmp_path: Path) -> None:
    weights = []
    for checkpointing in (False, True):
        trainer = small_trainer(tmp_path / str(checkpointing), replace(SETTINGS, checkpointing=checkpointing))
        for _ in range(2):
            trainer.advance()
        trainer.close()
        weights.append([p.detach() for p in trainer.roles.trained["student"].parameters()])
    assert trainer.roles.trained["student"].is_gradient_checkpointing
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_the_running_average() -> None:
    """Against its closed form, and the module is given back as it was."""
    module = torch.nn.Linear(3, 2)
    values = [torch.randn(2, 3) for _ in range(4)]
    module.weight.data.copy_(values[0])
    average = WeightAverage(module, decay=0.3)
    expected = values[0].double()
    for i, value in enumerate(values[1:], 1):
        module.weight.data.copy_(value)
        average.update()
        decay = min(0.3, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * value.double()
    torch.testing.assert_close(average.tensors["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    kept, averages, place = copy.deepcopy(module.state_dict()), copy.deepcopy(average.tensors), module.weight.data_ptr()
    with average.applied():
        assert all(torch.equal(getattr(module, name), averages[name]) for name in ("weight", "bias"))
        assert module.weight.data_ptr() == place  # recorded graphs read it there
    assert all(torch.equal(getattr(module, name), kept[name]) for name in kept)
    assert all(torch.equal(average.tensors[name], averages[name]) for name in kept)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(module.weight, kept["weight"])


def test_logs(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    trainer.run(4)
    lines = [json.loads(line) for line in (tmp_path / LOSSES).read_text().splitlines()]
    assert [r["step"] for r in lines] == list(range(8))
    critic, student = lines[0], lines[1]
    assert {"fake_loss", "head_loss", "logit_real", "logit_fake", "fake_gradient", "head_gradient"} <= set(critic)
    assert {"student_loss", "student_gradient", "weight", "latent_mean", "real_std", "saturation"} <= set(student)
    progress = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines()]
    assert len(progress) == 2
    assert sum(b["count"] for p in progress for b in p["calibration"]) == 4 * 2 * SETTINGS.batch
    assert sum(sum(w["counts"]) for p in progress for w in p["weights"]) == 4 * SETTINGS.batch
    assert measured_speed(tmp_path, 2) == pytest.approx(progress[1]["clips_per_second"])
    assert measured_speed(tmp_path, 1) is None
    assert measured_speed(tmp_path / "none", 2) is None


def test_the_speed_is_that_of_training(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, cadence=Cadence(log=2, checkpoint=100, validate=2))
    trainer._validate = lambda *_: time.sleep(2) or {}  # type: ignore[assignment,func-returns-value]
    trainer.run(4)
    second = json.loads((tmp_path / PROGRESS).read_text().splitlines()[1])
    assert second["clips_per_second"] > 4 * SETTINGS.batch / 2


def test_an_interruption_does_not_wait_for_clips(tmp_path: Path) -> None:
    trainer, source = small_trainer(tmp_path), Latents()
    fast, trainer._source = source.read, source

    def slow(indices: Any) -> Any:
        until = time.monotonic() + (60 if max(indices) > 20 else 0)
        while time.monotonic() < until:
            time.sleep(0.01)
        return fast(indices)

    source.read = slow  # type: ignore[method-assign]
    advance = trainer.advance

    def interrupted() -> None:
        if trainer.position.update == 2:
            raise KeyboardInterrupt
        advance()

    trainer.advance = interrupted  # type: ignore[method-assign]
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer.run(4)
    assert time.monotonic() - begun < 20


def test_the_mean_of_the_weights_is_over_whole_updates(tmp_path: Path) -> None:
    """Once per update of the student, whatever number of forward calls it is made of."""
    trainer = small_trainer(tmp_path, replace(SETTINGS, micro_batch=1), weight_mean=True)
    trainer.run(4)
    expected = 0.5
    for line in (tmp_path / LOSSES).read_text().splitlines():
        if (record := json.loads(line))["update"] == "student":
            expected = 0.99 * expected + 0.01 * record["weight"]
    assert expected != 0.5
    assert trainer.weight_mean.value.item() == pytest.approx(expected, rel=1e-6)


def test_an_old_checkpoint_is_renewed(tmp_path: Path) -> None:
    """When the statistics are fetched, every second iteration."""
    small_trainer(tmp_path, cadence=Cadence(log=2, checkpoint=100, keep=9, validate=0, minutes=1e-6)).run(5)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", *(f"stage2-00000{i}" for i in (0, 2, 4, 5))]


def test_calibration_of_an_exact_classifier() -> None:
    """Real N(1, 1), generated N(-1, 1): the log ratio is 2 x, so predicted and found shares agree up to counting noise."""
    torch.manual_seed(0)
    real, fake = torch.randn(200_000) + 1, torch.randn(200_000) - 1
    for b in calibration(2 * real, 2 * fake):
        assert b.found == pytest.approx(b.predicted, abs=5 * (0.25 / b.count) ** 0.5)
    tilted = calibration(4 * real, 4 * fake)  # twice as sure as it may be
    assert tilted[2].found > tilted[2].predicted + 0.05


def test_weights_by_time() -> None:
    parts = weight_histogram(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 199.0, 200.0, 999.0]))
    assert [(low, high, w.tolist()) for low, high, w in parts] == [(0, 199, [1, 2]), (200, 399, [3]), (800, 999, [4])]


def test_settings() -> None:
    tiny = default_settings("tiny")
    assert changed_settings(tiny.to_dict(), replace(tiny, iterations=(1, 1), micro_batch=1, graphs=False).to_dict()) == []
    assert changed_settings(tiny.to_dict(), replace(tiny, lr=1.0, batch=16).to_dict()) == ["batch", "lr"]
    full = [default_settings(name) for name in ("viewcrafter_512", "viewcrafter_1024")]
    assert all(settings.graphs and settings.checkpointing for settings in full)
    with pytest.raises(UserError, match="divisor"):
        TrainSettings("tiny", batch=3, micro_batch=2)
    with pytest.raises(UserError, match="viewcrafter_512"):
        default_settings("large")
