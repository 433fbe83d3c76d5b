"""Arguments of ``fvgen convert``."""

from __future__ import annotations

import argparse

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
VARIANTS = ("512", "1024")


def dtype_name(text: str) -> str:
    """PyTorch's name of a number format, of which the short name is understood, too."""
    name = DTYPES.get(text, text)
    if name not in DTYPES.values():
        raise argparse.ArgumentTypeError(f"must be {', '.join(DTYPES)}, or {', '.join(DTYPES.values())}, not {text!r}")
    return name


def variant(text: str) -> str:
    """Width of ViewCrafter's clips, also of a preset's name such as ``viewcrafter_512``."""
    name = text.removeprefix("viewcrafter_")
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"must be {' or '.join(VARIANTS)}, not {text!r}")
    return name


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them to a parser."""
    parser.add_argument("kind", choices=("dust3r", "viewcrafter"), help="what the checkpoint is of")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="the downloaded file: .pth, .ckpt or .safetensors")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--variant",
        "--preset",
        type=variant,
        metavar="512|1024",
        help="viewcrafter: 512 for 16 frames of 320 x 512, 1024 for 25 of 576 x 1024; the preset's name will do (default: 512)",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        metavar="bf16|fp16|fp32",
        help="of the stored weights, long names will do (default: fp32 for dust3r, fp16 for viewcrafter)",
    )
    parser.add_argument(
        "--keep-text-tower", action="store_true", help="viewcrafter: also store what prompts of your own need (0.7 GB in fp16)"
    )
    parser.add_argument("--verify", action="store_true", help="only compare a finished --output with its checksums")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --output")
