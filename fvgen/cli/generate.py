"""``fvgen generate``: photos to video."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fvgen.cli.inputs import check_photos, check_resources, count_frames, geometry_facts, takes_mixed, true_frames
from fvgen.cli.output import tell, write_outputs
from fvgen.cli.progress import Stages
from fvgen.cli.report import directory_sha256
from fvgen.explore import explore, joined
from fvgen.geometry.trajectory import parse_trajectory
from fvgen.models.bundle import read_index
from fvgen.models.prompts import check_prompt
from fvgen.pipeline import FVGenPipeline, Photos, Prepared, find_model, nearest_aspect, photo_set
from fvgen.sampling import choose_sampling
from fvgen.utils.device import choose_device
from fvgen.utils.errors import UserError
from fvgen.utils.stopwatch import Stopwatch
from fvgen.workers import Workers, workers

LITTLE = 0.25  # share of covered pixels below which most of a frame is invented


def run(arguments: argparse.Namespace) -> None:
    """Generates, writes and says where things are; of several processes the first does so."""
    with workers(choose_device(arguments.device)) as among:
        report = generate(arguments, among)
    if report is not None:
        tell(arguments, report)


def generate(arguments: argparse.Namespace, among: Workers | None = None) -> dict[str, Any] | None:
    """Generates and writes; returns the report, in the first of the processes ``among`` which it works."""
    among = among or Workers(device=choose_device(arguments.device))
    photo_sizes, model, truth, weights = among.share(lambda: _check(arguments, among.world))
    index = read_index(model)
    arguments.sampler, arguments.steps = choose_sampling(index, arguments.sampler, arguments.steps)  # for the report, too
    with Stages() if among.main else nullcontext() as stages:
        import torch

        watch = Stopwatch(torch.device(among.device), stages)
        with watch.stage("load"):
            pipeline = FVGenPipeline.from_pretrained(
                arguments.model,
                among.device,
                arguments.fast,
                arguments.geometry if among.main else "auto",
                arguments.dust3r_weights if among.main else None,
                arguments.cpu_offload,
                arguments.min_confidence,
                arguments.verify and among.main,
                arguments.prompt,
                arguments.tokenizer,
            )
            photos: Photos = photo_set(arguments.photos, takes_mixed(arguments)) if among.main else []
        how = {"steps": arguments.steps, "sampler": arguments.sampler, "seed": arguments.seed, "callback": stages}
        if arguments.then:
            arguments.then_from = arguments.then_from or "latest"
            paths = [arguments.trajectory, *arguments.then]
            clips = explore(pipeline, photos, paths, arguments.then_from, arguments.frames, **how)
            result = joined(clips, arguments.then_from)
        else:
            place = (photos, arguments.cameras, arguments.trajectory, arguments.frames)
            result = pipeline(*place, **how, clips_at_once=arguments.clips_at_once, workers=among)
        if not among.main:
            return None
        watch.timings.update(result.timings)
        prepared = result.prepared
        facts: dict[str, Any] = {
            "model": {"name": str(arguments.model), "preset": index.preset, "sha256": directory_sha256(model)},
            "fast": arguments.fast,
            **weights,
            "sizes": sizes(photo_sizes, prepared),
        }
        report = write_outputs(arguments, prepared, result.video.rgb, truth, facts, watch)
    warn(report)
    return report


def _check(arguments: argparse.Namespace, world: int) -> tuple[list[tuple[int, int]], Path, list[Path] | None, dict[str, str]]:
    """Sizes of the photos, the model's directory, the true frames, what the report says about the geometry's weights."""
    photo_sizes = check_photos(arguments)
    frames = count_frames(arguments)
    if arguments.then:
        _check_then(arguments, world)
    elif arguments.then_from:
        raise UserError("--then-from says where the paths of --then start; add --then or leave it out")
    model = find_model(arguments.model)
    index = read_index(model)
    check_prompt(model, arguments.prompt, arguments.tokenizer)
    sampler, _ = choose_sampling(index, arguments.sampler, arguments.steps)
    if arguments.fast and sampler != "few_step":
        raise UserError(f"--fast shortens the few-step sampler, not the {sampler}'s; leave it out or add --sampler few_step")
    truth = true_frames(arguments, frames)
    check_resources(arguments, photo_sizes, frames, nearest_aspect(index.sizes(), photo_sizes[0]))
    return photo_sizes, model, truth, geometry_facts(arguments)


def _check_then(arguments: argparse.Namespace, world: int) -> None:
    """Raises UserError where --then has no sense."""
    if len(arguments.photos) > 1 or arguments.cameras or arguments.truth:
        raise UserError("--then goes on from one photo without --cameras and --truth; leave the others out")
    if world > 1:
        raise UserError("with --then each clip waits for the one before; start one process")
    for spec in arguments.then:
        parse_trajectory(spec)


def sizes(photos: list[tuple[int, int]], prepared: Prepared) -> dict[str, list[int]]:
    """[W, H] of the photos, of the point maps and of the clip."""
    all_sizes = {"photos": photos[0], "geometry": prepared.scene.images.size, "clip": prepared.renders.cameras.image_size}
    return {name: [width, height] for name, (height, width) in all_sizes.items()}


def warn(report: dict[str, Any]) -> None:
    """Says on stderr what makes the result doubtful."""
    warnings = list(report["geometry"]["warnings"])
    covered = sum(report["coverage"]) / len(report["coverage"])
    if covered < LITTLE:
        warnings.append(f"points cover only {covered:.0%} of the frames; take photos closer together or choose a shorter path")
    for text in warnings:
        print(f"fvgen: warning: {text}", file=sys.stderr)
