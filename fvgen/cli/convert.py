"""``fvgen convert``: downloaded checkpoints to directories that the other commands read."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvgen.cli.progress import Stages
from fvgen.utils.errors import UserError

_MARGIN = 2**20  # bytes of all files but the weights


def run(arguments: argparse.Namespace) -> None:
    """Converts a checkpoint, or compares a converted one with its checksums."""
    if arguments.kind == "dust3r" and arguments.variant is not None:
        raise UserError("--variant belongs to viewcrafter; leave it out")
    if arguments.kind == "dust3r" and arguments.keep_text_tower:
        raise UserError("--keep-text-tower belongs to viewcrafter; leave it out")
    if arguments.verify:
        _verify(arguments)
        return
    if arguments.checkpoint is None:
        raise UserError(f"give the checkpoint file, for example `fvgen convert {arguments.kind} FILE --output DIR`")
    _convert_dust3r(arguments) if arguments.kind == "dust3r" else _convert_viewcrafter(arguments)


def _verify(arguments: argparse.Namespace) -> None:
    if arguments.kind == "dust3r":
        from fvgen.models.dust3r import verify_dust3r as verify
    else:
        from fvgen.models.bundle import verify_model as verify

    for name, digest in verify(arguments.output).items():
        print(f"{digest}  {name}")


def _convert_dust3r(arguments: argparse.Namespace) -> None:
    from fvgen.io.outputs import check_output, check_place, output_directory

    source = _checkpoint(arguments.checkpoint)
    overwrite = arguments.overwrite or _empty(Path(arguments.output))
    check_output(arguments.output, overwrite)
    import torch

    from fvgen.models.dust3r import convert_dust3r, key_report, network_arguments, read_dust3r_checkpoint, write_dust3r
    from fvgen.models.tensor_files import stored_bytes

    dtype = getattr(torch, arguments.dtype or "float32")
    with Stages() as stages:
        stages("read", 0.0)
        state, constructor = read_dust3r_checkpoint(source)
        network = convert_dust3r(state, None, **(network_arguments(constructor) if constructor is not None else {}))
        size = stored_bytes(network.state_dict(), dtype)
        check_place(arguments.output, size + _MARGIN)
        digest = _source_sha256(source, stages)
        keys = key_report(state, network)
        facts: dict[str, Any] = {
            "source": {"name": source.name, "sha256": digest, "constructor": constructor},
            "keys": keys,
            "parameters": sum(p.numel() for p in network.parameters()),
            "dtype": str(dtype).removeprefix("torch."),
        }
        del state
        stages("write", 0.0)
        with output_directory(arguments.output, overwrite) as folder:
            write_dust3r(network, folder, facts, dtype, _counter(stages, "write", 2 * size))
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
    from fvgen.io.outputs import check_place
    from fvgen.models.bundle import INDEX_FILE

    source, output = _checkpoint(arguments.checkpoint), Path(arguments.output)
    if output.exists() and not _empty(output) and not (arguments.overwrite and (output / INDEX_FILE).is_file()):
        hint = "add --overwrite" if (output / INDEX_FILE).is_file() else "it holds something else than a model"
        raise UserError(f"the output directory {output} exists; choose another --output ({hint})")
    check_place(output)
    import torch

    from fvgen.diffusion.convert import convert_checkpoint
    from fvgen.models.card import model_card
    from fvgen.recipes.presets import get_preset

    variant = arguments.variant or "512"
    spec = get_preset(f"viewcrafter_{variant}")
    dtype = getattr(torch, arguments.dtype or "float16")
    with Stages() as stages:
        stages("read", 0.0)
        bundle = convert_checkpoint(source, spec, arguments.keep_text_tower)
        check_place(output, bundle.stored_bytes(dtype) + _MARGIN)
        digest = _source_sha256(source, stages)
        index = bundle.index
        card = model_card("viewcrafter", source.name, digest, f"{variant}: {_clips(index)}", dtype)
        stages("write", 0.0)
        bundle.save_pretrained(output, dtype, card, lambda share: stages("write", share))
        stages("write", 1.0)
    print(f"model      {output}, {sum(bundle.parameter_counts().values()):,} parameters in {str(dtype).removeprefix('torch.')}")
    print(f"from       {source}, SHA-256 {digest}")
    print(f"clips      {_clips(index)}; a teacher of {index.steps} guided steps")


def _clips(index: Any) -> str:
    return f"{index.frames} frames, {index.width}x{index.height}"


def _source_sha256(source: Path, stages: Stages) -> str:
    """SHA-256 of the checkpoint, whose own checksums are compared, too."""
    from fvgen.models.weights_file import checked_sha256

    stages("check", 0.0)
    passes = 2 if zipfile.is_zipfile(source) else 1
    return checked_sha256(source, _counter(stages, "check", passes * source.stat().st_size))


def _counter(stages: Stages, stage: str, total: int) -> Callable[[int], None]:
    """Reports the share of a stage's bytes; its end is left to the caller, who knows it."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        stages(stage, min(done / total, 0.999))

    return count


def _empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _checkpoint(path: str) -> Path:
    source = Path(path)
    if not source.is_file():
        raise UserError(f"there is no checkpoint file {source}; check the path")
    return source
