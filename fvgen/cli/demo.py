"""``fvgen demo``: the bundled example."""

from __future__ import annotations

import argparse
from pathlib import Path

import fvgen
from fvgen.cli.generate import generate
from fvgen.cli.output import tell
from fvgen.cli.parser import build_parser
from fvgen.utils.errors import UserError

EXAMPLE = Path(fvgen.__file__).parent / "assets" / "example"


def run(arguments: argparse.Namespace) -> None:
    """Generates the example's frames from its two photos and compares them with the true ones."""
    cameras = EXAMPLE / "transforms.json"
    if not cameras.is_file():
        raise UserError("this installation lacks the bundled example; install fvgen again")
    photos = sorted(str(p) for p in (EXAMPLE / "photos").iterdir())
    frames = len(list((EXAMPLE / "frames").iterdir()))
    # the file lists the photos first, then the frames
    path = f"cameras:{cameras}:{len(photos)}-{len(photos) + frames - 1}"
    command = ["generate", *photos, "--cameras", str(cameras), "--trajectory", path, "--truth", str(EXAMPLE / "frames")]
    command += ["--device", arguments.device, "--seed", str(arguments.seed), "--output", str(arguments.output)]
    command += ["--overwrite"] if arguments.overwrite else []
    full = build_parser().parse_args(command)
    report = generate(full)
    assert report is not None  # one process
    tell(full, report)
