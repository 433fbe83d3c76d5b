"""Arguments of every command. Nothing heavy is imported here, so that --help is instant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from fvgen import __version__
from fvgen.cli.argument_types import between, part, positive, size, whole
from fvgen.cli.convert_arguments import convert_arguments
from fvgen.cli.texts import BENCH, CONVERT, DISTILL, EXPORT, GENERATE, PREPARE, RENDER
from fvgen.utils.errors import UserError


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`)")


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
        "--model",
        default="tiny",
        metavar="NAME|DIR",
        help="tiny or its tiny_teacher (bundled), or a model directory (default: tiny)",
    )
    generate.add_argument(
        "--steps",
        type=whole(1, 1000),
        metavar="N",
        help="sampling steps per clip (default: what the model was made for: 4 for tiny, 50 for a teacher)",
    )
    generate.add_argument(
        "--sampler",
        choices=("few_step", "teacher"),
        help="few_step for a distilled model, teacher for DDIM with the model's guidance (default: what the model was made for)",
    )
    generate.add_argument(
        "--fast", action="store_true", help="few_step: approximate every second step, quicker and a little less exact"
    )
    generate.add_argument(
        "--then",
        nargs="+",
        metavar="SPEC",
        help="with one photo: more camera paths, a clip each; frames of the clips before become photos for the geometry",
    )
    generate.add_argument(
        "--then-from",
        choices=("latest", "photo"),
        help="where they start: at the end of the clip before, or at the photo (default: latest)",
    )
    generate.add_argument(
        "--clips-at-once",
        type=whole(1, 256),
        metavar="N",
        help="clips between photos that are generated together (default: by their size, four of 16 frames of 320 x 512)",
    )
    generate.add_argument(
        "--cpu-offload",
        action="store_true",
        help="for GPUs with little memory: keep on the CPU what a stage does not need; slower",
    )
    generate.add_argument("--prompt", metavar="TEXT", help="for a model with its text tower (default: what it was trained with)")
    generate.add_argument("--tokenizer", metavar="DIR", help="files of CLIP's tokenizer, for --prompt")
    generate.add_argument(
        "--verify", action="store_true", help="first compare the files of the model, and of DUSt3R, with their checksums"
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

    convert = command("convert", "convert", "a downloaded checkpoint to a directory that the other commands read", CONVERT)
    convert_arguments(convert)

    command(
        "doctor",
        "doctor",
        "show what is installed, which kernels run and what to do about the rest",
        "example:\n  fvgen doctor\n",
    )

    _bench(command("bench", "bench", "measure speed, compare with an earlier result, or make a report", BENCH))

    _prepare(command("prepare", "prepare", "clips with cameras to training data", PREPARE))

    train = command(
        "train-tiny",
        "train_tiny",
        "train the tiny model's autoencoder and teacher on the synthetic world",
        "examples:\n  fvgen train-tiny --output teacher\n"
        "  fvgen train-tiny --vae-steps 20 --steps 20 --output trial      to see that it runs\n",
    )
    train.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the run; one that is there is continued. The model is DIR/model"
    )
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

    _distill(command("distill", "distill", "train a few-step student from a teacher, or go on with it", DISTILL))

    export = command("export-student", "export_student", "make a model directory of a trained student", EXPORT)
    export.add_argument("run", metavar="RUN", help="the --output of fvgen distill, or one of its checkpoints")
    export.add_argument("--output", required=True, metavar="DIR", help="model directory to write")
    export.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the running average of the weights, or the weights themselves (default: the average)",
    )
    export.add_argument("--teacher", metavar="NAME|DIR", help="where the other networks are now (default: where they were)")
    export.add_argument(
        "--teacher-share",
        type=between(0, 1),
        default=0.0,
        metavar="PART",
        help="part of the teacher in the weights, such as 0.05: softer frames, higher PSNR (default: 0)",
    )
    export.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="precision of the stored weights (default: float16)"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an earlier model in --output")
    return parser


def _distill(parser: argparse.ArgumentParser) -> None:
    recipes = ("tiny", "viewcrafter_512", "viewcrafter_1024")
    methods = ("fvgen", "stage_one_only", "no_stage_one", "reverse_kl", "dmd2", "causvid")
    parser.add_argument("--recipe", choices=recipes, default="tiny", help="size of the networks (default: tiny)")
    parser.add_argument("--method", choices=methods, default="fvgen", help="see below (default: fvgen)")
    parser.add_argument("--output", required=True, metavar="RUN", help="folder of the run; one that is there is continued")
    parser.add_argument(
        "--teacher", default="tiny_teacher", metavar="NAME|DIR", help="a model directory, or the bundled tiny_teacher (default)"
    )
    parser.add_argument(
        "--data",
        default="synthetic",
        metavar="synthetic|DIR",
        help="the synthetic world or a folder of shards (default: synthetic)",
    )
    parser.add_argument("--stage", type=whole(1, 2), metavar="N", help="only this stage (default: all of the method)")
    parser.add_argument(
        "--from", dest="start", metavar="RUN", help="a run or checkpoint whose student and classifier the first stage starts from"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and how much memory it takes")

    length = parser.add_argument_group("length")
    length.add_argument(
        "--iterations", nargs="+", type=whole(1, 10**8), metavar="N", help="student updates, per stage (default: the recipe's)"
    )
    length.add_argument("--minutes", type=positive(1e5), metavar="MIN", help="end after so long, with a checkpoint")
    length.add_argument("--batch", type=whole(1, 2**16), metavar="N", help="clips per update, over all GPUs")
    length.add_argument("--micro-batch", type=whole(1, 2**16), metavar="N", help="clips per forward call; more calls add up")

    choices = parser.add_argument_group("choices of the method (default: the recipe's)")
    choices.add_argument(
        "--lr", type=positive(1.0), metavar="X", help="learning rate of all networks (default: the recipe's, 5e-5 at full size)"
    )
    choices.add_argument("--fake-lr", type=positive(1.0), metavar="X", help="of the fake score alone (default: the recipe's)")
    choices.add_argument("--head-lr", type=positive(1.0), metavar="X", help="of the classifier's head (default: the recipe's)")
    choices.add_argument(
        "--lead", type=whole(0, 10**6), metavar="N", help="first iterations of a stage in which only the critics learn"
    )
    choices.add_argument("--warmup", type=whole(0, 10**6), metavar="N", help="iterations in which the learning rates rise")
    choices.add_argument("--ema", type=positive(0.999999), metavar="X", help="decay of the student's average (default: 0.999)")
    choices.add_argument("--steps", type=whole(1, 64), metavar="N", help="steps of the student (default: 4)")
    choices.add_argument("--inputs", choices=("real", "rollout"), help="noisy real clips, or states of the student's own sampler")
    choices.add_argument("--critic-updates", type=whole(1, 100), metavar="N", help="per update of the student (default: 5)")
    choices.add_argument("--guidance", type=positive(100.0), metavar="W", help="of the teacher, 1 for none")
    choices.add_argument("--rescale", type=positive(1.0), metavar="X", help="guidance rescale of the teacher")
    choices.add_argument(
        "--divergence",
        choices=("softened_rkl", "reverse_kl", "jensen_shannon", "forward_kl", "neyman"),
        help="of stage 2 (default: the method's)",
    )
    choices.add_argument(
        "--set",
        dest="overrides",
        action="append",
        metavar="NAME=VALUE",
        help="any other setting, such as r1_weight=0.1 or score_span=0.02,0.98; may be repeated (docs/training.md has the list)",
    )
    choices.add_argument(
        "--window", type=whole(1, 10**6), default=1024, metavar="N", help="synthetic: clips kept (default: 1024)"
    )
    choices.add_argument("--reuse", type=whole(1, 10**6), default=16, metavar="N", help="synthetic: uses of a clip (default: 16)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--shard", action="store_true", help="share the networks among the GPUs (FSDP2) instead of copying them")
    machine.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute activations twice to save memory (default: all but tiny)",
    )
    machine.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="replay CUDA graphs (default: the recipe's)",
    )
    machine.add_argument("--not-repeatable", action="store_true", help="allow faster algorithms whose last bits vary")

    logs = parser.add_argument_group("what is left behind")
    logs.add_argument("--log-every", type=whole(1, 10**6), default=20, metavar="N", help="iterations (default: 20)")
    logs.add_argument("--checkpoint-every", type=whole(1, 10**6), default=500, metavar="N", help="iterations (default: 500)")
    logs.add_argument(
        "--checkpoint-minutes", type=positive(1e5), default=15.0, metavar="MIN", help="and when the last is older (default: 15)"
    )
    logs.add_argument("--keep", type=whole(1, 10**6), default=3, metavar="N", help="checkpoints that stay (default: 3)")
    logs.add_argument(
        "--validate-every", type=whole(0, 10**6), default=500, metavar="N", help="iterations, 0 never (default: 500)"
    )
    logs.add_argument("--validation-clips", type=whole(0, 64), default=4, metavar="N", help="held-out clips (default: 4)")
    logs.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    _common(parser)


def _inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="two or more photos of one size, in the order in which neighbours overlap; with DUSt3R one suffices",
    )
    parser.add_argument(
        "--cameras",
        metavar="FILE",
        help="known cameras of the photos: transforms.json (nerfstudio) or a COLMAP model folder (default: estimated)",
    )
    parser.add_argument(
        "--geometry",
        choices=("auto", "classical", "dust3r"),
        default="auto",
        help="classical (features and stereo), dust3r, or auto: dust3r where --dust3r-weights are given (default: auto)",
    )
    parser.add_argument("--dust3r-weights", metavar="DIR", help="written by `fvgen convert dust3r`")
    parser.add_argument(
        "--min-confidence",
        type=between(1, 1e9),
        metavar="X",
        help="dust3r: pixels at or below it get no point; its values are above 1 (default: 1.1, the logarithm of 3)",
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


def _prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="captures with cameras, at any depth below it")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the shards; an unfinished one is continued")
    parser.add_argument(
        "--model",
        default="tiny",
        metavar="NAME|DIR",
        help="encodes the clips: tiny (bundled) or a directory (default: tiny)",
    )
    parser.add_argument("--frames", type=whole(3, 64), metavar="N", help="frames of a clip (default: the model's)")
    parser.add_argument("--portrait", action="store_true", help="make upright clips, where the model knows them")
    parser.add_argument(
        "--max-stride", type=whole(1, 64), default=4, metavar="N", help="take every 1st to N-th frame of a capture (default: 4)"
    )
    parser.add_argument(
        "--clips-per-scene", type=whole(1, 10**6), default=4, metavar="N", help="different clips tried per capture (default: 4)"
    )
    parser.add_argument(
        "--clips-per-shard", type=whole(1, 10**5), default=32, metavar="N", help="clips tried per file (default: 32)"
    )
    parser.add_argument(
        "--geometry",
        choices=("auto", "depth", "stereo", "dust3r"),
        default="auto",
        help="depth of the end frames from files, stereo, dust3r, or auto: depth where there is some, otherwise dust3r where "
        "--dust3r-weights are given, otherwise stereo (default: auto)",
    )
    parser.add_argument("--dust3r-weights", metavar="DIR", help="written by `fvgen convert dust3r`")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of stored latents (default: float16)"
    )
    parser.add_argument("--keep-frames", action="store_true", help="also store the pixels of photos and renders")
    for option, kind, default, text in (
        ("--min-coverage", between(0, 1), 0.2, "share of pixels between the end frames that points cover"),
        ("--min-psnr", between(0, 100), 12.0, "PSNR of the renders on those pixels, dB; below it the geometry is wrong"),
        ("--min-angle", between(0, 180), 1.0, "angle between the end cameras' views of a point, degrees"),
    ):
        parser.add_argument(option, type=kind, default=default, metavar="X", help=f"at least this {text} (default: {default:g})")
    parser.add_argument(
        "--max-jump",
        type=between(1, 1e9),
        default=8.0,
        metavar="X",
        help="reject clips whose camera makes a step longer than X median ones (default: 8)",
    )
    parser.add_argument(
        "--part", type=part, metavar="I/N", help="do the I-th of N shares (default: RANK and WORLD_SIZE, set by torchrun, or all)"
    )
    parser.add_argument("--finish", action="store_true", help="only write index and report, after all parts are done")
    parser.add_argument("--verify", action="store_true", help="only compare a finished --output with its checksums")
    _common(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    suites = ("kernels", "raster", "dust3r", "sampler", "train", "speedup", "views", "all", "report")
    parser.add_argument("suite", choices=suites, metavar="SUITE", help=", ".join(suites))
    parser.add_argument("results", nargs="*", default=[], metavar="RESULT", help="for report: result files to show together")
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
        help="sampler, speedup, views: tiny, a model directory, or viewcrafter_512 or viewcrafter_1024 with random weights"
        " (default: tiny); train: a step of the distillation of one of these presets, instead of the tiny teacher's",
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
        help="sampler, speedup: DDIM steps of the teacher (default: 50)",
    )
    step = parser.add_argument_group("train with --model")
    step.add_argument("--stage", choices=("1", "2", "both"), help="of the distillation (default: both)")
    step.add_argument("--shard", action="store_true", help="under torchrun: the GPUs share the networks (FSDP2)")
    step.add_argument("--single", metavar="FILE.json", help="under torchrun: the result of one GPU, for the scaling")
    step.add_argument("--profile", metavar="FILE.md", help="write here where the GPU's time goes in stage 2")
    step.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute activations twice to save memory (default: the recipe's)",
    )
    step.add_argument(
        "--graphs", action=argparse.BooleanOptionalAction, default=None, help="replay CUDA graphs (default: the recipe's)"
    )
    step.add_argument("--not-repeatable", action="store_true", help="allow faster algorithms whose last bits vary")
    step.add_argument("--no-reference", action="store_true", help="leave out stage 2 in plain PyTorch")
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
