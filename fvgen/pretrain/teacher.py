"""Trains the small video network, its image tower and projector on synthetic pairs, with the teacher's own denoising loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.data.synthetic import synthetic_pairs
from fvgen.diffusion.parameterisation import add_noise, velocity
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.diffusion.timesteps import make_timesteps
from fvgen.models.clip import ClipVisionTower
from fvgen.models.image_projector import ImageProjector
from fvgen.models.unet import VideoUNet
from fvgen.pretrain.common import Average, Budget, Log, learning_rate, to_bytes
from fvgen.pretrain.graphed import GradientStep
from fvgen.recipes.presets import get_preset


@dataclass(frozen=True)
class TeacherRecipe:
    """Settings of the network's run.

    Attributes:
        steps, minutes: end of the run, whichever comes first.
        batch: clips per step.
        refill_every, pairs: every so many steps, that many new clips; first_fill: clips made before the first step.
        buffer: clips kept.
        portrait_share: share of steps with height and width exchanged.
        short_share, short_frames: share of steps on clips thinned out to that many frames.
        student_share: share of time steps drawn from those the four-step sampler visits; the others are uniform.
        seed: of weights, worlds and noise.
    """

    steps: int = 20000
    minutes: float | None = None
    batch: int = 16
    refill_every: int = 8
    pairs: int = 8
    buffer: int = 8192
    first_fill: int = 128
    portrait_share: float = 0.25
    short_share: float = 0.25
    short_frames: tuple[int, ...] = (8, 12)
    student_share: float = 0.4
    peak_lr: float = 6e-4
    ema: float = 0.9995
    seed: int = 0


class Networks(nn.Module):
    """Everything that is trained: the UNet and the image branch that feeds it."""

    def __init__(self, prompt: Tensor, empty: Tensor, fps: int) -> None:
        super().__init__()
        spec = get_preset("tiny")
        self.unet = VideoUNet(**spec.unet)
        self.image_encoder = ClipVisionTower(**spec.image_encoder)
        self.image_projector = ImageProjector(**spec.image_projector)
        self.register_buffer("prompt", prompt)
        self.register_buffer("empty", empty)
        self.fps = fps

    def forward(self, x: Tensor, t: Tensor, render: Tensor, photo: Tensor, drop: Tensor) -> Tensor:
        """``x, render [B, C, T, h, w]``, ``photo [B, 3, H, W]`` in [-1, 1], ``drop [B]`` uniform in [0, 1): what to leave out."""
        photo = torch.where(((drop >= 0.05) & (drop < 0.15))[:, None, None, None], torch.zeros_like(photo), photo)
        text = torch.where((drop < 0.10)[:, None, None], self.empty, self.prompt)
        context = torch.cat([text, self.image_projector(self.image_encoder(photo))], 1)
        fps = torch.full((x.shape[0],), self.fps, device=x.device)
        return self.unet(torch.cat([x, render], 1).to(context.dtype), t, context, fps)


class PairBuffer:
    """The newest clips of one orientation as latents, refilled a few at a time."""

    def __init__(self, vae: nn.Module, size: tuple[int, int], frames: int, capacity: int, device: str, compile: bool) -> None:
        self.size, self.frames, self._vae, self._compile = size, frames, vae, compile
        channels = vae.config.latent_channels
        shape = (capacity, channels, frames, size[0] // 8, size[1] // 8)
        self.target = torch.empty(shape, dtype=torch.float16, device=device)
        self.render = torch.empty(shape, dtype=torch.float16, device=device)
        self.photo = torch.empty(capacity, 3, *size, dtype=torch.uint8, device=device)
        self.filled = 0

    def encode(self, clips: Tensor) -> Tensor:
        """``[B, T, 3, H, W]`` in [0, 1] to scaled latents ``[B, C, T, h, w]``."""
        frames = (2 * clips.flatten(0, 1) - 1).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
            latents = torch.cat([self._vae.encode(f).latent_dist.mean for f in frames.split(64)])
        return (latents * self._vae.config.scaling_factor).unflatten(0, clips.shape[:2]).transpose(1, 2)

    def add(self, seeds: Tensor) -> None:
        pairs = synthetic_pairs(seeds, self.size, self.frames, self._compile)
        at = torch.arange(self.filled, self.filled + len(seeds), device=seeds.device) % len(self.photo)
        self.target[at] = self.encode(pairs.target).half()
        self.render[at] = self.encode(pairs.render).half()
        self.photo[at] = to_bytes(pairs.target[:, 0])
        self.filled += len(seeds)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random clips: target and render latents ``[B, C, T, h, w]`` and the first photo ``[B, 3, H, W]`` in [-1, 1]."""
        available = min(self.filled, len(self.photo))
        pick = torch.randint(available, (count,), device=self.photo.device, generator=generator)
        return self.target[pick].float(), self.render[pick].float(), self.photo[pick].float() / 127.5 - 1


def train_teacher(
    recipe: TeacherRecipe, vae: nn.Module, prompt: Tensor, empty: Tensor, output: Path, device: str, compile: bool = False
) -> Networks:
    """Trains and returns the averaged networks; writes ``output/teacher.jsonl``."""
    index = get_preset("tiny").index
    torch.manual_seed(recipe.seed)
    networks = Networks(prompt, empty, index.fps).to(device)
    average = Average(networks, recipe.ema)
    # Half-precision copy that computes; the float32 originals take the updates, which bfloat16 would round away.
    working = copy.deepcopy(networks).to(torch.bfloat16 if device == "cuda" else torch.float32)
    masters, copies = list(networks.parameters()), list(working.parameters())
    for master in masters:
        master.grad = torch.zeros_like(master)

    def denoising_loss(x: Tensor, v: Tensor, t: Tensor, render: Tensor, photo: Tensor, drop: Tensor) -> Tensor:
        return F.mse_loss(working(x, t, render, photo, drop).float(), v)

    gradients = GradientStep(working, denoising_loss)
    optimiser = torch.optim.AdamW(
        networks.parameters(), lr=recipe.peak_lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=device == "cuda"
    )
    schedule = NoiseSchedule.create(index.base_scale).to(device)
    student_times = torch.tensor(make_timesteps(4), device=device)
    vae = vae.to(device).to(memory_format=torch.channels_last).requires_grad_(False).eval()
    landscape, *portrait = [
        PairBuffer(vae, s, index.frames, recipe.buffer // (1 + 3 * i), device, compile) for i, s in enumerate(index.sizes())
    ]
    generator = torch.Generator(device=device).manual_seed(recipe.seed)
    log, budget = Log(output, "teacher"), Budget(recipe.steps, recipe.minutes)
    next_world, step = 2_000_000_000 * (1 + recipe.seed), 0
    while (fraction := budget.fraction(step)) < 1:
        turned = portrait and (step // 9) % 20 < 20 * recipe.portrait_share
        buffer = portrait[0] if turned else landscape
        for _ in range(recipe.first_fill // recipe.pairs if buffer.filled == 0 else int(step % recipe.refill_every == 0)):
            buffer.add(torch.arange(next_world, next_world + recipe.pairs, device=device))
            next_world += recipe.pairs
        target, render, photo = buffer.draw(recipe.batch, generator)
        if step % 20 < 20 * recipe.short_share:
            count = recipe.short_frames[step % len(recipe.short_frames)]
            keep = torch.linspace(0, index.frames - 1, count, device=device).round().long()
            target, render = target[:, :, keep], render[:, :, keep]
        noise = torch.randn(target.shape, device=device, generator=generator)
        t = torch.randint(len(schedule), (recipe.batch,), device=device, generator=generator)
        use_student = torch.rand(recipe.batch, device=device, generator=generator) < recipe.student_share
        pick = torch.randint(len(student_times), (recipe.batch,), device=device, generator=generator)
        t = torch.where(use_student, student_times[pick], t)
        x = add_noise(schedule, target, noise, t)
        drop = torch.rand(recipe.batch, device=device, generator=generator)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(fraction, recipe.peak_lr)
        loss = gradients(x, velocity(schedule, target, noise, t), t, render, photo, drop)
        torch._foreach_copy_([p.grad for p in masters], [p.grad for p in copies])
        norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(copies, masters)
        average.update(networks)
        if step % 100 == 0:
            log.write(step=step, loss=float(loss), gradient_norm=float(norm), worlds=landscape.filled)
        step += 1
    return average.module
