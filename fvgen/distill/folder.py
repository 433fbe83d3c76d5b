"""The folder of a run: whose it is, that one command at a time works in it, and where its checkpoints are."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fvgen.distill import checkpoint
from fvgen.distill.settings import changed_settings
from fvgen.io.durable import is_partial, write_json_durably
from fvgen.utils.errors import UserError

RECORD, CHECKPOINTS, STOPPED, LOCK = "run.json", "checkpoints", "stopped.json", ".lock"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint of a run's folder, or the one that ``path`` is itself.

    Raises:
        UserError: it is neither.
    """
    if (path / checkpoint.STATE).is_file():
        return path
    found = checkpoint.latest(path / CHECKPOINTS) if path.is_dir() else None
    if found is None:
        raise UserError(f"{path} is neither a training run nor one of its checkpoints; give the --output of `fvgen distill`")
    return found


def starting_tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Student and, where there is one, head of an earlier stage."""
    found = find_checkpoint(path)
    trained = checkpoint.read_state(found)["trained"]
    return {role: checkpoint.read_tensors(found, role) for role in ("student", "head") if role in trained}


def read_record(output: Path) -> dict[str, Any]:
    """``run.json`` of a run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = output / RECORD
    if not path.is_file():
        raise UserError(f"{output} is not the folder of a training run: it has no {RECORD}; give the --output of `fvgen distill`")
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or choose another output directory") from error
    return record


def check_place(output: Path, record: dict[str, Any]) -> None:
    """Looks whether ``output`` can become, or is, the folder of this run.

    Raises:
        UserError: it belongs to another run or to something else.
    """
    record = json.loads(json.dumps(record))  # as it will be read back
    if (output / RECORD).is_file():
        found = read_record(output)
        other = changed_settings(found.get("settings", {}), record["settings"])
        other += [k for k in record if k != "settings" and found.get(k) != record[k]]
        if other:
            raise UserError(
                f"{output} holds a run with another {', '.join(other)}; repeat its settings or choose another --output"
            )
    elif output.exists() and not (output.is_dir() and all(_ours(path) for path in output.iterdir())):
        raise UserError(f"{output} holds something else and will not be overwritten; choose another --output")


def _ours(path: Path) -> bool:
    """What a command that was killed before it wrote the record may have left."""
    return is_partial(path) or path.name == LOCK


@contextmanager
def claimed(output: Path, record: dict[str, Any]) -> Iterator[None]:
    """Makes ``output`` the folder of this run, and keeps other commands out of it inside the block.

    Raises:
        UserError: it belongs to another run or to something else, another command works there, or it cannot be written.
    """
    check_place(output, record)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot write into {output} ({error.strerror}); choose another --output") from error
    with lock:  # the kernel gives it back, also when the process is killed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is at work in {output}; wait for it, end it, or choose another --output") from None
        except OSError:  # a file system without locks
            pass
        try:
            write_json_durably(output / RECORD, record)
        except OSError as error:
            raise UserError(f"cannot write into {output} ({error.strerror}); choose another --output") from error
        yield
