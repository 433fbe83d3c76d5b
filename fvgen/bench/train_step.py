"""An iteration of the trainer itself (critic updates, then one of the student), on any number of GPUs.

Networks of full size with random weights, clips of random numbers, one clip per GPU and forward call. The trainer runs as in
``fvgen distill``, only without checkpoints, validation and logs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvgen.bench.device import GpuWatch
from fvgen.bench.kernels import Say
from fvgen.bench.model import fill_zeros
from fvgen.bench.timing import kernels_in, synchronize
from fvgen.bench.train_profile import Profile, profile_updates
from fvgen.distill.classifier import ClassifierConfig
from fvgen.distill.guards import GuardLimits, Guards
from fvgen.distill.logs import RunLog
from fvgen.distill.networks import Batch, derived_seed
from fvgen.distill.parallel import Parallel
from fvgen.distill.roles import build_roles
from fvgen.distill.run import make_methods, prepare_device
from fvgen.distill.settings import Cadence, TrainSettings, default_settings
from fvgen.distill.trainer import Trainer
from fvgen.models.bundle import ModelBundle, build_component
from fvgen.models.spec import ModelSpec
from fvgen.recipes.presets import get_preset
from fvgen.types import Condition

WARM_UP = 2
CLIPS = 16


@dataclass(frozen=True)
class StepOptions:
    """What is measured.

    Attributes:
        model: a preset.
        stages: of the method "fvgen".
        rounds: measured iterations, None for a few.
        quick: a small network on a few small frames.
        checkpointing, graphs: instead of the recipe's, None to keep them.
        repeatable: only algorithms whose additions have a fixed order, as the recipe has it.
        reference: also stage 2 in plain PyTorch; in a single process only.
        profile: also where the GPU's time goes, in stage 2.
    """

    model: str
    stages: tuple[int, ...] = (1, 2)
    rounds: int | None = None
    quick: bool = False
    checkpointing: bool | None = None
    graphs: bool | None = None
    repeatable: bool = True
    reference: bool = True
    profile: bool = False


@dataclass(frozen=True)
class Measured:
    """One stage.

    Attributes:
        critic, student, iteration: milliseconds of every reading, of the slowest process.
        method: how they were taken.
        peak, reserved: bytes on the fullest GPU: of tensors, and taken from the driver; None without a GPU.
        gpu_state: clocks and so on.
        profile: of one update of each kind, where it was asked for.
    """

    critic: list[float]
    student: list[float]
    iteration: list[float]
    method: str
    peak: int | None
    reserved: int | None
    gpu_state: dict[str, Any]
    profile: Profile | None


class RandomClips:
    """Encoded clips of random numbers, in memory; the render resembles the clip.

    Args:
        spec: sizes of latents and context.
        device: where they are.
        seed: of the numbers.
    """

    count = CLIPS

    def __init__(self, spec: ModelSpec, device: torch.device, seed: int = 0) -> None:
        index = spec.index
        draw = torch.Generator(device).manual_seed(derived_seed(seed, "clips"))
        levels = len(spec.vae.get("block_out_channels", (0,) * 4)) - 1
        latent = (CLIPS, index.latent_channels, index.frames, index.height >> levels, index.width >> levels)
        tokens = (CLIPS, 77 + 16 * index.frames, spec.context_dim)
        self._clean, noise = (torch.randn(latent, generator=draw, device=device) for _ in range(2))
        self._render = 0.8 * self._clean + 0.6 * noise
        self._context, self._uncond = (torch.randn(tokens, generator=draw, device=device) for _ in range(2))
        self._fps = torch.full((CLIPS,), index.fps, device=device)

    def read(self, indices: Sequence[int]) -> Batch:
        """These clips."""

        def pick(x: Tensor) -> Tensor:
            return torch.stack([x[i] for i in indices])

        return Batch(pick(self._clean), Condition(*map(pick, (self._render, self._context, self._uncond, self._fps))))


def make_parts(options: StepOptions, world: int) -> tuple[ModelSpec, TrainSettings]:
    """Networks and the recipe's settings, with as many clips per update as there are processes."""
    spec, settings = get_preset(options.model), default_settings(options.model)
    if options.quick:
        small = get_preset("tiny")
        unet = {**small.unet, "model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": (1, 2), "head_channels": 16}
        spec = replace(small, index=replace(small.index, height=32, width=64, frames=4), unet=unet)
        settings = replace(settings, micro_batch=1, head=ClassifierConfig(width=32, groups=8))
    changes: dict[str, Any] = {k: v for k in ("checkpointing", "graphs") if (v := getattr(options, k)) is not None}
    batch = world * settings.micro_batch
    return spec, replace(settings, batch=batch, repeatable=options.repeatable, **changes)


def measure_stages(options: StepOptions, parallel: Parallel, say: Say) -> tuple[dict[int, Measured], Measured | None]:
    """Every stage that was asked for, and stage 2 in plain PyTorch or None."""
    spec, settings = make_parts(options, parallel.world)
    found = {}
    for stage in options.stages:
        rounds = options.rounds or (1 if options.quick else 6 - stage)
        warm_up = 1 if options.quick else WARM_UP
        profiled = options.profile and stage == 2
        found[stage] = _measure(stage, spec, settings, parallel, "strict", warm_up, rounds, profiled, say)
    if 2 not in found or not options.reference or parallel.world > 1:
        return found, None
    rounds = options.rounds or (1 if options.quick else 2)
    plain = replace(settings, graphs=False)
    return found, _measure(2, spec, plain, parallel, "reference", 1, rounds, False, say)


def _measure(
    stage: int,
    spec: ModelSpec,
    settings: TrainSettings,
    parallel: Parallel,
    kernels: str,
    warm_up: int,
    rounds: int,
    profiled: bool,
    say: Say,
) -> Measured:
    """Readings of a stage with the operators in a mode of FVGEN_KERNELS; its networks are gone afterwards."""
    device = parallel.device
    cuda = device.type == "cuda"
    what = f"stage {stage}, kernels: {kernels}"
    say(f"{what}: building the networks")
    start = time.perf_counter()
    with kernels_in(kernels), _algorithms(settings, parallel):
        trainer = make_trainer(stage, spec, settings, parallel)
        synchronize(device)
        _free(device)  # what only the building needed
        try:
            with GpuWatch(str(device)) as watch:
                updates = trainer.method.critic_updates + 1
                counts = f"{warm_up} iterations of {updates} updates to warm up, then {rounds}"
                say(f"{what}: built in {time.perf_counter() - start:.1f} s; {counts}")
                start = time.perf_counter()
                for _ in range(warm_up * updates):
                    trainer.advance()
                synchronize(device)
                say(f"{what}: warm after {time.perf_counter() - start:.1f} s")
                readings = _readings(trainer, rounds * updates, cuda)
                trainer.collect()  # a loss that is not a finite number ends the measurement
            reserved = torch.cuda.max_memory_reserved(device) if cuda else None
            profile = None
            if profiled:
                say(f"{what}: profiling a critic update and a student update")
                for _ in range(updates - 2):
                    trainer.advance()
                profile = profile_updates(trainer.advance, 2, device)
        finally:
            trainer.close()
        del trainer
    _free(device)
    peak = watch.facts.pop("peak_memory_bytes")
    readings, (peak, reserved) = _slowest(readings, parallel), _largest([peak, reserved], parallel)
    iterations = [readings[i : i + updates] for i in range(0, len(readings), updates)]
    return Measured(
        [ms for row in iterations for ms in row[:-1]],
        [row[-1] for row in iterations],
        [sum(row) for row in iterations],
        "cuda events" if cuda else "perf_counter",
        peak,
        reserved,
        watch.facts,
        profile,
    )


def make_trainer(stage: int, spec: ModelSpec, settings: TrainSettings, parallel: Parallel) -> Trainer:
    """The trainer of a stage on random networks, which are made where they are needed; it writes nothing."""
    device = parallel.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(settings.seed)  # alike on all ranks
        unet = build_component("unet", spec.unet).eval()
    fill_zeros(unet)
    text = torch.zeros(1, spec.context_dim)
    bundle = ModelBundle(spec.index, unet, None, None, None, text, text)
    method = make_methods(settings, spec.index.base_scale, parallel)[stage - 1]
    roles = build_roles(bundle, method, settings, parallel)
    guards = Guards(GuardLimits(window=2**62))  # what a random network makes of random clips drifts, of course
    log, nowhere = RunLog(Path(), write=False), Path("nowhere")
    return Trainer(stage, method, roles, RandomClips(spec, device), settings, Cadence(), parallel, nowhere, log, guards=guards)


def _free(device: torch.device) -> None:
    gc.collect()  # networks and their hooks refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _readings(trainer: Trainer, updates: int, cuda: bool) -> list[float]:
    """Milliseconds of each update; on a GPU from end to end of its work, so that the host may run ahead as in training."""
    if not cuda:
        times = [time.perf_counter()]
        for _ in range(updates):
            trainer.advance()
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(times)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(updates + 1)]
    marks[0].record()
    for mark in marks[1:]:
        trainer.advance()
        mark.record()
    marks[-1].synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def _slowest(readings: list[float], parallel: Parallel) -> list[float]:
    """The longest of all ranks, reading by reading."""
    found = torch.tensor(readings, dtype=torch.float64, device=parallel.device)
    if parallel.world > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def _largest(sizes: list[int | None], parallel: Parallel) -> list[int | None]:
    """The largest of all ranks."""
    if None in sizes:
        return sizes
    return [int(x) for x in _slowest([float(x or 0) for x in sizes], parallel)]


@contextmanager
def _algorithms(settings: TrainSettings, parallel: Parallel) -> Iterator[None]:
    """PyTorch's choice of algorithms as in a run, and as before afterwards."""
    cudnn = torch.backends.cudnn.deterministic
    repeatable, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill: Any = torch.utils.deterministic
    filled = fill.fill_uninitialized_memory
    prepare_device(settings, parallel)
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = cudnn
        torch.use_deterministic_algorithms(repeatable, warn_only=warn_only)
        fill.fill_uninitialized_memory = filled
