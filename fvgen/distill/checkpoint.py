"""Checkpoints of a run: folders of safetensors and JSON that appear whole, and a pointer to the latest.

A folder is written under another name, flushed to the disk and renamed; then the pointer is replaced; only then are old ones
removed. So whenever a process is killed, the pointer leads to a complete checkpoint.

Tensors are stored whole, whatever the layout of the run: the first rank collects and writes them, every rank reads its own share.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fvgen.distill.parallel import Parallel, put, whole
from fvgen.io.durable import flush, remove_partial, write_durably
from fvgen.utils.errors import UserError

LATEST, STATE = "latest", "state.json"
_PART, _OLD = ".part-", ".old-"


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name, as they are held here."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def save(
    root: Path, name: str, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int, parallel: Parallel
) -> None:
    """Writes ``root/name`` and points ``root/latest`` to it. Every rank must call it.

    Args:
        root: folder of the checkpoints.
        name: of this one; names sort by age.
        files: tensors of each ``FILE.safetensors``.
        state: plain JSON.
        keep: how many of the newest stay.
        parallel: the ranks.
    """
    from safetensors.torch import save_file

    part = root / f"{_PART}{name}"
    if parallel.main:
        clean_up(root)
        part.mkdir(parents=True)
    for file, tensors in files.items():
        collected = {}
        for key, x in tensors.items():
            full = whole(x.detach())
            if parallel.main:
                collected[key] = full.cpu().contiguous()
        if parallel.main:
            save_file(collected, part / f"{file}.safetensors")
    if parallel.main:
        (part / STATE).write_text(json.dumps(state, indent=1) + "\n")
        for path in [*part.iterdir(), part]:
            flush(path)
        if (root / name).exists():  # of a run that was killed before it pointed there
            _remove(root / name)
        os.rename(part, root / name)
        flush(root)
        write_durably(root / LATEST, f"{name}\n".encode())
        for old in _complete(root)[:-keep]:
            if old.name != name:
                _remove(old)
    parallel.wait()


def latest(root: Path) -> Path | None:
    """The checkpoint to go on from; None where there is none.

    Raises:
        UserError: the pointer leads nowhere.
    """
    if not (root / LATEST).is_file():
        return None
    path = root / (root / LATEST).read_text().strip()
    if not (path / STATE).is_file():
        found = ", ".join(p.name for p in _complete(root)) or "none"
        raise UserError(f"{root / LATEST} names {path.name}, which is not there; write one of these into it: {found}")
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON of a checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE} cannot be read ({error}); go back to an earlier checkpoint") from error


def read_tensors(checkpoint: Path, file: str) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU.

    Raises:
        UserError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(checkpoint / f"{file}.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint / file}.safetensors cannot be read ({error}); go back to an earlier checkpoint") from error


def check(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError where names or shapes of stored tensors are not those of the tensors held here."""
    wrong = sorted({*targets} ^ {*tensors}) or sorted(k for k in targets if targets[k].shape != tensors[k].shape)
    if wrong:
        raise UserError(f"the {what} of the checkpoint does not fit the model: {wrong[0]} differs; use the teacher of that run")


def restore(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies stored tensors into those held here.

    Raises:
        UserError: their names or shapes differ.
    """
    check(targets, tensors, what)
    for key, target in targets.items():
        put(target, tensors[key])


def clean_up(root: Path) -> None:
    """Removes what killed processes left half written or half removed."""
    remove_partial(root)
    for path in root.iterdir() if root.is_dir() else ():
        if path.name.startswith((_PART, _OLD)):
            shutil.rmtree(path, ignore_errors=True)


def _complete(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _remove(path: Path) -> None:
    """First out of the way, in one step: half a folder must not look like a checkpoint."""
    old = path.with_name(f"{_OLD}{path.name}")
    os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)
