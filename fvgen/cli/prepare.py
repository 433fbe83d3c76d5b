"""``fvgen prepare``: clips with cameras to training data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fvgen import envs
from fvgen.cli.report import directory_sha256, versions
from fvgen.data.prepare import Settings, finish_set, open_set, read_plan, write_part
from fvgen.models.bundle import read_index
from fvgen.pipeline import find_model
from fvgen.utils.device import choose_device, take_gpu
from fvgen.utils.errors import UserError


def run(arguments: argparse.Namespace) -> None:
    """Plans, writes this process's share, and finishes the set if it was the last one."""
    output = Path(arguments.output)
    if arguments.verify:
        from fvgen.data.shards import ShardSet

        found = ShardSet(output)
        found.verify(_bar(found.files, "verify"))
        print(f"{len(found)} clips in {len(found.files)} files are as they were written")
    elif arguments.finish:
        _finish(output)
    else:
        try:
            _write(arguments, output)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("finished shards are kept, the same command goes on") from None


def _write(arguments: argparse.Namespace, output: Path) -> None:
    if arguments.folder is None:
        raise UserError("FOLDER is missing; give the folder that holds the clips (see `fvgen prepare --help`)")
    folder, model = Path(arguments.folder), find_model(arguments.model)
    part, device = _share(arguments)
    settings = _settings(arguments, model)
    plan = open_set(folder, output, settings, versions(), _bar)

    from fvgen.data.encode import PairEncoder
    from fvgen.data.prepare import DTYPES
    from fvgen.data.shards import ShardWriter
    from fvgen.models.bundle import ModelBundle

    encoder = PairEncoder(ModelBundle.from_pretrained(model, device), DTYPES[settings.dtype], settings.keep_frames)
    counts = write_part(folder, output, plan, encoder, part, _bar)
    if counts:
        told = ", ".join(f"{number} {what}" for what, number in counts.most_common())
        print(f"this part      {told}")
    missing = ShardWriter(output, plan.shards).missing()
    if missing:
        print(f"{len(missing)} of {plan.shards} shards are left to the other parts; the last one to end writes the index")
    else:
        _finish(output)


def _share(arguments: argparse.Namespace) -> tuple[tuple[int, int], str]:
    """(i, n) of this process, and its device: processes of one machine take one GPU each."""
    try:
        rank, world, local = envs.launched() or (0, 1, 0)
    except ValueError as error:
        raise UserError(f"{error}; unset them or start the processes with torchrun") from None
    device = choose_device(arguments.device)
    if device == "cuda":
        import torch

        device = take_gpu(local % torch.cuda.device_count())
    return arguments.part or (rank, world), device


def _settings(arguments: argparse.Namespace, model: Path) -> Settings:
    from fvgen.data.pairs import Limits

    index = read_index(model)
    sizes = index.sizes()
    if arguments.portrait and len(sizes) == 1:
        raise UserError(f"the model {arguments.model} makes no upright clips; leave --portrait out")
    return Settings(
        model={"preset": index.preset, "sha256": directory_sha256(model)},
        size=sizes[-1] if arguments.portrait else sizes[0],
        frames=arguments.frames or index.frames,
        compositor=index.compositor,
        max_stride=arguments.max_stride,
        clips_per_scene=arguments.clips_per_scene,
        clips_per_shard=arguments.clips_per_shard,
        seed=arguments.seed,
        geometry=arguments.geometry,
        dtype=arguments.dtype,
        keep_frames=arguments.keep_frames,
        limits=Limits(arguments.min_coverage, arguments.min_psnr, arguments.min_angle, arguments.max_jump),
    )


def _finish(output: Path) -> None:
    report = finish_set(output, read_plan(output), _bar)
    clips = report["clips"]
    print(f"clips          {output}  {clips['written']} written, {clips['rejected']} rejected")
    for reason, number in sorted(report["reasons"].items(), key=lambda item: -item[1]):
        print(f"  {number:>6} {reason}")
    print(f"report         {output / 'report.md'}")
    print(f"contact sheet  {output / 'contact_sheet.png'}")


def _bar(items: Iterable[Any], what: str) -> Iterable[Any]:
    """A bar on a terminal, now and then a line in a log."""
    from tqdm import tqdm

    return tqdm(items, desc=what, delay=1.0, mininterval=0.1 if sys.stderr.isatty() else 30.0, file=sys.stderr)
