"""``fvgen convert``: downloaded checkpoints to directories that the other commands read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fvgen.utils.errors import UserError


def run(arguments: argparse.Namespace) -> None:
    """Converts a checkpoint, or compares a converted one with its checksums."""
    if arguments.verify:
        _verify(arguments)
        return
    if arguments.checkpoint is None:
        raise UserError(f"give the checkpoint file, for example `fvgen convert {arguments.kind} FILE --output DIR`")
    if arguments.kind == "dust3r" and arguments.preset is not None:
        raise UserError("--preset belongs to viewcrafter; leave it out")
    _convert_dust3r(arguments) if arguments.kind == "dust3r" else _convert_viewcrafter(arguments)


def _verify(arguments: argparse.Namespace) -> None:
    if arguments.kind != "dust3r":
        raise UserError("--verify belongs to dust3r; a model directory is checked whenever it is read")
    from fvgen.models.dust3r import verify_dust3r

    for name, digest in verify_dust3r(arguments.output).items():
        print(f"{digest}  {name}")


def _convert_dust3r(arguments: argparse.Namespace) -> None:
    from fvgen.cli.progress import Stages
    from fvgen.io.outputs import check_output, output_directory

    source = _checkpoint(arguments.checkpoint)
    check_output(arguments.output, arguments.overwrite, source.stat().st_size)
    import torch

    from fvgen.models.dust3r import convert_dust3r, key_report, network_arguments, read_dust3r_checkpoint, write_dust3r
    from fvgen.models.dust3r.stored import file_sha256

    dtype = torch.float16 if arguments.dtype == "float16" else torch.float32
    with Stages() as stages:
        stages("read", 0.0)
        state, constructor = read_dust3r_checkpoint(source)
        digest = file_sha256(source)
        stages("convert", 0.0)
        network = convert_dust3r(state, **(network_arguments(constructor) if constructor else {}))
        keys = key_report(state, network)
        facts: dict[str, Any] = {
            "source": {"name": source.name, "sha256": digest, "constructor": constructor},
            "keys": keys,
            "parameters": sum(p.numel() for p in network.parameters()),
            "dtype": str(dtype).removeprefix("torch."),
        }
        del state
        stages("write", 0.0)
        with output_directory(arguments.output, arguments.overwrite) as folder:
            write_dust3r(network, folder, facts, dtype)
        stages("write", 1.0)
    print(f"network    {arguments.output}, {facts['parameters']:,} parameters in {facts['dtype']}")
    print(f"from       {source}, SHA-256 {digest}")
    print(f"weights    {keys['in_the_checkpoint']} in the checkpoint: {keys['converted']} converted,", end=" ")
    print(f"{keys['second_names_of_the_same_tensor']} second names of the same tensor")
    for reason, names in keys["unused"].items():
        print(f"unused     {len(names)}: {reason}")
    if keys["second_decoder_copied_from_the_first"]:
        print("copied     one decoder, which stands for both")


def _convert_viewcrafter(arguments: argparse.Namespace) -> None:
    from fvgen.cli.progress import Stages
    from fvgen.io.outputs import check_place
    from fvgen.models.bundle import INDEX_FILE

    source, output = _checkpoint(arguments.checkpoint), Path(arguments.output)
    if output.exists() and not (arguments.overwrite and (output / INDEX_FILE).is_file()):
        hint = "add --overwrite" if (output / INDEX_FILE).is_file() else "it holds something else than a model"
        raise UserError(f"the output directory {output} exists; choose another --output ({hint})")
    check_place(output)
    import torch

    from fvgen.diffusion.convert import convert_checkpoint
    from fvgen.recipes.presets import get_preset

    spec = get_preset(arguments.preset or "viewcrafter_512")
    dtype = torch.float32 if arguments.dtype == "float32" else torch.float16
    with Stages() as stages:
        stages("convert", 0.0)
        bundle = convert_checkpoint(source, spec)
        stages("write", 0.0)
        bundle.save_pretrained(output, dtype)
        stages("write", 1.0)
    index = bundle.index
    print(f"model      {output}, {sum(bundle.parameter_counts().values()):,} parameters in {str(dtype).removeprefix('torch.')}")
    print(f"from       {source}")
    print(f"clips      {index.frames} frames, {index.width}x{index.height}; a teacher of {index.steps} guided steps")


def _checkpoint(path: str) -> Path:
    source = Path(path)
    if not source.is_file():
        raise UserError(f"there is no checkpoint file {source}; check the path")
    return source
