"""The clips of a stage: synthetic or prepared ones, with the teacher's trajectories where it is a regression on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fvgen.diffusion.predict import PredictV
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.data import ShardSource, Source
from fvgen.distill.methods import Method, OdeRegression
from fvgen.distill.options import RunOptions
from fvgen.distill.parallel import Parallel
from fvgen.distill.settings import TrainSettings
from fvgen.distill.synthetic import Reuse, SyntheticSource
from fvgen.distill.trajectories import Integration, TrajectorySource
from fvgen.models.bundle import ModelBundle
from fvgen.models.digest import encoder_digest
from fvgen.utils.errors import UserError

TRAJECTORIES = "trajectories"
# synthetic clips by all that they depend on, beside the model
Worlds = dict[tuple[Reuse, int, int], SyntheticSource]


def make_source(
    method: Method,
    settings: TrainSettings,
    options: RunOptions,
    bundle: ModelBundle,
    parallel: Parallel,
    teacher: PredictV,
    worlds: Worlds | None = None,
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
        key = (reuse, settings.batch, settings.seed)
        if key not in worlds:
            worlds[key] = SyntheticSource(bundle, settings.batch, reuse, settings.seed, options.compile)
        source = worlds[key]
    else:
        source = shard_source(options.data, bundle, parallel.device)
    if not regression:
        return source
    how = Integration(settings.times, settings.trajectory_steps, settings.guidance, settings.rescale)
    schedule, cache = NoiseSchedule.create(index.base_scale), options.output / TRAJECTORIES
    return TrajectorySource(source, settings.trajectories, teacher, schedule, how, cache, settings.seed, settings.micro_batch)


def shard_source(data: str, bundle: ModelBundle, device: torch.device) -> ShardSource:
    """The clips of a folder, for batches on ``device``.

    Raises:
        UserError: they have another size than those of the model.
    """
    index, factor = bundle.index, 2 ** (len(bundle.vae.config.block_out_channels) - 1)
    shapes = [(index.latent_channels, index.frames, height // factor, width // factor) for height, width in index.sizes()]
    projector = bundle.image_projector.config
    tokens = projector.num_queries * (projector.frames or 1)
    return ShardSource(data, device, shapes, (len(bundle.prompt) + tokens, bundle.prompt.shape[-1]))


def check_encoder(info: dict[str, Any], bundle: ModelBundle, data: str) -> str | None:
    """Whether prepared clips are latents of this model; a warning where their set does not say so.

    Args:
        info: of the set.
        bundle: the teacher's model.
        data: folder of the set.

    Raises:
        UserError: they were encoded by another model.
    """
    model = info.get("model")
    digest = model.get("encoder") if isinstance(model, dict) else None
    if digest is None:
        return f"the clips in {data} do not say which model encoded them; make sure that it was this teacher's"
    if digest != encoder_digest(bundle):
        raise UserError(
            f"the clips in {data} were encoded by another model than this teacher: VAE, image branch or prompts differ; give the "
            "model of `fvgen prepare --model` to --teacher, or prepare them again with the teacher"
        )
    return None
