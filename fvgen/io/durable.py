"""Files that are there whole or not at all, even if the machine dies."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path

from fvgen.utils.errors import UserError

STALE_S = 3600
_MARK = ".partial-"


def write_durably(path: Path, data: bytes, keep: bool = False) -> None:
    """Writes beside the place, to the disk, then renames; several processes may do so at once.

    Args:
        path: in an existing folder; is replaced.
        data: its content.
        keep: an earlier file stays instead: of several writers the first one wins.

    Raises:
        UserError: the disk is full.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}{_MARK}", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        _link(name, path) if keep else os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: writing {path} failed; free some space and run the same command again") from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def _link(name: str, path: Path) -> None:
    try:
        os.link(name, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(name, path)
    Path(name).unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a file is in work in :func:`write_durably`, or was left by a process that died there."""
    return path.name.startswith(".") and _MARK in path.name


def remove_stale(folder: Path) -> None:
    """Removes what dead processes have left: partial files that nobody has touched for ``STALE_S`` seconds."""
    for path in folder.iterdir():
        if is_partial(path) and time.time() - path.stat().st_mtime > STALE_S:
            path.unlink(missing_ok=True)
