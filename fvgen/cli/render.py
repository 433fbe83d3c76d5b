"""``fvgen render``: photos to point-cloud renders."""

from __future__ import annotations

import argparse

import torch

from fvgen.cli.generate import sizes, warn
from fvgen.cli.inputs import check_photos, check_resources, count_frames, geometry_facts, takes_mixed, true_frames
from fvgen.cli.output import tell, write_outputs
from fvgen.cli.progress import Stages
from fvgen.estimators import make_estimator
from fvgen.pipeline import photo_set, prepare
from fvgen.utils.device import choose_device
from fvgen.utils.stopwatch import Stopwatch


def run(arguments: argparse.Namespace) -> None:
    """Renders, writes and says where things are."""
    photo_sizes = check_photos(arguments)
    frames = count_frames(arguments)
    device = choose_device(arguments.device)
    truth = true_frames(arguments, frames)
    check_resources(arguments, photo_sizes, frames, arguments.size or (448, 448))
    weights = geometry_facts(arguments)
    with Stages() as stages:
        watch = Stopwatch(torch.device(device), stages)
        with watch.stage("load"):
            photos = photo_set(arguments.photos, takes_mixed(arguments))
            estimator = make_estimator(
                arguments.geometry, arguments.dust3r_weights, device, min_confidence=arguments.min_confidence
            )
        prepared = prepare(
            photos,
            arguments.cameras,
            arguments.trajectory,
            arguments.frames,
            arguments.size,
            device,
            stages,
            estimator=estimator,
            compositor=arguments.compositor,
            radius=arguments.radius,
            points_per_pixel=arguments.points_per_pixel,
        )
        watch.timings.update(prepared.timings)
        facts = {"sizes": sizes(photo_sizes, prepared), **weights}
        report = write_outputs(arguments, prepared, None, truth, facts, watch)
    warn(report)
    tell(arguments, report)
