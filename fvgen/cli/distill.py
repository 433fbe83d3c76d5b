"""``fvgen distill``: trains a few-step student from a teacher."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fvgen import envs
from fvgen.cli.parser import given
from fvgen.pipeline import find_model
from fvgen.utils.device import choose_device
from fvgen.utils.errors import UserError

GUARD_STATUS = 3


def run(arguments: argparse.Namespace) -> None:
    """Trains, or says what it would do; exits with status 3 where a guard stops the run, with 130 where it is interrupted."""
    envs.repeatable_cublas()
    device = choose_device(arguments.device)
    from fvgen.distill.guards import TrainingStopped

    try:
        _distill(arguments, device)
    except TrainingStopped as stopped:
        if (envs.launched() or (0,))[0] == 0:
            print(f"fvgen: stopped: {stopped}", file=sys.stderr)
            print(f"fvgen: the last checkpoint in {arguments.output} is from before that", file=sys.stderr)
        raise SystemExit(GUARD_STATUS) from None
    except Exception as error:  # by name: safetensors has an error of its own for a full disk, PyTorch one for memory
        if "No space left on device" in str(error):
            raise UserError("the disk is full; free some space, and the same command goes on from the last checkpoint") from error
        if type(error).__name__ == "OutOfMemoryError":
            raise UserError("the GPU's memory ran out; lower --micro-batch, or add --checkpointing or --shard") from error
        raise
    except KeyboardInterrupt:
        print("\nfvgen: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def _processes() -> int:
    """How many processes a launcher has started, 1 without one."""
    try:
        launched = envs.launched()
    except ValueError as error:
        raise UserError(f"{error}; unset them or start the processes with torchrun") from None
    return launched[1] if launched else 1


def _distill(arguments: argparse.Namespace, device: str) -> None:
    from fvgen.distill.parallel import Parallel
    from fvgen.distill.run import distill

    settings = make_settings(arguments, _processes())
    options = make_options(arguments)
    model = find_model(arguments.teacher)
    if arguments.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb; install it with pip install wandb or leave the option out")
    from fvgen.models.bundle import ModelBundle, read_index

    preset = read_index(model).preset
    # a full-size run may be planned before its teacher is there, with none said
    unsaid = arguments.dry_run and arguments.teacher == "tiny_teacher"
    if preset != settings.recipe and not unsaid:
        raise UserError(f"the teacher {arguments.teacher} is a {preset}, not a {settings.recipe}; give --recipe or --teacher")
    if arguments.dry_run:
        show_plan(arguments, settings)
        return
    parallel = Parallel.start(device, "shard" if arguments.shard else "replicate")
    finished = distill(settings, options, ModelBundle.from_pretrained(model), parallel)
    parallel.stop()
    if parallel.main:
        print(f"run        {options.output}")
        print("finished   fvgen export-student makes a model of it" if finished else "time is up; the same command goes on")


def make_settings(arguments: argparse.Namespace, world: int) -> Any:
    """The recipe's settings with what was asked for.

    Raises:
        UserError: settings that do not fit together.
    """
    from fvgen.diffusion.timesteps import make_timesteps
    from fvgen.distill.comparison import stage_iterations
    from fvgen.distill.settings import default_settings

    settings = default_settings(arguments.recipe)
    own = stage_iterations(arguments.method, settings.iterations)
    stages = tuple(range(1, len(own) + 1)) if arguments.stage is None else (arguments.stage,)
    if stages[-1] > len(own):
        raise UserError(f"the method {arguments.method} has {len(own)} stage; leave --stage out")
    if stages == (2,) and arguments.start is None:
        raise UserError("stage 2 alone needs the run of stage 1; give it with --from, or leave --stage out")
    iterations = list(own)
    asked = arguments.iterations or []
    if len(asked) not in (0, 1, len(stages)):
        raise UserError(f"--iterations takes one number, or one for each of the {len(stages)} stages, not {len(asked)}")
    for place, stage in enumerate(stages):
        if asked:
            iterations[stage - 1] = asked[place % len(asked)]
    batch = arguments.batch or settings.batch
    if batch % world:
        raise UserError(
            f"a batch of {batch} clips cannot be dealt out to {world} processes; give a multiple of {world} to --batch"
        )
    each = batch // world
    micro = arguments.micro_batch or max(n for n in range(1, min(settings.micro_batch, each) + 1) if each % n == 0)
    names = ("lr", "fake_lr", "head_lr", "lead", "warmup", "ema", "guidance", "rescale", "inputs", "divergence", "critic_updates")
    changes = given(arguments, (*names, "seed"))
    for option in ("checkpointing", "graphs"):
        if getattr(arguments, option) is not None:
            changes[option] = getattr(arguments, option)
    if arguments.steps is not None:
        changes["times"] = tuple(make_timesteps(arguments.steps))
        changes["trajectory_steps"] = arguments.steps * -(-settings.trajectory_steps // arguments.steps)  # a multiple
    return replace(
        settings,
        run=arguments.method,
        stages=stages,
        iterations=tuple(iterations),
        batch=batch,
        micro_batch=micro,
        repeatable=not arguments.not_repeatable,
        **changes,
    )


def make_options(arguments: argparse.Namespace) -> Any:
    """Where, how long, and what is left behind."""
    from fvgen.distill.run import RunOptions
    from fvgen.distill.settings import Cadence
    from fvgen.distill.synthetic import Reuse

    return RunOptions(
        output=Path(arguments.output),
        teacher=str(arguments.teacher),
        data=str(arguments.data),
        start=None if arguments.start is None else Path(arguments.start),
        cadence=Cadence(
            arguments.log_every,
            arguments.checkpoint_every,
            arguments.keep,
            arguments.validate_every,
            arguments.checkpoint_minutes,
        ),
        minutes=arguments.minutes,
        validation_clips=arguments.validation_clips,
        reuse=Reuse(arguments.window, arguments.reuse, min(Reuse.block, arguments.window)),
        wandb=arguments.wandb,
        compile=choose_device(arguments.device).startswith("cuda"),
    )


def show_plan(arguments: argparse.Namespace, settings: Any) -> None:
    """What would be trained, on what memory, and for how long where that is known."""
    from fvgen.distill.checkpoint import latest
    from fvgen.distill.parallel import Parallel
    from fvgen.distill.plan import clips_needed, measured_speed, memory_plan
    from fvgen.distill.run import CHECKPOINTS, make_methods
    from fvgen.recipes.presets import get_preset

    output, spec = Path(arguments.output), get_preset(settings.recipe)
    world = _processes()
    unet = spec.unet
    middle = round(unet.get("model_channels", 320) * unet.get("channel_mult", (1, 2, 4, 4))[-1])
    methods = make_methods(settings, spec.index.base_scale, Parallel(0, 1, _cpu()))
    found = latest(output / CHECKPOINTS)
    print(f"method      {settings.run}, teacher {arguments.teacher}, data {arguments.data}")
    print(f"batch       {settings.batch} clips: {settings.lanes} forward calls of {settings.micro_batch}, on {world} processes")
    print(f"output      {output} ({'new' if found is None else f'goes on from {found.name}'})")
    speed, total = measured_speed(output), 0
    for stage in settings.stages:
        method, iterations = methods[stage - 1], settings.iterations[stage - 1]
        total += clips_needed(method, iterations, settings.batch)
        print(
            f"\nstage {stage}     {type(method).__name__}, {iterations} iterations of {method.critic_updates} critic updates + 1"
        )
        plan = memory_plan(spec, method, settings, middle, world if arguments.shard else 1)
        for what, gigabytes in {**plan, "together": sum(plan.values())}.items():
            print(f"  {what:<24} {gigabytes:8.2f} GB per GPU")
    known = (
        "not known: nothing has been measured in this folder"
        if speed is None
        else f"{total / speed / 3600:.1f} h at {speed:.1f} clips/s"
    )
    print(f"\ntime        {known}")


def _cpu() -> Any:
    import torch

    return torch.device("cpu")
