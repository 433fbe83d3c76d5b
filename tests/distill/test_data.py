"""Order, sources, and the thread that reads ahead."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fvgen.diffusion.ddim import ddim_sample
from fvgen.diffusion.noise import recorded_noise
from fvgen.diffusion.parameterisation import v_from_x0
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.comparison import make_run
from fvgen.distill.configs import STUDENT_TIMES
from fvgen.distill.data import Order, ShardSource, batch_tensors
from fvgen.distill.networks import Batch
from fvgen.distill.options import RunOptions
from fvgen.distill.parallel import Parallel
from fvgen.distill.prefetch import PATIENCE_S, Prefetcher
from fvgen.distill.rollout import Process
from fvgen.distill.settings import TrainSettings
from fvgen.distill.sources import make_source, shard_source
from fvgen.distill.synthetic import Reuse, SyntheticSource
from fvgen.distill.trajectories import Integration, TrajectorySource, integrate
from fvgen.models.bundle import ModelBundle
from fvgen.models.digest import encoder_digest
from fvgen.pipeline import find_model
from fvgen.recipes.presets import get_preset
from fvgen.types import Condition
from fvgen.utils.errors import UserError

from .small import SHAPE, WIDTH, Latents

CPU = torch.device("cpu")


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    order = Order(10, seed=3)
    epochs = [order.indices(10 * e, 10) for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # from any place, in any pieces: what ranks and resumed runs do
    everything = [i for e in epochs for i in e]
    other = Order(10, seed=3)
    assert [i for start in range(0, 30, 3) for i in other.indices(start, 3)] == everything
    assert Order(10, seed=3).indices(17, 6) == everything[17:23]
    assert Order(10, seed=4).indices(0, 10) != epochs[0]
    assert Order(None, seed=3).indices(5, 3) == [5, 6, 7]
    with pytest.raises(UserError, match="no clip"):
        Order(0, seed=0)


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    tiny = get_preset("tiny")
    spec = replace(
        tiny,
        index=replace(tiny.index, height=32, width=64, frames=3),
        unet={**tiny.unet, "model_channels": 32, "channel_mult": (1,), "attention_resolutions": (1,), "context_dim": 32},
        vae={**tiny.vae, "block_out_channels": (16, 16, 16, 16)},
        image_encoder={**tiny.image_encoder, "image_size": 64, "width": 32},
        image_projector={**tiny.image_projector, "input_dim": 32, "output_dim": 32, "dim": 32, "frames": 3},
    )
    return ModelBundle.random(spec)


def test_synthetic_clips_depend_on_their_index_alone(bundle: ModelBundle) -> None:
    reuse = Reuse(window=3, times=2, block=2, portrait_share=0.0)
    source, other = (SyntheticSource(bundle, 2, reuse, seed=1) for _ in range(2))
    together = source.read([0, 1, 5])
    apart = [other.read([i]) for i in (5, 0, 1)]
    for whole, *parts in zip(batch_tensors(together), *(batch_tensors(b) for b in apart), strict=True):
        assert torch.equal(whole, torch.cat([parts[1], parts[2], parts[0]]))
    assert together.clean.shape == together.condition.latents.shape == (3, 8, 3, 4, 8)
    assert together.condition.context.shape == together.condition.uncond_context.shape == (3, 77 + 48, 32)
    # the photos are the first and last frame of the render
    assert torch.equal(together.clean[:, :, 0], together.condition.latents[:, :, 0])
    assert not torch.equal(together.clean[:, :, 1], together.condition.latents[:, :, 1])


def test_the_window_moves_on_and_old_clips_are_dropped(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SyntheticSource(bundle, 4, Reuse(window=8, times=4, block=2, portrait_share=0.5))
    worlds = [source._world(i) for i in range(400)]
    assert all(i // 4 <= w < i // 4 + 8 for i, (w, _) in enumerate(worlds))
    assert 3 < 400 / len({w for w, _ in worlds}) < 5  # each is used about four times
    turns = [{portrait for _, portrait in worlds[u : u + 4]} for u in range(0, 400, 4)]
    assert all(len(t) == 1 for t in turns)  # one orientation per update
    assert 0.35 < sum(t == {1} for t in turns) / 100 < 0.65
    monkeypatch.setattr(source, "_block", lambda p, n: source._blocks.setdefault((p, n), (torch.zeros(2, 1),) * 3))
    monkeypatch.setattr(torch, "cat", lambda parts, dim: parts[1])
    for u in range(0, 400, 4):
        source.read(range(u, u + 4))
    assert len(source._blocks) <= 2 * 5  # two orientations of a window of eight clips, at any offset


class Shards:
    """What ``fvgen.data.shards.ShardSet`` promises."""

    def __init__(self, path: Path) -> None:
        self.constants = {"text_tokens": torch.ones(3, WIDTH), "uncond_context": torch.zeros(6, WIDTH)}
        self.info: dict[str, str] = {}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        clip = torch.full(SHAPE, float(i), dtype=torch.float16)
        return {
            "clean": clip,
            "render": clip + 1,
            "image_tokens": torch.full((3, WIDTH), float(i)).half(),
            "fps": torch.tensor(7),
        }


def test_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fvgen.distill.data.ShardSet", Shards)
    source = ShardSource(tmp_path, CPU, [SHAPE], (6, WIDTH))
    batch = source.read([2, 0])
    assert source.count == 4
    assert batch.clean.dtype == torch.float32
    assert batch.clean[:, 0, 0, 0, 0].tolist() == [2.0, 0.0]
    assert torch.equal(batch.condition.latents, batch.clean + 1)
    assert batch.condition.context[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert batch.condition.uncond_context.shape == (2, 6, WIDTH)
    assert batch.condition.fps.tolist() == [7, 7]
    with pytest.raises(UserError, match="the model needs"):
        ShardSource(tmp_path, CPU, [(2, 3, 4, 5), (2, 3, 5, 4)], (6, WIDTH))
    with pytest.raises(UserError, match="context"):
        ShardSource(tmp_path, CPU, [SHAPE], (7, WIDTH))


def _teacher(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Predicts, as clean latent, half of the render plus a tenth of the context's mean."""
    x0 = 0.5 * condition.latents + 0.1 * condition.context.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
    return v_from_x0(NoiseSchedule.create(), x, x0, t)


def test_trajectories_are_the_samplers(tmp_path: Path) -> None:
    """Against the teacher's own sampler: the states lie on its path, the end is its last clean latent."""
    schedule, how = NoiseSchedule.create(), Integration(STUDENT_TIMES, 8, 3.0, 0.0)
    batch = Latents().read([0, 1])
    noise = torch.randn(2, *SHAPE)
    states, clean = integrate(_teacher, schedule, batch.condition, noise, how)
    seen: dict[int, torch.Tensor] = {}

    def spy(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        seen.setdefault(int(t[0]), x)
        return _teacher(x, t, condition)

    last: list[torch.Tensor] = []
    options = {"eta": 0.0, "guidance_scale": 3.0, "guidance_rescale": 0.0, "callback": lambda _s, _n, x0: last.append(x0)}
    ddim_sample(spy, schedule, batch.condition, noise.shape, recorded_noise([noise]), 8, **options)
    for i, t in enumerate(STUDENT_TIMES):
        torch.testing.assert_close(states[:, i], seen[t])
    torch.testing.assert_close(clean, last[-1])
    with pytest.raises(UserError, match="multiple of 4"):
        Integration(STUDENT_TIMES, 6, 1.0, 0.0)


def test_trajectories_are_kept(tmp_path: Path) -> None:
    schedule, how = NoiseSchedule.create(), Integration(STUDENT_TIMES, 4, 1.0, 0.0)
    calls: list[int] = []

    def counted(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        calls.append(1)
        return _teacher(x, t, condition)

    source = TrajectorySource(Latents(), 5, counted, schedule, how, tmp_path / "t", seed=0)
    first = source.read([3, 1])
    assert source.count == 5
    assert len(calls) == 8
    again = TrajectorySource(Latents(), 5, counted, schedule, how, tmp_path / "t", seed=0).read([1])
    assert len(calls) == 8
    assert torch.equal(again.ode_states[0], first.ode_states[1])
    assert torch.equal(again.clean[0], first.clean[1])
    assert first.ode_states.shape == (2, 4, *SHAPE)


def test_a_trajectory_does_not_depend_on_what_was_asked_for(tmp_path: Path) -> None:
    schedule, how = NoiseSchedule.create(), Integration(STUDENT_TIMES, 4, 1.0, 0.0)
    calls: list[int] = []

    def counted(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        calls.append(len(x))
        return _teacher(x, t, condition)

    one, two = (TrajectorySource(Latents(), 5, counted, schedule, how, tmp_path / name, 0, group=2) for name in ("a", "b"))
    together, apart = one.read([1, 4, 2]), [two.read([i]) for i in (2, 1, 4)]
    assert sorted(calls) == sorted([2, 2, 1] * 4 * 2)  # groups 0 1, 2 3 and 4, for each of the two sources
    for whole, *parts in zip(batch_tensors(together), *(batch_tensors(b) for b in apart), strict=True):
        assert torch.equal(whole, torch.cat([parts[1], parts[2], parts[0]]))


def test_reading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    asked: list[int] = []

    def read(number: int):
        asked.append(number)
        if number == 4:
            raise UserError("no clip 4")
        return Latents().read([number])

    ahead = Prefetcher(read, 1, CPU)
    for number in (1, 2, 3):
        assert torch.equal(next(ahead).clean, Latents().read([number]).clean)
    with pytest.raises(UserError, match="no clip 4"):
        next(ahead)
    ahead.close()
    assert asked == [1, 2, 3, 4]


def test_both_orientations_of_prepared_clips(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Upright(Shards):
        def __init__(self, path: Path) -> None:
            tokens = bundle.prompt.shape[-1]
            self.constants = {"text_tokens": torch.ones(77, tokens), "uncond_context": torch.zeros(77 + 48, tokens)}

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            clip = torch.zeros(8, 3, 8, 4)
            return {"clean": clip, "render": clip, "image_tokens": torch.zeros(48, 32), "fps": torch.tensor(7)}

    monkeypatch.setattr("fvgen.distill.data.ShardSet", Upright)
    assert bundle.index.portrait
    assert shard_source("clips", bundle, CPU).read([0]).clean.shape == (1, 8, 3, 8, 4)
    monkeypatch.setattr(bundle, "index", replace(bundle.index, portrait=False))
    with pytest.raises(UserError, match=r"the model needs \(8, 3, 4, 8\)"):
        shard_source("clips", bundle, CPU)


def test_synthetic_clips_are_shared_only_where_they_are_the_same(bundle: ModelBundle, tmp_path: Path) -> None:
    method = make_run("no_stage_one", Process.create(NoiseSchedule.create()))[0]
    options, alone, worlds = RunOptions(tmp_path, "teacher", reuse=Reuse(window=2, block=2)), Parallel(0, 1, CPU), {}

    def source(**changes: int) -> object:
        settings = replace(TrainSettings("tiny", batch=2, micro_batch=1), **changes)
        return make_source(method, settings, options, bundle, alone, _teacher, worlds)

    first = source()
    assert source(lead=3) is first
    assert source(seed=1) is not first
    assert source(batch=4) is not first
    assert source() is first


def test_the_digest_is_of_what_encodes(bundle: ModelBundle) -> None:
    other = copy.deepcopy(bundle)
    assert encoder_digest(other) == encoder_digest(bundle)
    next(other.unet.parameters()).data.add_(1)
    assert encoder_digest(other) == encoder_digest(bundle)
    seen = {encoder_digest(bundle)}
    for change in (other.vae, other.image_encoder, other.image_projector):
        list(change.parameters())[-1].data.view(-1)[0] += 1
        seen.add(encoder_digest(other))
    other.prompt[0, 0] += 1
    seen.add(encoder_digest(other))
    other.index = replace(other.index, fps=3)
    seen.add(encoder_digest(other))
    assert len(seen) == 6


def test_the_bundled_models_encode_alike() -> None:
    """Clips are prepared with the student by default, and train from its teacher."""
    student, teacher = (ModelBundle.from_pretrained(find_model(name)) for name in ("tiny", "tiny_teacher"))
    assert encoder_digest(student) == encoder_digest(teacher)


def test_an_error_does_not_wait_for_clips(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither for many short steps, which are broken off, nor for one long step, which is left behind."""
    stop, begun = threading.Event(), threading.Event()

    def many(_: int) -> Batch:
        begun.set()
        while not stop.wait(0.01):
            pass
        return Latents().read([0])

    ahead = Prefetcher(many, 0, CPU)
    begun.wait()
    start = time.monotonic()
    ahead.close(hurry=True)
    assert time.monotonic() - start < PATIENCE_S
    assert not ahead._thread.is_alive()

    def one(_: int) -> Batch:
        begun.set()
        stop.wait(60)
        return Latents().read([0])

    begun.clear()
    ahead = Prefetcher(one, 0, CPU)
    begun.wait()
    start = time.monotonic()
    ahead.close(hurry=True)
    assert PATIENCE_S <= time.monotonic() - start < PATIENCE_S + 5
    assert "left behind" in capsys.readouterr().err
    stop.set()
    ahead._thread.join(10)
    assert not ahead._thread.is_alive()


def test_a_stage_that_ends_waits_for_its_clips(capsys: pytest.CaptureFixture[str]) -> None:
    """The next one takes clips from the same source; what is awaited is said."""

    def slow(_: int) -> Batch:
        time.sleep(PATIENCE_S + 0.5)
        return Latents().read([0])

    ahead = Prefetcher(slow, 0, CPU)
    ahead.close()
    assert not ahead._thread.is_alive()
    assert "waiting for it" in capsys.readouterr().err
