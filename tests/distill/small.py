"""A run of seconds: the real networks at their smallest, with latents from a seed instead of rendered clips."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp  # slow; imported once for all processes
import torch.distributed.tensor

from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill import checkpoint
from fvgen.distill.classifier import ClassifierConfig
from fvgen.distill.comparison import make_run
from fvgen.distill.guards import Guards
from fvgen.distill.logs import RunLog
from fvgen.distill.networks import Batch, derived_seed
from fvgen.distill.parallel import Parallel
from fvgen.distill.roles import build_roles
from fvgen.distill.rollout import Process
from fvgen.distill.settings import Cadence, TrainSettings
from fvgen.distill.trainer import Trainer
from fvgen.distill.weight_mean import WeightMean
from fvgen.models.bundle import ModelBundle
from fvgen.models.spec import ModelIndex
from fvgen.models.unet import VideoUNet
from fvgen.types import Condition

SHAPE = (2, 3, 4, 4)  # C, T, h, w
WIDTH = 8  # of the context
SETTINGS = TrainSettings(
    "tiny", batch=4, micro_batch=4, lr=1e-3, warmup=3, guidance=2.0, head=ClassifierConfig(width=8, layers=2, groups=4)
)
CADENCE = Cadence(log=2, checkpoint=2, keep=2, validate=0)
# Forked from a process that has imported everything: real processes that start at once and can be killed. Imports count the GPUs,
# and after that no fork can use one.
SPAWN = get_context("spawn" if torch.cuda.is_available() else "forkserver")
SPAWN.set_forkserver_preload(["tests.distill.small"])


class Latents:
    """Clips from a seed: smooth along time, conditions related to them."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count

    def read(self, indices: Sequence[int]) -> Batch:
        clean, render, context = [], [], []
        for i in indices:
            draw = torch.Generator().manual_seed(derived_seed("clip", i))
            first = torch.randn(SHAPE[0], 1, *SHAPE[2:], generator=draw)
            clean.append(first + 0.3 * torch.randn(SHAPE, generator=draw))
            render.append(clean[-1] + 0.5 * torch.randn(SHAPE, generator=draw))
            context.append(torch.randn(6, WIDTH, generator=draw))
        uncond = torch.zeros(len(indices), 6, WIDTH)
        fps = torch.full((len(indices),), 10)
        return Batch(torch.stack(clean), Condition(torch.stack(render), torch.stack(context), uncond, fps))


def on_gpu(condition: Condition) -> Condition:
    latents, context, uncond, fps = (
        x.cuda() for x in (condition.latents, condition.context, condition.uncond_context, condition.fps)
    )
    return Condition(latents, context, uncond, fps)


class GpuLatents(Latents):
    """The same clips on the GPU."""

    def read(self, indices: Sequence[int]) -> Batch:
        batch = super().read(indices)
        return replace(batch, clean=batch.clean.cuda(), condition=on_gpu(batch.condition))


def small_teacher() -> ModelBundle:
    """A bundle whose UNet alone is there, with every weight drawn (zero-initialised layers would hide mistakes)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = VideoUNet(
            in_channels=2 * SHAPE[0],
            out_channels=SHAPE[0],
            model_channels=8,
            channel_mult=(1,),
            layers_per_level=1,
            attention_resolutions=(1,),
            head_channels=4,
            context_dim=WIDTH,
            temporal_length=SHAPE[1],
            text_tokens=3,
            image_tokens_per_frame=1,
            initial_temporal_heads=1,
            norm_groups=4,
        )
        for p in unet.parameters():
            p.data += 0.05 * torch.randn(p.shape)
    index = ModelIndex("tiny", height=32, width=32, frames=SHAPE[1], latent_channels=SHAPE[0])
    return ModelBundle(index, unet, None, None, None, torch.zeros(3, WIDTH), torch.zeros(3, WIDTH))


def small_trainer(
    folder: Path,
    settings: TrainSettings = SETTINGS,
    parallel: Parallel | None = None,
    stage: int = 2,
    cadence: Cadence = CADENCE,
    source: Any = None,
    critic_updates: int = 1,
    guards: Guards | None = None,
    weight_mean: bool = False,
) -> Trainer:
    """The trainer of a stage of the run "fvgen", with one critic update per iteration; goes on from the latest checkpoint."""
    parallel = parallel or Parallel.start("cpu")
    process = Process.create(NoiseSchedule.create(), parallel.device)
    method: Any = make_run(settings.run, process)[stage - 1]
    if critic_updates and method.critic_updates:
        method = replace(method, config=replace(method.config, critic_updates=critic_updates, inputs="rollout"))
    if weight_mean:
        method = replace(method, weight_mean=WeightMean(method.config.divergence))
    roles = build_roles(small_teacher(), method, settings, parallel)
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(folder, parallel.main)
    trainer = Trainer(
        stage, method, roles, source or Latents(), settings, cadence, parallel, folder / "checkpoints", log, guards=guards
    )
    found = checkpoint.latest(folder / "checkpoints")
    if found is not None:
        trainer.restore(found)
    return trainer


def train(
    folder: Path, iterations: int = 4, layout: str = "replicate", dies_at: int | None = None, device: str = "cpu", **options: Any
) -> None:
    """Trains in this process; it kills itself at the beginning of update ``dies_at``."""
    torch.set_num_threads(1)
    parallel = Parallel.start(device, layout)
    source = GpuLatents() if device == "cuda" else Latents()
    trainer = small_trainer(folder, parallel=parallel, source=source, **options)
    advance = trainer.advance

    def mortal() -> None:
        if trainer.position.update == dies_at and parallel.rank == parallel.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        advance()

    trainer.advance = mortal  # type: ignore[method-assign]
    trainer.run(iterations)
    parallel.stop()


def killed_while_writing(event: int, folder: Path, renames_only: bool = False) -> None:
    """Trains, and dies at the ``event``-th step of writing checkpoints: a file half written, a flush, a rename."""
    import safetensors.torch

    count = [0]

    def mortal(function: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == event:
                if half:
                    function(*arguments, **options)
                    path = Path(arguments[1])
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    if not renames_only:
        safetensors.torch.save_file = mortal(safetensors.torch.save_file, half=True)
        os.fsync = mortal(os.fsync)
    os.rename = mortal(os.rename)
    os.replace = mortal(os.replace)
    train(folder)


def _ranked(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...], options: dict) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(*arguments, **options)


def in_process(function: Callable[..., None], *arguments: Any, **options: Any) -> int:
    """Exit status of ``function`` in a process of its own; negative for a signal."""
    process = SPAWN.Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join()
    return process.exitcode


def on_ranks(world: int, function: Callable[..., None], *arguments: Any, seconds: int = 60, **options: Any) -> list[int]:
    """Exit statuses of ``function`` on that many ranks, as a launcher would start them, or None after that many seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [SPAWN.Process(target=_ranked, args=(r, world, port, function, arguments, options)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
    for process in ranks:
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in ranks]
