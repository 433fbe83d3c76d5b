from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fvgen.evaluation.frechet import FrameFeatures
from fvgen.evaluation.heldout import held_out_scores
from fvgen.evaluation.metrics import mean_ssim
from fvgen.evaluation.quality import HeldOutSet
from fvgen.models.bundle import ModelBundle
from fvgen.recipes.presets import get_preset
from fvgen.sampling import ModelSampler
from fvgen.utils.errors import UserError

CLIPS = 3


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    tiny = get_preset("tiny")
    return ModelBundle.random(replace(tiny, index=replace(tiny.index, height=32, width=64, frames=4)))


@pytest.fixture(scope="module")
def clips(bundle: ModelBundle) -> HeldOutSet:
    return HeldOutSet(bundle, CLIPS, 2, FrameFeatures(bundle.vae))


def test_the_truth_is_perfect(clips: HeldOutSet) -> None:
    def truth(condition, seed, frames):
        ends = torch.zeros_like(frames[:, :1])
        return torch.cat([ends, frames, ends], 1).float() / 255

    found = clips.score_frames(truth)
    assert found.psnr == float("inf")
    assert found.ssim == pytest.approx(1, abs=1e-6)
    assert abs(found.frechet) < 1e-6
    assert found.clips == CLIPS


def test_scores_are_those_of_each_clip(clips: HeldOutSet) -> None:
    """A known error: grey frames."""
    kept = []

    def grey(condition, seed, frames):
        kept.append(frames.float() / 255)
        return torch.full((len(frames), frames.shape[1] + 2, *frames.shape[2:]), 0.5)

    found = clips.score_frames(grey)
    truth = torch.cat(kept)
    each = torch.stack([torch.stack([-10 * (f - 0.5).square().mean().log10() for f in clip]).mean() for clip in truth])
    assert found.psnr == pytest.approx(float(each.mean()), abs=1e-4)
    assert found.psnr_error == pytest.approx(float(each.std() / CLIPS**0.5), abs=1e-4)
    assert found.ssim == pytest.approx(sum(mean_ssim(torch.full_like(c, 0.5), c) for c in truth) / CLIPS, abs=1e-5)
    assert found.frechet > 0
    assert clips.score_frames(grey, clips=1).clips == 2  # whole batches


def test_the_clips_are_those_of_the_held_out_scores(bundle: ModelBundle, clips: HeldOutSet) -> None:
    """Another path to the same figure: the same first clip, the same sampler, the same noise."""
    sampler = ModelSampler(bundle, seed=0)
    one = HeldOutSet(bundle, 1, 1, FrameFeatures(bundle.vae))
    found = one.score(lambda condition, seed: sampler.few_step(condition, noise=sampler.noise(seed)))
    other = held_out_scores(bundle, clips=1, batch=1, ddim_steps=())
    assert found.psnr == pytest.approx(other["generated"], abs=0.02)  # the truth is rounded to bytes here
    assert found.psnr_uncovered == pytest.approx(other["generated_uncovered"], abs=0.02)


def test_too_few_frames(bundle: ModelBundle) -> None:
    with pytest.raises(UserError, match="at least one clip"):
        HeldOutSet(bundle, 0, 1, FrameFeatures(bundle.vae))
