"""Trains the small VAE on single frames of the synthetic world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fvgen.data.synthetic import synthetic_frames
from fvgen.models.vae import make_vae
from fvgen.pretrain.common import Average, Budget, Log, learning_rate, to_bytes
from fvgen.recipes.presets import get_preset


@dataclass(frozen=True)
class VaeRecipe:
    """Settings of the VAE run.

    Attributes:
        steps, minutes: end of the run, whichever comes first.
        batch: frames per step.
        refill_every, worlds, frames_per_world: every so many steps, that many new worlds give that many frames each.
        buffer: frames kept.
        kl_weight: weight of the KL term, per latent element.
        seed: of weights, worlds and noise.
    """

    steps: int = 12000
    minutes: float | None = None
    batch: int = 48
    refill_every: int = 4
    worlds: int = 8
    frames_per_world: int = 4
    buffer: int = 16384
    peak_lr: float = 1.5e-3
    kl_weight: float = 3e-4
    seed: int = 0


def _loss(vae: torch.nn.Module, image: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Squared and absolute error of colours and of their differences, plus KL; also the mean squared error alone."""
    posterior = vae.encode(image).latent_dist
    output = vae.decode(posterior.sample()).sample.float()
    error = output - image
    slopes = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    mse = error.square().mean()
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return 4 * mse + 0.5 * error.abs().mean() + 0.25 * slopes + kl_weight * kl, mse.detach()


@torch.no_grad()
def vae_psnr(vae: torch.nn.Module, images: Tensor) -> float:
    """Mean over images ``[N, 3, H, W]`` in [0, 1] of the PSNR of the decoded posterior mean, dB."""
    scores = []
    for image in images.split(16):
        latent = vae.encode(2 * image - 1).latent_dist.mean
        output = (vae.decode(latent).sample.float() / 2 + 0.5).clamp(0, 1)
        scores.append(-10 * torch.log10((output - image).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(scores).mean())


def train_vae(recipe: VaeRecipe, output: Path, device: str, compile: bool = False) -> None:
    """Writes ``output/vae`` (EMA weights, scaling factor set so that latents have unit variance) and ``output/vae.jsonl``."""
    spec = get_preset("tiny")
    torch.manual_seed(recipe.seed)
    vae = make_vae(**spec.vae).to(device).to(memory_format=torch.channels_last)
    average = Average(vae, 0.999)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=recipe.peak_lr, weight_decay=1e-4, betas=(0.9, 0.95))
    log, budget = Log(output, "vae"), Budget(recipe.steps, recipe.minutes)
    sizes = spec.index.sizes()
    fresh = recipe.worlds * recipe.frames_per_world
    buffers = [torch.empty(recipe.buffer // len(sizes), 3, *s, dtype=torch.uint8, device=device) for s in sizes]
    filled = [0] * len(sizes)
    held_out = synthetic_frames(torch.arange(8, device=device) + (1 << 40), sizes[0], 4, compile).flatten(0, 1)
    generator = torch.Generator(device=device).manual_seed(recipe.seed)
    next_world, step = 1_000_000_000 * (1 + recipe.seed), 0
    while (fraction := budget.fraction(step)) < 1:
        shape = step % len(sizes)
        for _ in range(8 if filled[shape] == 0 else int(step // len(sizes) % recipe.refill_every == 0)):
            seeds = torch.arange(next_world, next_world + recipe.worlds, device=device)
            next_world += recipe.worlds
            frames = to_bytes(synthetic_frames(seeds, sizes[shape], recipe.frames_per_world, compile).flatten(0, 1))
            at = torch.arange(filled[shape], filled[shape] + fresh, device=device) % len(buffers[shape])
            buffers[shape][at] = frames
            filled[shape] += fresh
        pick = torch.randint(min(filled[shape], len(buffers[shape])), (recipe.batch,), device=device, generator=generator)
        image = (buffers[shape][pick].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(fraction, recipe.peak_lr)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, mse = _loss(vae, image, recipe.kl_weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        average.update(vae)
        if step % 100 == 0:
            log.write(step=step, loss=float(loss.detach()), train_psnr=float(-10 * torch.log10(mse / 4)))
        if step % 2000 == 1000:
            log.write(step=step, psnr=vae_psnr(average.module, held_out))
        step += 1
    best = average.module
    with torch.no_grad():
        latents = [best.encode(2 * x - 1).latent_dist.mean for x in held_out.split(16)]
    best.register_to_config(scaling_factor=float(1 / torch.cat(latents).std()))
    log.write(step=step, psnr=vae_psnr(best, held_out), scaling_factor=best.config.scaling_factor)
    best.to(memory_format=torch.contiguous_format).save_pretrained(output / "vae")
