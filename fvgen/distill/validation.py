"""Clips that are never trained on, generated with the student's averaged weights while training goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fvgen.codec import Conditioner, LatentCodec
from fvgen.data.synthetic import synthetic_pairs
from fvgen.diffusion.few_step import few_step_sample
from fvgen.diffusion.noise import seeded_noise
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.trainer import Trainer
from fvgen.evaluation.heldout import HELD_OUT_SEED
from fvgen.evaluation.metrics import mean_psnr, mean_ssim
from fvgen.io.contact_sheet import write_contact_sheet
from fvgen.io.durable import whole_folder
from fvgen.io.video import write_video
from fvgen.models.bundle import ModelBundle

_SEED = 0
CHUNK = 2  # frames in the VAE at once: a full-size stage 2 leaves little memory


class Validation:
    """Generates the fixed held-out clips of the synthetic world; always the same clips from the same noise.

    Args:
        bundle: VAE and image branch, anywhere; each call has them on the device of the prompt, which does the work.
        folder: gets one folder per call: ``clip0.mp4`` (render, generated and true frames side by side) and so on,
            ``contact_sheet.png``, ``scores.json``.
        clips: how many.
        times: the student's time steps.
    """

    def __init__(self, bundle: ModelBundle, folder: Path, clips: int, times: tuple[int, ...]) -> None:
        self._bundle, self._folder, self._clips, self._times = bundle, folder, clips, times
        self._schedule = NoiseSchedule.create(bundle.index.base_scale)
        self._codec = LatentCodec(bundle.vae, CHUNK)
        towers = bundle.image_encoder, bundle.image_projector
        self._condition = Conditioner(self._codec, *towers, bundle.prompt, bundle.empty, bundle.index.fps)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, trainer: Trainer, name: str, parallel_main: bool, everywhere: bool) -> dict[str, float]:
        """Mean PSNR (dB) and SSIM of the frames between the photos.

        Args:
            trainer: whose student is looked at.
            name: of the folder.
            parallel_main: whether this process writes; everywhere: whether all processes must compute, because each holds a part.
        """
        if not parallel_main and not everywhere:
            return {}
        student = trainer.roles.trained["student"]
        videos = []
        with self._encoders(), trainer.average.applied():
            student.eval()
            for number, (render, _) in enumerate(self._held_out()):
                condition = self._condition(render[None])
                noise = seeded_noise(_SEED + number, condition.latents.device)
                shape = condition.latents.shape
                latents = few_step_sample(trainer.roles.sampler, self._schedule, condition, shape, noise, timesteps=self._times)
                videos.append(self._codec.decode(latents)[0])
            student.train()
        if not parallel_main:
            return {}
        return self._write(name, videos)

    @contextmanager
    def _encoders(self) -> Iterator[None]:
        """VAE and image branch are on the device inside the block; those that training does not need leave its memory again."""
        device = self._bundle.prompt.device
        away = [m for m in (self._bundle.vae, self._bundle.image_encoder, self._bundle.image_projector) if _device(m) != device]
        for module in away:
            nn.Module.to(module, device)
        try:
            yield
        finally:
            for module in away:
                nn.Module.to(module, "cpu")

    def _held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Renders and true frames ``[T, 3, H, W]`` of every clip."""
        index = self._bundle.index
        for number in range(len(self._pairs), self._clips):
            seeds = torch.tensor([HELD_OUT_SEED + number], device=self._bundle.prompt.device)
            pair = synthetic_pairs(seeds, (index.height, index.width), index.frames, compositor=index.compositor)
            self._pairs.append((pair.render[0], pair.target[0]))
        return self._pairs

    def _write(self, name: str, videos: list[Tensor]) -> dict[str, float]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with whole_folder(self._folder / name) as part:
            part.mkdir()
            return self._write_into(part, videos)

    def _write_into(self, part: Path, videos: list[Tensor]) -> dict[str, float]:
        scores: dict[str, list[float]] = {"psnr_db": [], "ssim": [], "render_psnr_db": [], "black_or_white": []}
        for number, (video, (render, truth)) in enumerate(zip(videos, self._pairs, strict=True)):
            inner = slice(1, -1) if len(video) > 2 else slice(None)
            scores["psnr_db"].append(mean_psnr(video[inner], truth[inner]))
            scores["render_psnr_db"].append(mean_psnr(render[inner], truth[inner]))
            scores["ssim"].append(mean_ssim(video[inner], truth[inner]))
            scores["black_or_white"].append(float(((video <= 0) | (video >= 1)).float().mean()))
            write_video(part / f"clip{number}.mp4", torch.cat([render, video, truth], -1))
        rows = [(label, clip) for clips in zip(self._pairs, videos, strict=True) for label, clip in _rows(*clips)]
        write_contact_sheet(part / "contact_sheet.png", rows)
        means = {f"validation/{k}": sum(v) / len(v) for k, v in scores.items()}
        (part / "scores.json").write_text(json.dumps({"clips": scores, "means": means}, indent=1) + "\n")
        return means


def _rows(pair: tuple[Tensor, Tensor], video: Tensor) -> list[tuple[str, Tensor]]:
    return [("point-cloud render", pair[0]), ("generated", video), ("true frames", pair[1])]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
