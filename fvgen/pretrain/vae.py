"""Trains the small VAE on single frames of the synthetic world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fvgen.data.synthetic import synthetic_frames
from fvgen.io.durable import whole_folder
from fvgen.models.spec import ModelSpec
from fvgen.models.vae import make_vae
from fvgen.pretrain.common import Average, Budget, Log, learning_rate, to_bytes
from fvgen.recipes.presets import get_preset

HELD_OUT_WORLD = 1 << 40


@dataclass(frozen=True)
class VaeRecipe:
    """Settings of the VAE run.

    Attributes:
        steps, minutes: end of the run, whichever comes first.
        batch: frames per step.
        refill_every, worlds, frames_per_world: every so many steps, that many new worlds give that many frames each.
        first_fill: refills before the first step, per orientation.
        buffer: frames kept.
        held_out: worlds for the PSNR in the log and for the scaling factor.
        kl_weight: weight of the KL term, per latent element.
        seed: of weights, worlds and noise.
    """

    steps: int = 12000
    minutes: float | None = None
    batch: int = 48
    refill_every: int = 4
    worlds: int = 8
    frames_per_world: int = 4
    first_fill: int = 8
    buffer: int = 16384
    held_out: int = 8
    peak_lr: float = 1.5e-3
    kl_weight: float = 3e-4
    seed: int = 0


class FrameBuffer:
    """The newest frames of one size as bytes."""

    def __init__(self, recipe: VaeRecipe, size: tuple[int, int], capacity: int, device: str, compile: bool) -> None:
        self._recipe, self._size, self._compile = recipe, size, compile
        self._frames = torch.empty(capacity, 3, *size, dtype=torch.uint8, device=device)
        self.filled = 0

    def add(self, first_world: int) -> None:
        worlds = torch.arange(first_world, first_world + self._recipe.worlds, device=self._frames.device)
        frames = synthetic_frames(worlds, self._size, self._recipe.frames_per_world, self._compile).flatten(0, 1)
        at = torch.arange(self.filled, self.filled + len(frames), device=worlds.device) % len(self._frames)
        self._frames[at] = to_bytes(frames)
        self.filled += len(frames)

    def draw(self, generator: torch.Generator) -> Tensor:
        """A batch ``[N, 3, H, W]`` in [-1, 1]."""
        available = min(self.filled, len(self._frames))
        pick = torch.randint(available, (self._recipe.batch,), device=self._frames.device, generator=generator)
        return (self._frames[pick].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


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


def train_vae(recipe: VaeRecipe, output: Path, device: str, compile: bool = False, *, spec: ModelSpec | None = None) -> None:
    """Writes ``output/vae`` (EMA weights, scaling factor set so that latents have unit variance) and ``output/vae.jsonl``.

    Args:
        recipe: settings.
        output: directory; ``output/vae`` appears when it is complete.
        device: "cpu" or "cuda".
        compile: fuse the ray caster with torch.compile.
        spec: the VAE and its image sizes; None takes the preset ``tiny``.
    """
    spec = spec or get_preset("tiny")
    torch.manual_seed(recipe.seed)
    vae = make_vae(**spec.vae).to(device).to(memory_format=torch.channels_last)
    average = Average(vae, 0.999)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=recipe.peak_lr, weight_decay=1e-4, betas=(0.9, 0.95))
    log, budget = Log(output, "vae"), Budget(recipe.steps, recipe.minutes)
    sizes = spec.index.sizes()
    buffers = [FrameBuffer(recipe, size, recipe.buffer // len(sizes), device, compile) for size in sizes]
    held_out = synthetic_frames(torch.arange(recipe.held_out, device=device) + HELD_OUT_WORLD, sizes[0], 4, compile).flatten(0, 1)
    generator = torch.Generator(device=device).manual_seed(recipe.seed)
    next_world, step = 1_000_000_000 * (1 + recipe.seed), 0
    while (fraction := budget.fraction(step)) < 1:
        turn, buffer = step // len(sizes), buffers[step % len(sizes)]
        for _ in range(recipe.first_fill if buffer.filled == 0 else int(turn % recipe.refill_every == 0)):
            buffer.add(next_world)
            next_world += recipe.worlds
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(fraction, recipe.peak_lr)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, mse = _loss(vae, buffer.draw(generator), recipe.kl_weight)
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
    with whole_folder(output / "vae") as new:
        best.to(memory_format=torch.contiguous_format).save_pretrained(new)
