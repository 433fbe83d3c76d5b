"""The whole clip through the engine against the ordinary modules, and as a CUDA graph."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fvgen.inference.clip import ClipEngine, ClipGraph
from fvgen.models.bundle import ModelBundle
from fvgen.pipeline import BUNDLED, FVGenPipeline, Prepared
from fvgen.recipes.presets import get_preset
from fvgen.sampling import ModelSampler

FRAMES, HEIGHT, WIDTH = 4, 40, 64


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    tiny = get_preset("tiny")
    unet = {**tiny.unet, "model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": (1, 2)}
    vae = {**tiny.vae, "block_out_channels": (16, 16, 16)}
    made = ModelBundle.random(replace(tiny, index=replace(tiny.index, height=HEIGHT, width=WIDTH), unet=unet, vae=vae))
    with torch.no_grad():
        for network in (made.unet, made.image_projector):
            for parameter in network.parameters():
                if not parameter.any():  # branches that begin at zero would hide what they compute
                    parameter.normal_(0, 0.05)
    return made


def _renders(batch: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(batch * FRAMES, 3, 5, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bilinear").unflatten(0, (batch, FRAMES))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_engine_makes_the_frames_of_the_modules(bundle: ModelBundle, batch: int, steps: int) -> None:
    renders, modules = _renders(batch), ModelSampler(bundle, seed=3)
    expected = modules.decode(modules.few_step(modules.condition(renders), steps))
    engine = ClipEngine(bundle, torch.float32)
    packed = ModelSampler(bundle, seed=3, engine=engine)
    by_steps = packed.decode(packed.few_step(packed.condition(renders), steps))
    assert (by_steps - expected).abs().max() <= 1e-4
    assert torch.equal(engine(renders, packed.clip_noise(renders.shape, steps)), by_steps)


def test_the_guided_teacher_runs_on_the_engine(bundle: ModelBundle) -> None:
    modules, packed = ModelSampler(bundle), ModelSampler(bundle, engine=ClipEngine(bundle, torch.float32))
    expected, actual = (m.ddim(m.condition(_renders(2), guidance=True), 3, guidance_scale=3.0) for m in (modules, packed))
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_progress_is_reported_after_every_step(bundle: ModelBundle) -> None:
    packed, seen = ModelSampler(bundle, engine=ClipEngine(bundle, torch.float32)), []
    packed.few_step(packed.condition(_renders(1)), 3, callback=lambda step, total, x0: seen.append((step, total, x0.shape)))
    assert [(step, total) for step, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]


def test_fast_mode_approximates_and_says_the_same_with_one_step(bundle: ModelBundle) -> None:
    renders, exact, fast = _renders(1), ModelSampler(bundle, seed=3), ModelSampler(bundle, seed=3, fast=True)
    once = [m.few_step(m.condition(renders), 1) for m in (exact, fast)]
    torch.testing.assert_close(once[1], once[0], rtol=1e-4, atol=1e-4)
    several = [m.few_step(m.condition(renders), 4) for m in (exact, fast)]
    difference = (several[1] - several[0]).norm() / several[0].norm()
    assert 1e-4 < difference < 1


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, ["full"]),
        (2, ["full", "lower resolutions"]),
        (3, ["full", "all but the last layer", "full"]),
        (4, ["full", "all but the last layer", "full", "lower resolutions"]),
    ],
)
def test_what_the_steps_of_fast_mode_take_from_the_step_before(
    bundle: ModelBundle, steps: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ClipEngine(bundle, torch.float32, fast=True)
    run, calls = engine.unet.with_lower, []

    def note(x: Tensor, shifts, keys, lower, left_out: int):
        result = run(x, shifts, keys, lower, left_out)
        calls.append((lower, left_out, result[1]))
        return result

    monkeypatch.setattr(engine.unet, "with_lower", note)
    engine(_renders(1), torch.randn(steps, *engine.latent_shape((1, FRAMES, 3, HEIGHT, WIDTH))))
    names = {0: "lower resolutions", len(engine.unet._up[-1]) - 1: "all but the last layer"}
    assert ["full" if lower is None else names[left_out] for lower, left_out, _ in calls] == expected
    for (_, kept, found), (lower, left_out, _) in pairwise(calls):
        assert lower is None or (lower is found and left_out == kept), "features of the step before, cut at the same place"


def test_every_step_is_whole_without_fast_mode(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ClipEngine(bundle, torch.float32)
    run, lowers = engine.unet.with_lower, []
    monkeypatch.setattr(engine.unet, "with_lower", lambda *given: (lowers.append(given[3]), run(*given))[1])
    engine(_renders(1), torch.randn(4, *engine.latent_shape((1, FRAMES, 3, HEIGHT, WIDTH))))
    assert lowers == [None] * 4


def test_no_graph_without_a_gpu(bundle: ModelBundle) -> None:
    sampler = ModelSampler(bundle)
    assert [sampler.graph(_renders(1).shape, 4) for _ in range(3)] == [None] * 3


@pytest.mark.gpu
def test_a_graph_replays_what_the_engine_computes(bundle: ModelBundle) -> None:
    engine = ClipEngine(bundle.to("cuda"))
    try:
        graph = ClipGraph(engine, (1, FRAMES, 3, HEIGHT, WIDTH))
        sampler = ModelSampler(bundle, engine=engine)
        for seed in range(2):
            renders = _renders(1, seed).cuda()
            noise = sampler.clip_noise(renders.shape, 4, sampler.noise(seed))
            assert torch.equal(graph(renders, noise), engine(renders, noise))
        assert graph.memory > 0
    finally:
        bundle.to("cpu")


@pytest.mark.gpu
def test_the_first_call_and_the_recorded_ones_give_the_same_video() -> None:
    """The pipeline takes the stages one by one at first, and one graph from the second call on."""
    pipeline, prepared = _example()
    videos = [pipeline.generate(prepared, seed=seed) for seed in (1, 1, 2, 1)]
    assert "sample" in videos[0].timings
    assert "generate" in videos[1].timings
    assert torch.equal(videos[0].video.rgb, videos[1].video.rgb)
    assert torch.equal(videos[3].video.rgb, videos[0].video.rgb)
    assert not torch.equal(videos[2].video.rgb, videos[0].video.rgb)


@pytest.mark.gpu
def test_fast_and_reference_kernels_give_the_same_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the bundled weights; both round to bfloat16, so the videos differ, but by less than 40 dB shows."""
    videos = []
    for mode in ("strict", "reference"):
        monkeypatch.setenv("FVGEN_KERNELS", mode)
        pipeline, prepared = _example()
        videos.append(pipeline.generate(prepared).video.rgb)
    psnr = -10 * (videos[0] - videos[1]).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() >= 40, f"{psnr.mean():.1f} dB"


def _example() -> tuple[FVGenPipeline, Prepared]:
    """The bundled model and the renders of the bundled photos."""
    from fvgen.cli.demo import EXAMPLE
    from fvgen.pipeline import prepare

    assert BUNDLED["tiny"].is_dir()
    pipeline = FVGenPipeline.from_pretrained("tiny", device="cuda")
    photos = sorted((EXAMPLE / "photos").iterdir())
    sizes = pipeline.bundle.index.sizes()
    return pipeline, prepare(photos, EXAMPLE / "transforms.json", size=sizes, device="cuda", compositor="norm")
