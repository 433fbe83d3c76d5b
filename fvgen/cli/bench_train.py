"""``fvgen bench train --model NAME``: the trainer's own step, alone or under torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fvgen import envs
from fvgen.bench.record import Record, read_records
from fvgen.recipes.presets import PRESETS
from fvgen.utils.errors import UserError

OPTIONS = ("stage", "shard", "single", "profile", "checkpointing", "graphs", "not_repeatable", "no_reference")


def check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError where options do not fit together."""
    name = arguments.model
    alone = arguments.suite == "train"
    given = [option for option in OPTIONS if getattr(arguments, option) not in (None, False)]
    if arguments.checkpointing is False:
        given.append("no-checkpointing")
    if arguments.graphs is False:
        given.append("no-graphs")
    if given and not (alone and name):
        raise UserError(
            f"--{given[0].replace('_', '-')} belongs to train with --model; add --model viewcrafter_512 or leave it out"
        )
    if arguments.suite == "views":
        if processes() not in (2, 3, 4):
            raise UserError(
                "views is measured by two to four processes; start it with torchrun --nproc-per-node 2 -m fvgen.cli bench views"
            )
    elif processes() > 1 and not (alone and name):
        raise UserError(f"{arguments.suite} is measured by a single process; start it without torchrun")
    if not (alone and name):
        return
    if name not in PRESETS:
        raise UserError(f"train measures a preset, not {name!r}; give --model one of {', '.join(PRESETS)}")
    if arguments.profile and arguments.stage == "1":
        raise UserError("--profile looks at stage 2; leave --stage 1 out")
    if arguments.profile and Path(arguments.profile).exists() and not arguments.overwrite:
        raise UserError(f"the profile {arguments.profile} exists; choose another --profile or add --overwrite")
    if arguments.single and processes() == 1:
        raise UserError("--single is for the scaling of several processes; start them with torchrun or leave it out")


def processes() -> int:
    """How many processes a launcher has started, 1 without one."""
    return _launched()[1]


def rank() -> int:
    """The number of this process."""
    return _launched()[0]


def gpu(device: str) -> int:
    """The number of the GPU that this process begins with: of several processes each has its own."""
    _, world, local = _launched()
    return local if world > 1 else int(device.partition(":")[2] or 0)


def _launched() -> tuple[int, int, int]:
    try:
        return envs.launched() or (0, 1, 0)
    except ValueError as error:
        raise UserError(f"{error}; unset them or start the processes with torchrun") from None


def measure(arguments: argparse.Namespace, device: str, say: Callable[[str], None]) -> list[Record]:
    """The records of a training step; on every rank the same."""
    if device == "cpu" and arguments.model != "tiny" and not arguments.quick:
        raise UserError(f"the full-size preset {arguments.model} is measured on a GPU; use --quick or --model tiny without one")
    if not arguments.not_repeatable:
        envs.repeatable_cublas()
    from fvgen.bench.train_figures import check_single, step_records
    from fvgen.bench.train_profile import profile_text
    from fvgen.bench.train_step import StepOptions, measure_stages
    from fvgen.distill.guards import TrainingStopped
    from fvgen.distill.parallel import Parallel

    options = StepOptions(
        arguments.model,
        stages=(1, 2) if arguments.stage in (None, "both") else (int(arguments.stage),),
        rounds=arguments.rounds,
        quick=arguments.quick,
        checkpointing=arguments.checkpointing,
        graphs=arguments.graphs,
        repeatable=not arguments.not_repeatable,
        reference=not arguments.no_reference,
        profile=bool(arguments.profile),
    )
    single = read_records(arguments.single) if arguments.single else None
    if single is not None:
        check_single(single, options)
    parallel = Parallel.start(device, "shard" if arguments.shard else "replicate")
    try:
        found, plain = measure_stages(options, parallel, say if parallel.main else lambda _: None)
        if arguments.profile and parallel.main:
            profile = found[2].profile
            assert profile is not None
            path = Path(arguments.profile)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = f"{arguments.model}, stage 2: one critic update and one student update, {parallel.world} process(es)"
            path.write_text(profile_text(profile, text))
            say(f"where the time goes: {path}")
        return step_records(options, parallel, found, plain, single)
    except TrainingStopped as stopped:
        raise UserError(f"the step does not train on random clips: {stopped}") from None
    finally:
        parallel.stop()
