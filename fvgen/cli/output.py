"""What generate and render write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fvgen.cli.report import write_report
from fvgen.evaluation.clip import compare, frames_to_score, nearer_photo
from fvgen.geometry.resize import fit, fit_cameras
from fvgen.io import read_images, write_ply, write_transforms
from fvgen.io.contact_sheet import write_contact_sheet
from fvgen.io.outputs import output_directory
from fvgen.io.video import write_frames, write_video
from fvgen.pipeline import Prepared
from fvgen.utils.stopwatch import Stopwatch


def write_outputs(
    arguments: argparse.Namespace,
    prepared: Prepared,
    video: Tensor | None,
    truth_files: Sequence[Path] | None,
    facts: dict[str, Any],
    watch: Stopwatch,
) -> dict[str, Any]:
    """Writes the output directory and returns the report.

    Args:
        arguments: of the command.
        prepared: photos, geometry and renders.
        video: ``[T, 3, H, W]`` generated frames, None after ``fvgen render``.
        truth_files: true frame of every frame.
        facts: what the report says beyond ``prepared``.
        watch: takes the time of the writing.
    """
    renders, scene = prepared.renders, prepared.scene
    size = renders.cameras.image_size
    truth = None if truth_files is None else fit(read_images(truth_files), None, size)[0].rgb
    shown = {"generated": video, "render": renders.rgb}
    clips = {name: clip for name, clip in shown.items() if clip is not None}
    if truth is not None:
        # the nearest camera, not the nearest frame: a path need not lead through the photos
        photo_cameras = fit_cameras(scene.photo_cameras, size)
        copies = prepared.photos[nearer_photo(renders.cameras, photo_cameras)]
        scored = frames_to_score(len(renders.rgb), prepared.photo_frames)
        facts = {**facts, "psnr_db": compare({**clips, "nearer_photo": copies}, truth, renders.coverage, scored)}
    rows = [("input photos", prepared.photos), ("point-cloud renders", renders.rgb)]
    rows += [("generated frames", video)] if video is not None else []
    rows += [("true frames", truth)] if truth is not None else []
    with output_directory(arguments.output, arguments.overwrite) as out:
        with watch.stage("write"):
            if video is not None:
                write_frames(out / "frames", video)
                write_video(out / "video.mp4", video, arguments.fps)
            write_frames(out / "renders", renders.rgb)
            write_video(out / "render.mp4", renders.rgb, arguments.fps)
            write_contact_sheet(out / "contact_sheet.png", [(label, frames.cpu()) for label, frames in rows])
            folder = "renders" if video is None else "frames"
            names = [f"{folder}/{i:04d}.png" for i in range(len(renders.cameras))]
            write_transforms(out / "cameras.json", renders.cameras.to("cpu"), names)
            write_ply(out / "points.ply", *scene.cloud())
        return write_report(out / "report.json", arguments, prepared, facts, watch.timings)


def tell(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Where things are, and how good they are."""
    root = Path(arguments.output)
    width, height = report["sizes"]["clip"]
    count = f"{report['frames']} frames, {width}x{height}"
    generated = "model" in report
    lines = [("video", root / "video.mp4", count), ("frames", root / "frames", "")] if generated else []
    lines += [
        ("renders", root / "render.mp4", "the point cloud before the model" if generated else count),
        ("contact sheet", root / "contact_sheet.png", "everything in one picture"),
        ("cameras", root / "cameras.json", ""),
        ("point cloud", root / "points.ply", ""),
        ("report", root / "report.json", f"{sum(report['run']['timings_s'].values()):.1f} s in all"),
    ]
    wide = max(len(str(path)) for _, path, _ in lines)
    for name, path, note in lines:
        print(f"{name:<14} {path!s:<{wide}}  {note}".rstrip())
    scores = report.get("psnr_db")
    if scores:
        print(f"\nPSNR against the true frames, mean of {len(scores['frames'])} frames between the photos:")
        for key, label in (
            ("generated", "generated"),
            ("render", "point-cloud render"),
            ("nearer_photo", "nearer photo, copied"),
        ):
            if key in scores:
                whole, covered = (_decibel(scores[k]["mean"]) for k in (key, f"{key}_covered"))
                print(f"  {label:<21} {whole:>8}   (on covered pixels {covered})")


def _decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} dB"
