"""SHA-256 of files, and of all files of a folder in a list that ``sha256sum -c`` understands, too."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from fvgen.utils.errors import UserError

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")
_CHUNK = 2**22


def file_sha256(path: str | os.PathLike[str], read: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file.

    Args:
        path: of the file.
        read: called with the number of bytes of every piece that was read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            if read is not None:
                read(len(piece))
    return digest.hexdigest()


def write_sums(root: Path, read: Callable[[int], None] | None = None) -> dict[str, str]:
    """Writes the list of a folder's files, however deep, and returns it: ``{name relative to the folder: digest}``.

    Args:
        root: the folder.
        read: see :func:`file_sha256`.
    """
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != SUMS_FILE and not p.name.startswith("."))
    digests = {file.relative_to(root).as_posix(): file_sha256(file, read) for file in files}
    (root / SUMS_FILE).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()), encoding="utf-8")
    return digests


def read_sums(root: Path) -> dict[str, str]:
    """The list of a folder's files.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        lines = (root / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{root} has no {SUMS_FILE} to compare its files with; convert or save it again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{root / SUMS_FILE} cannot be read ({error}); convert or save the folder again") from None
    matches = [_LINE.fullmatch(line) for line in lines]
    if not matches or None in matches:
        raise UserError(f"{root / SUMS_FILE} is damaged: it must have a line of digest and name for every file; convert again")
    return {match[2]: match[1] for match in matches if match is not None}


def verify_sums(root: Path, needed: Iterable[str]) -> dict[str, str]:
    """Compares the files of a folder with their list and returns it.

    Args:
        root: the folder.
        needed: names that have to be in the list: all that is going to be read.

    Raises:
        UserError: a file differs, is missing, or is not in the list.
    """
    listed = read_sums(root)
    if unlisted := [name for name in needed if name not in listed]:
        raise UserError(f"{root / SUMS_FILE} says nothing about {unlisted[0]}, which is needed; convert or save the folder again")
    for name, digest in listed.items():
        file = root / name
        if not file.is_file():
            raise UserError(f"{file} is missing; copy the folder again, or convert the checkpoint again")
        if file_sha256(file) != digest:
            raise UserError(f"{file} differs from its checksum; copy the folder again, or convert the checkpoint again")
    return listed
