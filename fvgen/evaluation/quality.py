"""Held-out clips of the synthetic world, rendered and encoded once, on which many samplers are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fvgen.codec import Conditioner, LatentCodec
from fvgen.data.synthetic import synthetic_pairs
from fvgen.evaluation.frechet import FrameFeatures, Gaussian, frechet_distance
from fvgen.evaluation.heldout import HELD_OUT_SEED
from fvgen.evaluation.metrics import mean_ssim, psnr
from fvgen.models.bundle import ModelBundle
from fvgen.types import Condition
from fvgen.utils.errors import UserError

Sample = Callable[[Condition, int], Tensor]


@dataclass(frozen=True)
class Quality:
    """Scores of one sampler over the frames between the two photos.

    Attributes:
        psnr: mean over clips of the mean over frames, dB.
        psnr_covered, psnr_uncovered: likewise of the pixels with and without a point.
        psnr_error: standard error of ``psnr`` over the clips, dB.
        ssim: mean.
        frechet: distance of all frames' features to those of the true frames of the same clips.
        clips: how many.
    """

    psnr: float
    psnr_covered: float
    psnr_uncovered: float
    psnr_error: float
    ssim: float
    frechet: float
    clips: int


@dataclass(frozen=True)
class _Clips:
    condition: Condition
    truth: Tensor  # uint8
    covered: Tensor
    features: Tensor  # of the true frames


class HeldOutSet:
    """The first ``clips`` held-out worlds, in memory.

    Args:
        bundle: whose VAE and image branch encode them and whose VAE decodes; on the device that does the work.
        clips: how many.
        batch: clips that a sampler gets at once.
        features: for the Fréchet distance.

    Raises:
        UserError: there are no frames between the photos, or no clips.
    """

    def __init__(self, bundle: ModelBundle, clips: int, batch: int, features: FrameFeatures, compile: bool = False) -> None:
        index = bundle.index
        if clips < 1 or batch < 1 or index.frames < 3:
            raise UserError(f"scoring needs at least one clip of three frames, got {clips} of {index.frames}; ask for more")
        self._features = features
        self.codec = LatentCodec(bundle.vae)
        towers = bundle.image_encoder, bundle.image_projector
        self.conditioner = Conditioner(self.codec, *towers, bundle.prompt, bundle.empty, index.fps)
        self._sets: list[_Clips] = []
        device = bundle.prompt.device
        for first in range(0, clips, batch):
            seeds = torch.arange(first, min(first + batch, clips), device=device) + HELD_OUT_SEED
            pairs = synthetic_pairs(seeds, (index.height, index.width), index.frames, compile, index.compositor)
            condition = self.conditioner(pairs.render, guidance=True)
            truth = (pairs.target[:, 1:-1] * 255).round().byte()
            found = features(truth.flatten(0, 1).float() / 255)
            self._sets.append(_Clips(condition, truth, pairs.coverage[:, 1:-1], found))

    @torch.no_grad()
    def score(self, sample: Sample, clips: int | None = None) -> Quality:
        """Scores of a sampler.

        Args:
            sample: latents ``[B, C, T, h, w]`` of a condition; its second argument is a seed that differs from batch to batch.
            clips: only so many of the first, in whole batches; the fewer, the larger the Fréchet distance comes out.
        """
        return self.score_frames(lambda condition, seed, _: self.codec.decode(sample(condition, seed)), clips)

    @torch.no_grad()
    def score_frames(self, frames: Callable[[Condition, int, Tensor], Tensor], clips: int | None = None) -> Quality:
        """Scores of whatever makes frames ``[B, T, 3, H, W]`` of a condition, a seed and the true inner frames (uint8)."""
        rows: dict[str, list[Tensor]] = {"whole": [], "covered": [], "uncovered": []}
        ssim: list[float] = []
        made, true = Gaussian(), Gaussian()
        for number, found in enumerate(self._sets):
            if clips is not None and sum(map(len, rows["whole"])) >= clips:
                break
            truth = found.truth.float() / 255
            video = frames(found.condition, number, found.truth)[:, 1:-1].float().clamp(0, 1)
            for name, mask in (("whole", None), ("covered", found.covered), ("uncovered", ~found.covered)):
                rows[name].append(psnr(video, truth, mask).double().nanmean(1))
            ssim += [mean_ssim(a, b) for a, b in zip(video, truth, strict=True)]
            made.add(self._features(video.flatten(0, 1)))
            true.add(found.features)
        values = {name: torch.cat(parts) for name, parts in rows.items()}
        whole = values["whole"]
        return Quality(
            psnr=float(whole.mean()),
            psnr_covered=float(values["covered"].nanmean()),
            psnr_uncovered=float(values["uncovered"].nanmean()),
            psnr_error=float(whole.std() / len(whole) ** 0.5) if len(whole) > 1 else float("nan"),
            ssim=sum(ssim) / len(ssim),
            frechet=frechet_distance(made, true),
            clips=len(whole),
        )
