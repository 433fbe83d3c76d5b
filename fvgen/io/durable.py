"""Files that are there whole or not at all, even if the machine dies; folders, if the process does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fvgen.utils.errors import UserError

STALE_S = 3600
_MARK = ".partial-"


@contextmanager
def durable_file(path: Path, keep: bool = False) -> Iterator[Path]:
    """Yields a name beside the place; what the block writes there goes to the disk and is renamed.

    Several processes may do so at once. If the block fails, its file is removed and an earlier one stays.

    Args:
        path: in an existing folder; is replaced.
        keep: an earlier file stays instead: of several writers the first one wins.

    Raises:
        UserError: the disk is full.
    """
    part = path.with_name(f".{path.name}{_MARK}{secrets.token_hex(6)}")
    try:
        yield part
        flush(part)
        _link(part, path) if keep else os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: writing {path} failed; free some space and run the same command again") from None
        raise
    flush(path.parent)  # the new name, too


def write_durably(path: Path, data: bytes, keep: bool = False) -> None:
    """Makes ``data`` the content of a file, see :func:`durable_file`."""
    with durable_file(path, keep) as part:
        part.write_bytes(data)


def write_json_durably(path: Path, value: Any, indent: int = 1) -> None:
    """Makes ``value`` as JSON the content of a file, see :func:`durable_file`."""
    write_durably(path, (json.dumps(value, indent=indent) + "\n").encode())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a place for a folder that becomes ``path`` at the end of the block; if that fails, an earlier one stays.

    Args:
        path: in an existing folder; a file or folder there is replaced.
    """
    with partial_folder(path) as work:
        new, old = work / "new", work / "old"
        try:
            yield new
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` for work on it; what is under that name at the end of the block is removed.

    The folder is locked as long as this process lives. So the end of the block can also remove what killed processes have left of
    such folders, but only once something is at ``path``: before that, they may hold all that is left of it.

    Args:
        path: in an existing folder; need not be there.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
        with _locked(folder, wait=True):
            if not folder.exists():  # somebody saw it before it was locked, and took it for a dead process's
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                if path.exists():
                    _remove_dead(path)
            return


def flush(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(part, path)
    part.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process now has the lock of a folder. The system takes it back when the process dies, however it dies."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except OSError:  # another has it, the folder is gone, or its file system knows no locks
        held = False
    try:
        yield held
    finally:
        if handle is not None:
            os.close(handle)


def _remove_dead(path: Path) -> None:
    """Removes the :func:`partial_folder` s of ``path`` that nobody holds; never an error."""
    with suppress(OSError):
        for left in path.parent.iterdir():
            if is_partial(left) and left.is_dir() and left.name[1:].rpartition(_MARK)[0] == path.name:
                with _locked(left) as dead:
                    if dead:
                        shutil.rmtree(left, ignore_errors=True)


def is_partial(path: Path) -> bool:
    """Whether a file or folder is in work here, or was left by a process that was killed then."""
    return path.name.startswith(".") and _MARK in path.name


def remove_partial(folder: Path) -> None:
    """Removes what killed processes have left in a folder that one process at a time writes, such as that of a training run.

    A folder that was being replaced, and was out of its place already, gets its new content.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_partial(path):
            continue
        place = path.with_name(path.name[1:].rpartition(_MARK)[0])
        if (path / "old").exists() and (path / "new").exists() and not place.exists():
            os.replace(path / "new", place)  # it is whole: the old one leaves only then
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Removes what killed processes left where others may be at work: files that nobody has touched for ``STALE_S`` seconds."""
    for path in folder.iterdir():
        if is_partial(path) and path.is_file() and time.time() - path.stat().st_mtime > STALE_S:
            path.unlink(missing_ok=True)
