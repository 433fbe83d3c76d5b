"""Arguments of every command. Nothing heavy is imported here, so that --help is instant."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fvgen import __version__
from fvgen.utils.errors import UserError

MAX_SIDE = 4096

TRAJECTORIES = """\
camera paths (--trajectory):
  smooth                     twice differentiable path through all photos (default)
  interp                     ViewCrafter's interpolation through all photos
  orbit:deg=20               from a photo around the scene's centre, degrees, positive to the right
  spiral:deg=8,turns=1       a loop around a photo that looks at the scene's centre
  dolly:forward=0.2          along the viewing axis, in fractions of the median depth
  target:phi=10,theta=5,r=0.1,x=0,y=0
                             ViewCrafter's relative target: degrees, fraction of the centre depth, pixels
  txt:FILE                   ViewCrafter's text file with a line each of phi, theta and r values
  cameras:FILE               the cameras of a transforms.json or COLMAP model, in the world of --cameras
  cameras:FILE:FIRST-LAST    only these of them, counted from 0, both included
orbit, spiral, dolly and target take photo=N, the photo to start from, counted from 0.
"""

GENERATE = f"""\
examples:
  fvgen generate left.jpg right.jpg --output room
  fvgen generate a.jpg b.jpg c.jpg --frames 16 --seed 3 --output walk     31 frames: neighbours share the photo between them
  fvgen generate a.jpg b.jpg --cameras transforms.json --output known     cameras known, for example from COLMAP
  fvgen generate a.jpg b.jpg --trajectory orbit:deg=15 --output orbit

{TRAJECTORIES}
written to --output:
  video.mp4, frames/0000.png ...    the generated frames
  render.mp4, renders/0000.png ...  the point-cloud renders they were made from
  contact_sheet.png                 photos, renders and generated frames in one picture
  cameras.json                      camera of every frame (transforms.json format)
  points.ply                        the coloured point cloud
  report.json                       settings, versions, timings, figures about geometry and quality
"""

RENDER = f"""\
examples:
  fvgen render left.jpg right.jpg --output room
  fvgen render a.jpg b.jpg --size 1024x576 --trajectory dolly:forward=0.3 --output dolly
  fvgen render images/0000.jpg images/0015.jpg --cameras transforms.json \\
      --trajectory cameras:transforms.json:0-15 --truth images --output check     compare with the true frames

{TRAJECTORIES}
written to --output: render.mp4, renders/0000.png ..., contact_sheet.png, cameras.json, points.ply, report.json
"""

BENCH = """\
examples:
  fvgen bench kernels --json kernels.json            every operator at its real shapes, beside torch.compile
  fvgen bench kernels --ops geglu group_norm_silu    two of them
  fvgen bench sampler --model viewcrafter_512 --batch 1 2 4
  fvgen bench sampler --runner modules               without the inference engine
  fvgen bench speedup                                4 steps against 50 guided ones: less than 90 % saved is a failure
  fvgen bench all --quick                            every suite with small shapes, also without a GPU
  fvgen bench all --json new.json --compare old.json
  fvgen bench report new.json --output docs/benchmarks

suites:
  kernels   operators: time, share of the measured copy bandwidth, reference, torch.compile, libraries
  raster    point rasterizer over points, views, points per pixel, image size; image and gradients
  sampler   one clip stage by stage and whole, first clip of a new process, batches, the teacher
  train     a training step of the tiny model
  speedup   guided teacher and four-step student from points to frames in one process
  all       all of these
  report    tables and pictures of result files; give the files right behind the word

exit status: 0 done, 1 a figure worse than with --compare by more than 5 %, or less than 90 %
saved (not judged with --quick), 2 bad input.
Figures count only from an otherwise idle GPU. Its settings are never changed; clocks and throttling are recorded.
"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`)")


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argument type: whole numbers from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return value

    return parse


def positive(high: float) -> Callable[[str], float]:
    """An argument type: numbers above 0 and up to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= high:
            raise argparse.ArgumentTypeError(f"must be a number above 0 and up to {high:g}, not {text!r}")
        return value

    return parse


def size(text: str) -> tuple[int, int]:
    """``WxH`` to (H, W)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and all(16 <= int(v) <= MAX_SIDE for v in (width, height))):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT with 16 to {MAX_SIDE} pixels a side, not {text!r}")
    return int(height), int(width)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``fvgen``; the parsed arguments name the module whose ``run`` does the work."""
    parser = _Parser(
        prog="fvgen",
        description="A few photographs of a place to a video that moves between them.",
        epilog="`fvgen COMMAND --help` explains a command. Start with `fvgen demo`.",
    )
    parser.add_argument("--version", action="version", version=f"fvgen {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def command(name: str, module: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog)
        sub.set_defaults(module=f"fvgen.cli.{module}")
        return sub

    generate = command("generate", "generate", "photos to video", GENERATE)
    _inputs(generate)
    generate.add_argument(
        "--model", default="tiny", metavar="NAME|DIR", help="tiny (bundled) or a model directory (default: tiny)"
    )
    generate.add_argument(
        "--steps", type=whole(1, 1000), default=4, metavar="N", help="sampling steps per clip (default: 4; teacher: try 50)"
    )
    generate.add_argument(
        "--sampler",
        choices=("few_step", "teacher"),
        default="few_step",
        help="few_step for a distilled model, teacher for DDIM with guidance (default: few_step)",
    )
    generate.add_argument(
        "--fast", action="store_true", help="few_step: approximate every second step, quicker and a little less exact"
    )
    _outputs(generate)

    render = command("render", "render", "photos to point-cloud renders along the path, without a model", RENDER)
    _inputs(render)
    render.add_argument(
        "--size", type=size, metavar="WxH", help="pixels of a render (default: the photos scaled to a long side of 448)"
    )
    render.add_argument(
        "--compositor", choices=("norm", "alpha"), default="norm", help="how the points of a pixel are blended (default: norm)"
    )
    render.add_argument(
        "--radius",
        type=positive(1.0),
        default=0.01,
        metavar="R",
        help="radius of a point in units of half the shorter side of the image (default: 0.01)",
    )
    render.add_argument(
        "--points-per-pixel", type=whole(1, 64), default=10, metavar="N", help="nearest points blended in a pixel (default: 10)"
    )
    _outputs(render)

    demo = command("demo", "demo", "generate the bundled example and compare it with its true frames", "example:\n  fvgen demo\n")
    demo.add_argument("--output", default="demo", metavar="DIR", help="directory to write (default: demo)")
    _common(demo)
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")

    command(
        "doctor",
        "doctor",
        "show what is installed, which kernels run and what to do about the rest",
        "example:\n  fvgen doctor\n",
    )

    _bench(command("bench", "bench", "measure speed, compare with an earlier result, or make a report", BENCH))

    train = command(
        "train-tiny",
        "train_tiny",
        "train the tiny model's autoencoder and teacher on the synthetic world",
        "examples:\n  fvgen train-tiny --output teacher\n"
        "  fvgen train-tiny --vae-steps 20 --steps 20 --output trial      to see that it runs\n",
    )
    train.add_argument("--output", required=True, metavar="DIR", help="model directory to write")
    for option, what in (("vae", "autoencoder"), ("teacher", "denoiser")):
        steps = ("--vae-steps",) if option == "vae" else ("--steps", "--teacher-steps")
        train.add_argument(
            *steps,
            dest=f"{option}_steps",
            type=whole(1, 10**8),
            metavar="N",
            help=f"training steps of the {option} ({what}) (default: its own)",
        )
        train.add_argument(
            f"--{option}-minutes", type=positive(1e5), metavar="MIN", help=f"stop training the {option} after so many minutes"
        )
    _common(train)
    return parser


def _inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "photos", nargs="+", metavar="PHOTO", help="two or more photos of one size, in the order in which neighbours overlap"
    )
    parser.add_argument(
        "--cameras",
        metavar="FILE",
        help="known cameras of the photos: transforms.json (nerfstudio) or a COLMAP model folder (default: estimated)",
    )
    parser.add_argument("--trajectory", default="smooth", metavar="SPEC", help="camera path, see below (default: smooth)")
    parser.add_argument(
        "--frames", type=whole(2, 64), default=16, metavar="N", help="frames from one photo to the next, with both (default: 16)"
    )
    parser.add_argument(
        "--truth",
        metavar="DIR",
        help="folder with the true frames to compare with: one per frame in name order, or named as in cameras:FILE",
    )


def _bench(parser: argparse.ArgumentParser) -> None:
    suites = ("kernels", "raster", "sampler", "train", "speedup", "all", "report")
    parser.add_argument("suite", choices=suites, metavar="SUITE", help=", ".join(suites))
    parser.add_argument("results", nargs="*", metavar="RESULT", help="for report: result files to show together")
    parser.add_argument("--json", metavar="FILE", help="write the records here, each as soon as it is measured")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier --json")
    parser.add_argument("--compare", metavar="OLD.json", help="an earlier result; fails where a figure got worse by over 5 %%")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=whole(1, 10000), metavar="N", help="readings per time (default: the suite's own)")
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="kernels: only these operators (see `fvgen doctor`)")
    parser.add_argument("--first", action="store_true", help="kernels: only the first of each operator's shapes")
    parser.add_argument("--no-compile", action="store_true", help="kernels: leave torch.compile out, it takes longest")
    parser.add_argument(
        "--model",
        metavar="NAME|DIR",
        help="sampler, speedup: tiny, a model directory, or viewcrafter_512 or viewcrafter_1024 with random weights"
        " (default: tiny)",
    )
    parser.add_argument(
        "--runner",
        choices=("engine", "modules"),
        help="sampler, speedup: the inference engine with CUDA graphs, or the networks' modules (default: engine)",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=whole(1, 256),
        metavar="N",
        help="sampler, speedup: clips at once, stages are measured at the first (default: 1; sampler up to 512: 1 4 8)",
    )
    parser.add_argument(
        "--teacher-steps",
        type=whole(1, 1000),
        metavar="N",
        help="sampler, speedup: DDIM steps of the teacher (default: 50; sampler beyond 512: no teacher)",
    )
    parser.add_argument("--output", metavar="DIR", help="report: where report.md and its pictures go (default: docs/benchmarks)")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda or cuda:N (default: auto)"
    )


def _outputs(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument(
        "--fps", type=whole(1, 240), default=10, metavar="N", help="frames per second of the videos (default: 10)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier result in --output, once the new one is there"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="the same seed gives the same result (default: 0)"
    )


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The named arguments that were given a value."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
