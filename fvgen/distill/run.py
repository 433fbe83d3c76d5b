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
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fvgen.diffusion.predict import PredictV
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill import checkpoint
from fvgen.distill.comparison import make_run
from fvgen.distill.configs import MatchingConfig, RegressionConfig
from fvgen.distill.data import ShardSource, Source, check_data
from fvgen.distill.guards import Guards, TrainingStopped
from fvgen.distill.logs import RunLog
from fvgen.distill.methods import DistributionMatching, Method, OdeRegression
from fvgen.distill.parallel import Parallel
from fvgen.distill.roles import build_roles
from fvgen.distill.rollout import Process
from fvgen.distill.settings import Cadence, TrainSettings, changed_settings
from fvgen.distill.synthetic import Reuse, SyntheticSource
from fvgen.distill.trainer import Trainer
from fvgen.distill.trajectories import Integration, TrajectorySource
from fvgen.distill.validation import Validation
from fvgen.distill.weight_mean import WeightMean
from fvgen.io.durable import is_partial, remove_partial, write_json_durably
from fvgen.models.bundle import ModelBundle
from fvgen.utils.errors import UserError

RECORD, CHECKPOINTS, STOPPED = "run.json", "checkpoints", "stopped.json"
VALIDATION, TRAJECTORIES = "validation", "trajectories"


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beyond its settings; none of it changes what is computed.

    Attributes:
        output: folder of the run; an earlier run in it is continued.
        teacher: name or folder of the teacher, for the record.
        data: "synthetic" or a folder of shards.
        start: a run or a checkpoint whose student and head the first trained stage starts from.
        cadence: how often what happens.
        minutes: end this call after so long, with a checkpoint; None for no limit.
        validation_clips: held-out clips.
        reuse: of synthetic clips; it does change which clips are seen, and is recorded.
        wandb: log to Weights & Biases too.
        compile: fuse the ray caster of the synthetic world with torch.compile.
    """

    output: Path
    teacher: str
    data: str = "synthetic"
    start: Path | None = None
    cadence: Cadence = field(default_factory=Cadence)
    minutes: float | None = None
    validation_clips: int = 4
    reuse: Reuse = field(default_factory=Reuse)
    wandb: bool = False
    compile: bool = False

    def record(self, settings: TrainSettings) -> dict[str, Any]:
        """What a continued run must agree with."""
        return {
            "settings": settings.to_dict(),
            "teacher": self.teacher,
            "data": self.data,
            "start": None if self.start is None else str(self.start),
            "reuse": vars(self.reuse),
        }


def distill(
    settings: TrainSettings,
    options: RunOptions,
    bundle: ModelBundle,
    parallel: Parallel,
    guards: Callable[[], Guards] = Guards,
    worlds: dict[Reuse, SyntheticSource] | None = None,
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
    check_data(options.data)
    prepare_device(settings, parallel)
    for part in (bundle.vae, bundle.image_encoder, bundle.image_projector):  # the network is copied from where it is
        torch.nn.Module.to(part, parallel.device).requires_grad_(False).eval()
    bundle.prompt, bundle.empty = bundle.prompt.to(parallel.device), bundle.empty.to(parallel.device)
    check_fit(settings, options, bundle, parallel)
    if parallel.main:
        claim(output, options.record(settings))
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
    worlds: dict[Reuse, SyntheticSource],
    judge: Callable[[Trainer, str], dict[str, float]] | None,
) -> Trainer | None:
    """The trainer of a stage, restored where it was left; None for a stage that is finished."""
    root = options.output / CHECKPOINTS
    found = checkpoint.latest(root)
    state = {"stage": 0} if found is None else checkpoint.read_state(found)
    if (state["stage"], state.get("iteration", 0)) >= (stage, settings.iterations[stage - 1]):
        return None
    here = state["stage"] == stage
    before = found if found is not None else options.start
    start = None if here or before is None else starting_tensors(before)
    roles = build_roles(bundle, method, settings, parallel, start)
    source = make_source(method, settings, options, bundle, parallel, roles.teacher, worlds)
    folder, clips = options.output / VALIDATION, options.validation_clips
    if judge is None and clips and options.cadence.validate:
        validation = Validation(bundle, folder, clips, settings.times)

        def judge(trainer: Trainer, name: str) -> dict[str, float]:
            return validation(trainer, name, parallel.main, parallel.mesh is not None)

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
        {"run": options.record(settings)},
        guards,
        judge,
        samples=state.get("samples", 0),
    )
    if here and found is not None:
        trainer.restore(found)
        log.say(f"fvgen: going on from {found.name}")
    return trainer


def prepare_device(settings: TrainSettings, parallel: Parallel) -> None:
    """Chooses algorithms that add in a fixed order, where that is asked for."""
    if parallel.device.type != "cuda" or not settings.repeatable:
        return
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def check_fit(settings: TrainSettings, options: RunOptions, bundle: ModelBundle, parallel: Parallel) -> None:
    """Refuses what would end the run before its first update, while its folder is not there yet and its name is free.

    Raises:
        UserError: clips or a start of another size than the teacher's, or forward calls that cannot be dealt out.
    """
    settings.calls(parallel.world)
    if options.start is not None:
        student = checkpoint.read_tensors(find_checkpoint(options.start), "student")
        checkpoint.check(checkpoint.module_tensors(bundle.unet), student, "student")
    if options.data != "synthetic":
        shard_source(options.data, bundle, parallel.device)


def make_methods(settings: TrainSettings, base_scale: float, parallel: Parallel) -> tuple[Method, ...]:
    """The methods of the run, with the choices of the settings; ``base_scale`` is that of the teacher's schedule."""
    process = Process.create(NoiseSchedule.create(base_scale), parallel.device)
    methods: list[Method] = []
    for method in make_run(settings.run, process):
        config: Any = replace(method.config, times=settings.times)  # type: ignore[attr-defined]
        if not isinstance(config, RegressionConfig):
            updates = config.critic_updates if settings.critic_updates is None else settings.critic_updates
            config = replace(config, inputs=settings.inputs, critic_updates=updates)
        if isinstance(config, MatchingConfig):
            divergence = settings.divergence or config.divergence
            config = replace(config, guidance=settings.guidance, rescale=settings.rescale, divergence=divergence)
        method = replace(method, config=config)  # type: ignore[type-var]
        if settings.normalise_weight and isinstance(method, DistributionMatching):
            method = replace(method, weight_mean=WeightMean(all_mean=parallel.mean))
        methods.append(method)
    return tuple(methods)


def make_source(
    method: Method,
    settings: TrainSettings,
    options: RunOptions,
    bundle: ModelBundle,
    parallel: Parallel,
    teacher: PredictV,
    worlds: dict[Reuse, SyntheticSource] | None = None,
) -> Source:
    """The clips of a stage, with the teacher's trajectories where it is a regression on them.

    Synthetic clips of an earlier stage are in ``worlds`` and are not rendered again; those of this one are added.
    """
    worlds = {} if worlds is None else worlds
    regression = isinstance(method, OdeRegression)
    index = bundle.index
    source: Source
    if options.data == "synthetic":
        # trajectories are drawn in any order, so they have one orientation
        reuse = replace(options.reuse, portrait_share=0.0) if regression else options.reuse
        if reuse not in worlds:
            worlds[reuse] = SyntheticSource(bundle, settings.batch, reuse, settings.seed, options.compile)
        source = worlds[reuse]
    else:
        source = shard_source(options.data, bundle, parallel.device)
    if not regression:
        return source
    how = Integration(settings.times, settings.trajectory_steps, settings.guidance, settings.rescale)
    schedule, cache = NoiseSchedule.create(index.base_scale), options.output / TRAJECTORIES
    return TrajectorySource(source, settings.trajectories, teacher, schedule, how, cache, settings.seed, settings.micro_batch)


def shard_source(data: str, bundle: ModelBundle, device: torch.device) -> ShardSource:
    """The clips of a folder.

    Raises:
        UserError: they have another size than those of the model, which is on ``device``.
    """
    index, factor = bundle.index, 2 ** (len(bundle.vae.config.block_out_channels) - 1)
    shape = (index.latent_channels, index.frames, index.height // factor, index.width // factor)
    photo = torch.zeros(1, 3, index.height, index.width, device=device)
    with torch.no_grad():
        tokens = bundle.image_projector(bundle.image_encoder(photo)).shape[1]
    return ShardSource(data, device, shape, (len(bundle.prompt) + tokens, bundle.prompt.shape[-1]))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint of a run's folder, or the one that ``path`` is itself.

    Raises:
        UserError: it is neither.
    """
    if (path / checkpoint.STATE).is_file():
        return path
    found = checkpoint.latest(path / CHECKPOINTS) if path.is_dir() else None
    if found is None:
        raise UserError(f"{path} is neither a training run nor one of its checkpoints; give the --output of `fvgen distill`")
    return found


def starting_tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Student and, where there is one, head of an earlier stage."""
    found = find_checkpoint(path)
    trained = checkpoint.read_state(found)["trained"]
    return {role: checkpoint.read_tensors(found, role) for role in ("student", "head") if role in trained}


def read_record(output: Path) -> dict[str, Any]:
    """``run.json`` of a run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = output / RECORD
    if not path.is_file():
        raise UserError(f"{output} is not the folder of a training run: it has no {RECORD}; give the --output of `fvgen distill`")
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or choose another output directory") from error
    return record


def claim(output: Path, record: dict[str, Any]) -> None:
    """Makes ``output`` the folder of this run.

    Raises:
        UserError: it belongs to another run or to something else.
    """
    record = json.loads(json.dumps(record))  # as it will be read back
    if (output / RECORD).is_file():
        found = read_record(output)
        other = changed_settings(found.get("settings", {}), record["settings"])
        other += [k for k in record if k != "settings" and found.get(k) != record[k]]
        if other:
            raise UserError(
                f"{output} holds a run with another {', '.join(other)}; repeat its settings or choose another --output"
            )
    elif output.exists() and not (output.is_dir() and all(map(is_partial, output.iterdir()))):
        raise UserError(f"{output} holds something else and will not be overwritten; choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json_durably(output / RECORD, record)
    except OSError as error:
        raise UserError(f"cannot write into {output} ({error.strerror}); choose another --output") from error
