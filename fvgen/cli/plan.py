"""``fvgen distill --dry-run``: what would be trained, on what memory, and for how long where that is known."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fvgen.distill.checkpoint import latest, read_state
from fvgen.distill.folder import CHECKPOINTS
from fvgen.distill.options import RunOptions
from fvgen.distill.parallel import Parallel, check_layout
from fvgen.distill.plan import clips_left, measured_speed, memory_plan, validation_bytes
from fvgen.distill.run import check_run, make_methods
from fvgen.distill.settings import TrainSettings
from fvgen.models.bundle import ModelBundle
from fvgen.recipes.presets import get_preset


def show_plan(
    arguments: argparse.Namespace, settings: TrainSettings, options: RunOptions, teacher: Path | None, world: int
) -> None:
    """Prints the plan.

    Args:
        arguments: of the command.
        settings, options: of the run.
        teacher: its model directory; None where the run still needs one.
        world: processes.

    Raises:
        UserError: whatever the run itself would refuse before its first update.
    """
    synthetic, spec = options.data == "synthetic", get_preset(settings.recipe)
    # only clips and a start have to fit the teacher's weights
    bundle = None if teacher is None or (synthetic and options.start is None) else ModelBundle.from_pretrained(teacher)
    check_layout("shard" if arguments.shard else "replicate", world)
    check_run(settings, options, bundle, Parallel(0, world, torch.device("cpu")))
    unet = spec.unet
    middle = round(unet.get("model_channels", 320) * unet.get("channel_mult", (1, 2, 4, 4))[-1])
    methods = make_methods(settings, spec.index.base_scale, Parallel(0, 1, torch.device("cpu")))
    found = latest(options.output / CHECKPOINTS)
    state = None if found is None else read_state(found)
    named = f"none yet: the run needs a {settings.recipe} as --teacher" if teacher is None else arguments.teacher
    print(f"method      {settings.run}, data {options.data}")
    print(f"teacher     {named}")
    print(f"batch       {settings.batch} clips: {settings.lanes} forward calls of {settings.micro_batch}, on {world} processes")
    print(f"output      {options.output} ({'new' if found is None else f'goes on from {found.name}'})")
    hours: list[float | None] = []
    for stage in settings.stages:
        method = methods[stage - 1]
        updates = f"{settings.iterations[stage - 1]} iterations of {method.critic_updates} critic updates + 1"
        print(f"\nstage {stage}     {type(method).__name__}, {updates}")
        plan = memory_plan(spec, method, settings, middle, world if arguments.shard else 1, synthetic)
        _lines({**plan, "together": sum(plan.values())})
        if options.validation_clips and options.cadence.validate:
            # recorded calls keep the memory of their activations
            kept = sum(n for name, n in plan.items() if settings.graphs or not name.startswith("activations"))
            _lines({"in a validation (estimate)": kept + validation_bytes(spec, synthetic) / 1e9})
        left, speed = clips_left(method, settings, stage, state), measured_speed(options.output, stage)
        hours.append(0.0 if not left else None if speed is None else left / speed / 3600)
        print(f"  {'time left':<26} {_time(hours[-1], speed)}")
    if len(hours) > 1:
        print(f"\ntime left   {_time(None if None in hours else sum(h or 0.0 for h in hours), None)}")


def _lines(gigabytes: dict[str, float]) -> None:
    for what, n in gigabytes.items():
        print(f"  {what:<26} {n:8.2f} GB per GPU")


def _time(hours: float | None, speed: Any) -> str:
    if hours is None:
        return "not known: nothing has been measured in this folder"
    return f"{hours:.2f} h" + (f" at {speed:.1f} clips/s" if speed and hours else "")
