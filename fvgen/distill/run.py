"""A whole run in its folder: stages one after the other, each from where it was left.

run.json            settings, teacher and data; what a continued run must agree with
checkpoints/        see checkpoint.py
losses.jsonl        one line per update
progress.jsonl      speed, memory and histograms; tensorboard/ the same as curves
validation/         held-out clips
stopped.json        what a guard said, until the run is continued
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch

from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill import checkpoint
from fvgen.distill.comparison import make_run
from fvgen.distill.data import check_data
from fvgen.distill.folder import CHECKPOINTS, STOPPED, check_place, claimed, find_checkpoint, starting_tensors
from fvgen.distill.guards import Guards, TrainingStopped
from fvgen.distill.logs import RunLog
from fvgen.distill.methods import DistributionMatching, Method
from fvgen.distill.options import RunOptions
from fvgen.distill.parallel import Parallel
from fvgen.distill.roles import build_roles
from fvgen.distill.rollout import Process
from fvgen.distill.settings import TrainSettings
from fvgen.distill.sources import TRAJECTORIES, Worlds, check_encoder, make_source, shard_source
from fvgen.distill.trainer import Trainer
from fvgen.distill.trajectories import Integration
from fvgen.distill.validation import Validation
from fvgen.distill.weight_mean import WeightMean
from fvgen.evaluation.provenance import versions
from fvgen.io.durable import remove_partial, write_json_durably
from fvgen.models.bundle import ModelBundle

VALIDATION = "validation"


def distill(
    settings: TrainSettings,
    options: RunOptions,
    bundle: ModelBundle,
    parallel: Parallel,
    guards: Callable[[], Guards] = Guards,
    worlds: Worlds | None = None,
    validate: Callable[[Trainer, str], dict[str, float]] | None = None,
) -> bool:
    """Trains the stages that are not trained yet; False when the time ran out before.

    Args:
        settings: what is computed.
        options: where, how long, and what is left behind.
        bundle: the teacher's model; all of it but the UNet is moved to the device of ``parallel``.
        parallel: the processes.
        guards: makes the guards of a stage.
        worlds: synthetic clips that earlier runs of this process have made and this one may use; it adds its own.
        validate: called instead of the validation on ``options.validation_clips`` clips.

    Raises:
        UserError: bad settings or data, or a folder that holds something else.
        TrainingStopped: a guard objected; the last checkpoint is from before that.
    """
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    output, root = options.output, options.output / CHECKPOINTS
    check_run(settings, options, bundle, parallel)
    prepare_device(settings, parallel)
    for part in (bundle.vae, bundle.image_encoder, bundle.image_projector):  # the network is copied from where it is
        part.requires_grad_(False).eval()
        if options.data == "synthetic":  # prepared clips are encoded already
            torch.nn.Module.to(part, parallel.device)
    bundle.prompt, bundle.empty = bundle.prompt.to(parallel.device), bundle.empty.to(parallel.device)
    with claimed(output, options.record(settings)) if parallel.main else nullcontext():
        if parallel.main:
            for folder in (output, output / VALIDATION, output / TRAJECTORIES):
                remove_partial(folder)
            checkpoint.clean_up(root)
            (output / STOPPED).unlink(missing_ok=True)
        parallel.wait()
        methods = make_methods(settings, bundle.index.base_scale, parallel)
        log = RunLog(output, parallel.main, options.wandb, options.record(settings))
        worlds = {} if worlds is None else worlds
        try:
            for stage in settings.stages:
                trainer = _stage(stage, methods[stage - 1], settings, options, bundle, parallel, log, guards(), worlds, validate)
                if trainer is not None and not trainer.run(settings.iterations[stage - 1], end):
                    return False
                del trainer
                gc.collect()  # networks, hooks and graphs of a stage go before the next one's are built
        except TrainingStopped as stopped:
            if parallel.main:
                write_json_durably(output / STOPPED, {"reason": str(stopped), "checkpoint": str(checkpoint.latest(root))})
            raise
        finally:
            log.close()
    return True


def _stage(
    stage: int,
    method: Method,
    settings: TrainSettings,
    options: RunOptions,
    bundle: ModelBundle,
    parallel: Parallel,
    log: RunLog,
    guards: Guards,
    worlds: Worlds,
    judge: Callable[[Trainer, str], dict[str, float]] | None,
) -> Trainer | None:
    """The trainer of a stage, restored where it was left; None for a stage that is finished."""
    root = options.output / CHECKPOINTS
    found = checkpoint.latest(root)
    state = {"stage": 0} if found is None else checkpoint.read_state(found)
    here, iterations = state["stage"] == stage, settings.iterations[stage - 1]
    # a run that was killed while it looked at the student does so now
    missed = (
        here and judge is None and _looks(options, state, iterations) and not (options.output / VALIDATION / found.name).is_dir()
    )
    missed = parallel.agree(missed)
    if (state["stage"], state.get("iteration", 0)) >= (stage, iterations) and not missed:
        return None
    first = found if found is not None else options.start
    start = None if here or first is None else starting_tensors(first)
    roles = build_roles(bundle, method, settings, parallel, start)
    source = make_source(method, settings, options, bundle, parallel, roles.teacher, worlds)
    folder, clips = options.output / VALIDATION, options.validation_clips
    if judge is None and clips and options.cadence.validate:
        validation = Validation(bundle, folder, clips, settings.times)

        def judge(trainer: Trainer, name: str) -> dict[str, float]:
            figures = validation(trainer, name, parallel.main, parallel.mesh is not None)
            log.media(f"stage{stage}", folder / name, trainer.iteration)
            return figures

    trainer = Trainer(
        stage,
        method,
        roles,
        source,
        settings,
        options.cadence,
        parallel,
        root,
        log,
        {"run": options.record(settings), "versions": versions()},
        guards,
        judge,
        samples=state.get("samples", 0),
    )
    if here and found is not None:
        trainer.restore(found)
        log.say(f"fvgen: going on from {found.name}")
        before, now = state.get("versions", {}), versions()
        other = [f"{k} {before[k]}, now {now[k]}" for k in now if k in before and before[k] != now[k]]
        if other:
            log.say(f"fvgen: warning: {found.name} was written with {'; '.join(other)}; the last bits may differ")
    if missed:
        trainer.validate()
    return trainer


def _looks(options: RunOptions, state: dict[str, Any], iterations: int) -> bool:
    """Whether held-out clips belong to this checkpoint."""
    every, at = options.cadence.validate, state["iteration"]
    return bool(options.validation_clips and every and at and not state["phase"]) and (at % every == 0 or at == iterations)


def prepare_device(settings: TrainSettings, parallel: Parallel) -> None:
    """Chooses algorithms that add in a fixed order, where that is asked for."""
    if parallel.device.type != "cuda" or not settings.repeatable:
        return
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def check_run(settings: TrainSettings, options: RunOptions, bundle: ModelBundle | None, parallel: Parallel) -> None:
    """Refuses what would end the run before its first update, while its folder is not there yet and its name is free.

    Args:
        settings, options, parallel: as in :func:`distill`.
        bundle: the teacher's model; None where it is not to be loaded, and what depends on it not looked at.

    Raises:
        UserError: a folder of another run, no data, clips or a start of another size than the teacher's, clips of another model,
            or forward calls that cannot be dealt out.
    """
    check_data(options.data)
    settings.calls(parallel.world)
    if settings.run == "causvid" and 1 in settings.stages:
        Integration(settings.times, settings.trajectory_steps, settings.guidance, settings.rescale)
    if parallel.main:  # it makes the folder while the others may still look
        check_place(options.output, options.record(settings))
    start = None if options.start is None else find_checkpoint(options.start)
    if bundle is None:
        return
    if start is not None:
        student = checkpoint.read_tensors(start, "student")
        checkpoint.check(checkpoint.module_tensors(bundle.unet), student, "student")
    if options.data != "synthetic":
        warning = check_encoder(shard_source(options.data, bundle, parallel.device).info, bundle, options.data)
        if warning and parallel.main:
            print(f"fvgen: warning: {warning}", file=sys.stderr)


def make_methods(settings: TrainSettings, base_scale: float, parallel: Parallel) -> tuple[Method, ...]:
    """The methods of the run, with the choices of the settings; ``base_scale`` is that of the teacher's schedule."""
    process = Process.create(NoiseSchedule.create(base_scale), parallel.device)
    methods: list[Method] = []
    for method in make_run(settings.run, process):
        config: Any = method.config  # type: ignore[attr-defined]
        chosen = {f.name: getattr(settings, f.name) for f in fields(config)}
        # what is None is the method's own
        config = replace(config, **{name: value for name, value in chosen.items() if value is not None})
        method = replace(method, config=config)  # type: ignore[type-var]
        if settings.normalise_weight and isinstance(method, DistributionMatching):
            method = replace(method, weight_mean=WeightMean(config.divergence))
        methods.append(method)
    return tuple(methods)
