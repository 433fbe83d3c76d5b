"""Output directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from fvgen.io.durable import partial_folder
from fvgen.utils.errors import UserError

REPORT = "report.json"  # what marks a directory as one of ours


def check_output(directory: str | PathLike[str], overwrite: bool = False, need_bytes: int = 0) -> Path:
    """The absolute path of a directory that may be written; nothing is left behind by asking.

    Args:
        directory: need not exist, nor its parents.
        overwrite: allow to replace an earlier result or an empty directory.
        need_bytes: about how much will be written.

    Raises:
        UserError: it has no name, exists and may not be replaced, cannot be written, or the disk is full.
    """
    if not os.fspath(directory):
        raise UserError("the name of the output directory is empty; give --output a name")
    path = Path(os.path.abspath(directory))
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{directory} exists and is not a directory; choose another --output")
    if path.is_dir():
        ours = (path / REPORT).is_file()
        try:
            empty = not any(path.iterdir())
        except OSError as error:
            raise UserError(
                f"the output directory {directory} cannot be read ({error.strerror}); choose another --output"
            ) from None
        if not overwrite:
            raise UserError(f"the output directory {directory} exists; choose another --output or add --overwrite")
        if not ours and not empty:
            raise UserError(
                f"{directory} holds other files than a result of fvgen and will not be overwritten; choose another --output"
            )
    check_place(path, need_bytes)
    return path


def check_place(directory: str | PathLike[str], need_bytes: int = 0) -> None:
    """Refuses a place where nothing can be written, or not so much; nothing is left behind by asking.

    Args:
        directory: need not exist, nor its parents; what it holds is not looked at.
        need_bytes: about how much will be written.

    Raises:
        UserError: see above.
    """
    path = Path(os.path.abspath(directory))
    parent = next(p for p in path.parents if p.exists())
    try:
        with partial_folder(parent / path.name):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {parent} ({error.strerror}); choose another --output") from None
    free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise UserError(
            f"the disk of {parent} has {free / 1e6:.0f} MB left and about {need_bytes / 1e6:.0f} MB are needed; free some space"
        )


@contextmanager
def output_directory(directory: str | PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory beside its later place: renamed at the end of the block, removed if the block fails.

    An earlier result is replaced only then, so that a failure keeps it. What killed processes have left beside it is removed once
    there is a newer result.

    Raises:
        UserError: as :func:`check_output`, or the disk filled up meanwhile.
    """
    path = check_output(directory, overwrite)
    with parent_folders(path), partial_folder(path) as partial:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _swap(partial, path)


@contextmanager
def parent_folders(path: Path) -> Iterator[None]:
    """Makes the folders above a place; those that were not there go again if the block fails.

    Raises:
        UserError: the disk filled up in the block.
    """
    made = [p for p in reversed(path.absolute().parents) if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for folder in reversed(made):
            try:
                folder.rmdir()
            except OSError:
                break
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: writing {path} failed; free some space or choose another --output") from None
        raise


def _swap(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
        return
    with partial_folder(path) as old:
        try:
            os.rename(path, old)  # onto the empty directory
            os.rename(partial, path)
        except BaseException:
            if not path.exists():
                os.rename(old, path)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
