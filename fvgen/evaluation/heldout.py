"""The fixed held-out clips of the synthetic world and what a model scores on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fvgen.codec import Conditioner, LatentCodec
from fvgen.data.synthetic import synthetic_pairs
from fvgen.diffusion.ddim import ddim_sample
from fvgen.diffusion.few_step import few_step_sample
from fvgen.diffusion.noise import seeded_noise
from fvgen.diffusion.predict import unet_predictor
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.evaluation.metrics import mean_psnr, psnr
from fvgen.models.bundle import ModelBundle

HELD_OUT_SEED = 1 << 40  # training worlds are numbered far below


def held_out_scores(
    bundle: ModelBundle, clips: int = 64, batch: int = 8, seed: int = 0, guidance: float | None = None
) -> dict[str, float]:
    """Scores on held-out synthetic clips, dB, over the frames between the two photos.

    Args:
        bundle: the model, on the device that is to do the work.
        clips: how many worlds, from ``HELD_OUT_SEED`` on.
        batch: clips at once.
        seed: of the sampling noise.
        guidance: guidance scale of the teacher's 50 steps; None takes the model's own.

    Returns:
        ``render``, ``generated`` (4 steps), ``teacher4`` and ``teacher50`` (DDIM): mean PSNR per frame over the whole frame, and for all
        of them ``*_covered`` and ``*_uncovered`` over the pixels with and without a point; ``vae``: encoding and decoding the truth;
        ``coverage``: share of covered pixels.
    """
    device = next(bundle.unet.parameters()).device
    index = bundle.index
    schedule = NoiseSchedule.create(index.base_scale)
    codec = LatentCodec(bundle.vae)
    condition_of = Conditioner(codec, bundle.image_encoder, bundle.image_projector, bundle.prompt, bundle.empty, index.fps)
    predict = unet_predictor(bundle.unet, torch.bfloat16 if device.type == "cuda" else None)
    scale = index.guidance_scale if guidance is None else guidance
    sums: dict[str, list[float]] = {}

    def score(name: str, video: Tensor, truth: Tensor, covered: Tensor) -> None:
        video, truth, covered = video[:, 1:-1], truth[:, 1:-1], covered[:, 1:-1]
        for b in range(len(video)):
            sums.setdefault(name, []).append(mean_psnr(video[b], truth[b]))
            sums.setdefault(f"{name}_covered", []).append(mean_psnr(video[b], truth[b], covered[b]))
            sums.setdefault(f"{name}_uncovered", []).append(mean_psnr(video[b], truth[b], ~covered[b]))

    for first in range(0, clips, batch):
        seeds = torch.arange(first, min(first + batch, clips), device=device) + HELD_OUT_SEED
        pairs = synthetic_pairs(seeds, (index.height, index.width), index.frames)
        truth, covered = pairs.target, pairs.coverage
        condition = condition_of(pairs.render, guidance=scale != 1.0)
        shape = condition.latents.shape

        samplers: dict[str, Callable[[], Tensor]] = {
            "generated": lambda c=condition, s=shape: few_step_sample(predict, schedule, c, s, seeded_noise(seed, device)),
            "teacher4": lambda c=condition, s=shape: ddim_sample(
                predict, schedule, c, s, seeded_noise(seed, device), 4, index.eta, scale, index.guidance_rescale
            ),
            "teacher50": lambda c=condition, s=shape: ddim_sample(
                predict, schedule, c, s, seeded_noise(seed, device), 50, index.eta, scale, index.guidance_rescale
            ),
        }
        score("render", pairs.render, truth, covered)
        for name, sample in samplers.items():
            score(name, codec.decode(sample()), truth, covered)
        reconstruction = codec.decode(codec.encode(truth))
        sums.setdefault("vae", []).extend(psnr(reconstruction, truth).mean(1).tolist())
        sums.setdefault("coverage", []).extend(covered[:, 1:-1].float().mean((1, 2, 3)).tolist())
    return {name: float(torch.tensor(values).nanmean()) for name, values in sums.items()}
