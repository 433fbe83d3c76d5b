from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fvgen.geometry.coincide import coincident_photos
from fvgen.models.bundle import ModelBundle
from fvgen.pipeline import FVGenPipeline, batch_seed, batches, check_segments, find_model, nearest_aspect, prepare
from fvgen.recipes.presets import get_preset
from fvgen.sampling import choose_sampling
from fvgen.types import Cameras, ImageSet
from fvgen.utils.device import choose_device
from fvgen.utils.errors import UserError
from tests.geometry.synthetic import capture, pose

SIZE = (120, 192)


@pytest.fixture(scope="module")
def photos() -> tuple[ImageSet, Cameras]:
    images, cameras, _ = capture([pose((0.2 * i - 0.2, 0.0, 0.0), (0.0, -2.0 * i, 0.0)) for i in range(3)], SIZE)
    return images, cameras


@pytest.fixture(scope="module")
def pipeline() -> FVGenPipeline:
    tiny = get_preset("tiny")
    unet = {**tiny.unet, "model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": (1, 2)}
    vae = {**tiny.vae, "block_out_channels": (16, 16, 16)}
    index = replace(tiny.index, height=40, width=64)
    return FVGenPipeline(ModelBundle.random(replace(tiny, index=index, unet=unet, vae=vae)))


def test_same_video_from_same_seed(pipeline: FVGenPipeline, photos: tuple[ImageSet, Cameras]) -> None:
    seen: list[tuple[str, float]] = []
    first = pipeline(*photos, num_frames=3, seed=4, callback=lambda stage, fraction: seen.append((stage, fraction)))
    prepared = first.prepared
    assert first.video.rgb.shape == (5, 3, 40, 64)
    assert prepared.segments == (range(0, 3), range(2, 5))
    assert prepared.photo_frames == (0, 2, 4)
    assert prepared.photo_indices == (0, 1, 2)
    assert torch.equal(first.renders.rgb[[0, 2, 4]], prepared.photos)
    assert torch.equal(pipeline.generate(prepared, seed=4).video.rgb, first.video.rgb)
    assert not torch.equal(pipeline.generate(prepared, seed=5).video.rgb, first.video.rgb)
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["read", "geometry", "path", "render", "encode", "sample", "decode"]
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    assert list(first.timings) == stages


@pytest.mark.parametrize(
    ("made_for", "given", "used"),
    [
        (("few_step", 4), (None, None), ("few_step", 4)),
        (("few_step", 8), (None, None), ("few_step", 8)),
        (("ddim", 50), (None, None), ("teacher", 50)),
        (("ddim", 30), ("teacher", None), ("teacher", 30)),
        (("ddim", 30), (None, 7), ("teacher", 7)),
        (("ddim", 30), ("few_step", None), ("few_step", 4)),
        (("few_step", 8), ("teacher", None), ("teacher", 50)),
        (("few_step", 4), ("teacher", 9), ("teacher", 9)),
        (("later", 5), ("few_step", 3), ("few_step", 3)),
    ],
)
def test_sampler_and_steps(made_for: tuple[str, int], given: tuple[str | None, int | None], used: tuple[str, int]) -> None:
    index = replace(get_preset("tiny").index, sampler=made_for[0], steps=made_for[1])
    assert choose_sampling(index, *given) == used


def test_a_teacher_is_sampled_as_one(pipeline: FVGenPipeline, photos: tuple[ImageSet, Cameras]) -> None:
    """Its own steps, guided: two calls of the network each."""
    index = replace(pipeline.bundle.index, sampler="ddim", steps=3, guidance_scale=7.5)
    teacher = FVGenPipeline(replace(pipeline.bundle, index=index))
    prepared = prepare(*photos, trajectory="orbit:deg=3", num_frames=2, size=(40, 64))
    calls: list[int] = []
    handle = pipeline.bundle.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        default = teacher.generate(prepared).video.rgb
        assert len(calls) == 6
        assert torch.equal(default, teacher.generate(prepared, 3, "teacher").video.rgb)
        few = teacher.generate(prepared, sampler="few_step").video.rgb
        assert len(calls) == 2 * 6 + 4
    finally:
        handle.remove()
    assert torch.equal(few, pipeline.generate(prepared).video.rgb)


def test_segments_of_unequal_length(pipeline: FVGenPipeline, photos: tuple[ImageSet, Cameras]) -> None:
    prepared = prepare(*photos, num_frames=3, size=(40, 64))
    uneven = replace(prepared, segments=(range(0, 2), range(1, 5)))
    assert pipeline.generate(uneven, steps=1).video.rgb.shape[0] == 5


def test_a_long_path_in_batches(pipeline: FVGenPipeline, photos: tuple[ImageSet, Cameras]) -> None:
    """Batches have noise of their own, so that one does not depend on how many come before it."""
    prepared = prepare(*photos, num_frames=3, size=(40, 64))
    together, apart = (pipeline.generate(prepared, seed=3, clips_at_once=n).video.rgb for n in (2, 1))
    alone = [replace(prepared, segments=(segment,)) for segment in prepared.segments]
    first, second = (pipeline.generate(p, seed=batch_seed(3, n)).video.rgb for n, p in enumerate(alone))
    assert torch.equal(apart, torch.cat([first, second[1:]]))
    assert together.shape == apart.shape
    assert torch.equal(together, pipeline.generate(prepared, seed=3).video.rgb)


def test_batches() -> None:
    segments = tuple(range(15 * i, 15 * i + 16) for i in range(9))
    assert [len(b) for b in batches(segments, (320, 512))] == [4, 4, 1]
    assert [len(b) for b in batches(segments, (576, 1024))] == [1] * 9
    assert [len(b) for b in batches(segments, (320, 512), 2)] == [2, 2, 2, 2, 1]
    assert [s for b in batches(segments, (320, 512)) for s in b] == list(segments)
    assert batches((range(3), range(2, 4)), (8, 8), 2) == [(range(3),), (range(2, 4),)]
    assert batch_seed(5, 0) == 5
    seeds = {batch_seed(2**63 - 1, n) for n in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_portrait(pipeline: FVGenPipeline) -> None:
    assert pipeline.clip_size(torch.rand(2, 3, 200, 100)) == (64, 40)
    assert pipeline.clip_size(torch.rand(2, 3, 100, 120)) == (40, 64)
    assert nearest_aspect([(10, 20), (20, 10)], (3, 4)) == (10, 20)


def test_coincident_photos(photos: tuple[ImageSet, Cameras]) -> None:
    _, cameras = photos
    assert coincident_photos(cameras[[2, 2, 0, 1]], cameras) == {0: 2, 2: 0, 3: 1}
    moved = cameras.world_from_cam.clone()
    moved[0, 0, 3] += 0.01
    assert coincident_photos(replace(cameras, world_from_cam=moved), cameras) == {1: 1, 2: 2}
    zoomed = cameras.K.clone()
    zoomed[1, 0, 0] *= 1.1
    assert coincident_photos(replace(cameras, K=zoomed), cameras) == {0: 0, 2: 2}


def test_bad_arguments(pipeline: FVGenPipeline, photos: tuple[ImageSet, Cameras]) -> None:
    for call in (
        lambda: pipeline(*photos, sampler="magic"),
        lambda: pipeline(*photos, steps=0),
        lambda: choose_sampling(replace(get_preset("tiny").index, sampler="later")),
        lambda: choose_sampling(replace(get_preset("tiny").index, steps=0)),
        lambda: prepare(*photos, num_frames=1),
        lambda: prepare(*photos, num_frames=65),
        lambda: prepare(*photos, trajectory="nowhere"),
        lambda: check_segments([range(65)]),
        lambda: choose_device("tpu"),
        lambda: find_model("nowhere"),
    ):
        with pytest.raises(UserError):
            call()
