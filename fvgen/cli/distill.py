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


def _processes() -> tuple[int, int]:
    """Number of this process, and how many a launcher has started: 0, 1 without one."""
    try:
        launched = envs.launched()
    except ValueError as error:
        raise UserError(f"{error}; unset them or start the processes with torchrun") from None
    return launched[:2] if launched else (0, 1)


def _distill(arguments: argparse.Namespace, device: str) -> None:
    from fvgen.distill.graphs import forget_graphs
    from fvgen.distill.parallel import Parallel
    from fvgen.distill.run import distill

    rank, world = _processes()
    settings = make_settings(arguments, world)
    options = make_options(arguments)
    model = find_model(arguments.teacher)
    if arguments.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb; install it with pip install wandb or leave the option out")
    from fvgen.models.bundle import ModelBundle, read_index

    preset = read_index(model).preset
    # a full-size run may be planned before its teacher is there, with none said
    unsaid = arguments.dry_run and arguments.teacher == "tiny_teacher" and preset != settings.recipe
    if preset != settings.recipe and not unsaid:
        raise UserError(f"the teacher {arguments.teacher} is a {preset}, not a {settings.recipe}; give --recipe or --teacher")
    if rank == 0 and settings.idle():
        print(f"fvgen: warning: {settings.idle()}", file=sys.stderr)
    if arguments.dry_run:
        if rank == 0:
            from fvgen.cli.plan import show_plan

            show_plan(arguments, settings, options, None if unsaid else model, world)
        return
    parallel = Parallel.start(device, "shard" if arguments.shard else "replicate")
    try:
        finished = distill(settings, options, ModelBundle.from_pretrained(model), parallel)
    finally:
        forget_graphs()  # an error still refers to them, and NCCL waits for them
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
    from fvgen.distill.overrides import override
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
    settings = replace(
        settings,
        run=arguments.method,
        stages=stages,
        iterations=tuple(iterations),
        batch=batch,
        micro_batch=micro,
        repeatable=not arguments.not_repeatable,
        **changes,
    )
    return override(settings, arguments.overrides or ())


def make_options(arguments: argparse.Namespace) -> Any:
    """Where, how long, and what is left behind."""
    from fvgen.distill.options import RunOptions
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
