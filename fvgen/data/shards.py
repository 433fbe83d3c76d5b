"""Prepared clips on disk.

info.json                        what the set was made with; its digest stands in every shard
clips-00000.safetensors ...      one row per clip in every tensor; the header lists the clips and those rejected
constants.safetensors            what all clips share
index.json                       clips, bytes and SHA-256 of every file; written last, so that it marks a finished set
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fvgen.io.durable import remove_stale, write_durably
from fvgen.utils.errors import UserError

INFO, INDEX, CONSTANTS = "info.json", "index.json", "constants.safetensors"
CLIP_KEYS = ("clean", "render", "image_tokens", "fps", "world_from_cam", "K")
KEPT_KEYS = ("clean_rgb", "render_rgb", "coverage")
PREVIEW = "preview"
_RECORD = "record"  # the one entry of a shard's metadata: their order is not fixed
_OPEN = 256  # shards that a reader keeps mapped


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"clips-{number:05d}.safetensors"


class ShardWriter:
    """Writes the shards of a set, each whole or not at all.

    Args:
        directory: exists and holds ``info.json``.
        count: shards of the whole set.
    """

    def __init__(self, directory: Path, count: int) -> None:
        self.directory, self.count = directory, count
        self._info = hashlib.sha256((directory / INFO).read_bytes()).hexdigest()

    def done(self, number: int) -> bool:
        """Whether a shard is there, complete in length and of this set."""
        return self.record(number) is not None

    def record(self, number: int) -> dict[str, Any] | None:
        """What :meth:`write` was given about a shard, None if it has to be written."""
        try:
            record = _record(self.directory / shard_name(number))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return record if record["info"] == self._info else None

    def write(self, number: int, clips: Sequence[dict[str, Tensor]], record: dict[str, Any], extra: dict[str, Tensor]) -> None:
        """Writes a shard.

        Args:
            number: 0 .. count - 1.
            clips: the same keys and shapes in each; may be empty.
            record: JSON; goes into the header.
            extra: further tensors.
        """
        tensors = {key: torch.stack([clip[key] for clip in clips]) for key in (clips[0] if clips else ())} | extra
        text = json.dumps({"info": self._info, "number": number, "count": len(clips), **record}, sort_keys=True)
        write_durably(self.directory / shard_name(number), save(tensors, metadata={_RECORD: text}))

    def write_constants(self, tensors: dict[str, Tensor]) -> None:
        """Writes what all clips share, unless it is there."""
        if not (self.directory / CONSTANTS).is_file():
            write_durably(self.directory / CONSTANTS, save(tensors))

    def missing(self) -> list[int]:
        """Shards that are still to be written."""
        return [number for number in range(self.count) if not self.done(number)]

    def finish(self, progress: Iterable[int] | None = None) -> None:
        """Writes the index of a complete set and removes what processes that died long ago have left.

        Args:
            progress: ``range(count)``, wrapped as one likes.

        Raises:
            UserError: shards are missing.
        """
        missing = self.missing()
        if missing:
            some = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            raise UserError(f"{len(missing)} of {self.count} shards are not there yet ({some}); run the same command again")
        shards = []
        for number in progress or range(self.count):
            path = self.directory / shard_name(number)
            shards.append({"clips": _record(path)["count"], **_fingerprint(path)})
        files = [_fingerprint(self.directory / name) for name in (CONSTANTS, INFO)]
        remove_stale(self.directory)
        index = {"clips": sum(s["clips"] for s in shards), "shards": shards, "files": files}
        write_durably(self.directory / INDEX, (json.dumps(index, indent=1) + "\n").encode())


class ShardSet:
    """The clips of a finished set, read at random from memory-mapped files.

    Can be sent to the worker processes of a ``torch.utils.data.DataLoader``.

    Attributes:
        info: what the set was made with: model, size, frames, seed, versions ...
        constants: ``text_tokens [77, D]``, ``uncond_context [77 + N, D]``, float32.

    Args:
        directory: written by ``fvgen prepare``.
        keys: which tensors a clip is to have: some of ``CLIP_KEYS``, and of ``KEPT_KEYS`` if the frames were kept.

    Raises:
        UserError: no finished set, or a file of it is missing, cut short or lacks one of ``keys``.
    """

    def __init__(self, directory: str | PathLike[str], keys: Sequence[str] = CLIP_KEYS) -> None:
        self.directory, self.keys = Path(directory), tuple(keys)
        self._index = _read_json(self.directory, INDEX)
        self.info = _read_json(self.directory, INFO)
        self._shards: list[dict[str, Any]] = self._index["shards"]
        for entry in (*self._shards, *self._index["files"]):
            path = self.directory / entry["file"]
            if not path.is_file():
                raise UserError(f"{path} is missing; run `fvgen prepare` again to make it anew")
            if path.stat().st_size != entry["bytes"]:
                raise _damaged(path)
        self.constants = load_file(self.directory / CONSTANTS)
        self._ends = list(accumulate(s["clips"] for s in self._shards))
        self._mapped: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Clip ``i``.

        Returns:
            float32 ``clean``, ``render`` ``[C, T, h, w]``, ``image_tokens [N, D]``, ``world_from_cam [T, 4, 4]``, ``K [T, 3, 3]``
            and int64 scalar ``fps``; if asked for, uint8 ``clean_rgb``, ``render_rgb`` ``[T, 3, H, W]``, bool ``coverage``.
        """
        number, row = self._place(i)
        shard = self._shard(number)
        try:
            clip = {key: shard.get_slice(key)[row] for key in self.keys}
        except SafetensorError as error:
            raise UserError(f"{shard_name(number)}: {error}; frames are kept by `fvgen prepare --keep-frames` only") from None
        return {key: x.float() if x.is_floating_point() else x for key, x in clip.items()}

    def describe(self, i: int) -> dict[str, Any]:
        """Where clip ``i`` comes from and how good it is: scene, first frame, stride, coverage ..."""
        number, row = self._place(i)
        return _record(self.directory / shard_name(number))["clips"][row]

    def verify(self, progress: Iterable[dict[str, Any]] | None = None) -> None:
        """Compares the SHA-256 of every file with the index.

        Args:
            progress: :attr:`files`, wrapped as one likes.

        Raises:
            UserError: a file is damaged; the message names it.
        """
        for entry in progress or self.files:
            if _fingerprint(self.directory / entry["file"])["sha256"] != entry["sha256"]:
                raise _damaged(self.directory / entry["file"])

    @property
    def files(self) -> list[dict[str, Any]]:
        """``file``, ``bytes`` and ``sha256`` of all files."""
        return [*self._shards, *self._index["files"]]

    def _place(self, i: int) -> tuple[int, int]:
        """Shard and row of clip ``i``."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        i %= len(self)
        number = bisect_right(self._ends, i)
        return number, i - (self._ends[number - 1] if number else 0)

    def _shard(self, number: int) -> Any:
        if number not in self._mapped:
            path = self.directory / shard_name(number)
            try:
                self._mapped[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError):
                raise _damaged(path) from None
            if len(self._mapped) > _OPEN:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}


def read_previews(directory: Path, number: int) -> Tensor:
    """What the contact sheet can show of a shard that has clips, ``[P, N, 3, H, W]`` uint8."""
    with safe_open(directory / shard_name(number), framework="pt") as shard:
        return shard.get_tensor(PREVIEW)


def _record(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as shard:
        return json.loads((shard.metadata() or {})[_RECORD])


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged; delete it and run the same `fvgen prepare` again, which makes it anew")


def _read_json(directory: Path, name: str) -> Any:
    path = directory / name
    if not path.is_file():
        if (directory / INFO).is_file():
            raise UserError(f"{directory} is not finished; run the same `fvgen prepare` again, or with --finish after all parts")
        raise UserError(f"{directory} holds no prepared clips; make them with `fvgen prepare`")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run the same `fvgen prepare` with --finish") from None
