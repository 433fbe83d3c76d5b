"""Reads a downloaded checkpoint file as plain tensors, without running anything in it, and says what is wrong with others."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.io.digests import file_sha256
from fvgen.utils.errors import UserError

HOLDERS = ("state_dict", "module", "model")  # Lightning's, DeepSpeed's and DUSt3R's name of the weights in a file
_MARKS = {"viewcrafter": re.compile(r"(.{16})?model\.diffusion_model\."), "dust3r": re.compile(r"(enc|dec)_blocks\d?\.\d")}
_TITLES = {"viewcrafter": "ViewCrafter", "dust3r": "DUSt3R"}
_CHUNK = 2**22


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file.

    Attributes:
        path: of the file.
        holder: one of ``HOLDERS``, or "" where the file holds nothing but weights.
        tensors: on the CPU, under the file's names; mapped into memory where the format allows it.
        rest: what else the file holds.
    """

    path: Path
    holder: str
    tensors: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)


def read_weights(path: str | os.PathLike[str], kind: str) -> WeightsFile:
    """The weights of a safetensors or PyTorch file.

    Args:
        path: a safetensors file must be named so.
        kind: "viewcrafter" or "dust3r": what the weights are expected to be of.

    Raises:
        UserError: there is no such file, it is damaged, holds something else or objects that could run code.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no checkpoint file {file}; check the path")
    _check_beginning(file)
    if file.suffix == ".safetensors":
        found = WeightsFile(file, "", _safetensors(file))
    else:
        content = _unpickled(file)
        if not isinstance(content, Mapping):
            raise UserError(f"{file} holds a {type(content).__name__}, not weights; give the checkpoint file of {_TITLES[kind]}")
        holder = next((name for name in HOLDERS if isinstance(content.get(name), Mapping)), "")
        rest = {key: value for key, value in content.items() if key != holder} if holder else {}
        found = WeightsFile(file, holder, dict(content[holder] if holder else content), rest)
    _check_tensors(found, kind)
    _check_kind(found, kind)
    return found


def checked_sha256(path: Path, read: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file whose own checksums are compared, too: a PyTorch file is a zip archive and has one for every tensor.

    Args:
        path: of the file.
        read: called with the number of bytes of every piece that was read; a zip archive is read twice.

    Raises:
        UserError: a checksum differs.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                try:
                    with archive.open(record) as stream:
                        while piece := stream.read(_CHUNK):
                            if read is not None:
                                read(len(piece))
                except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
                    raise UserError(f"{path} is damaged at {record.filename} ({error}); download it again") from None
    return file_sha256(path, read)


def _check_beginning(file: Path) -> None:
    """Refuses what a download often leaves instead of a file."""
    with file.open("rb") as stream:
        start = stream.read(512).lstrip()
    if not start:
        raise UserError(f"{file} is empty; download it again")
    if re.match(rb"<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        raise UserError(f"{file} is a web page, not a checkpoint; download the file itself again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a pointer of Git LFS, not the checkpoint itself; get that with `git lfs pull`")
    if start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(file):
        raise UserError(f"{file} is cut short ({file.stat().st_size / 1e6:.1f} MB are there); download it again")


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({_first_line(error)}); download it again") from None


def _unpickled(file: Path) -> Any:
    zipped = zipfile.is_zipfile(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DUSt3R's arguments; it holds values only
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        if name := _needs_code(file, error, zipped):
            raise UserError(
                f"{file} needs the Python object {name}, which could run code when it is loaded, so that it cannot be read as "
                "plain weights; load it where you trust it and save its weights as safetensors"
            ) from None
        reason = "no checkpoint of PyTorch" if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        raise UserError(f"{file} cannot be read as plain weights ({reason}); download it again") from None


def _needs_code(file: Path, error: Exception, zipped: bool) -> str:
    """The object that keeps a file from being read as plain weights, "" where that is not the reason."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    if zipped:
        try:
            allowed = f"{argparse.Namespace.__module__}.{argparse.Namespace.__qualname__}"
            names = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(file) if name != allowed]
            if names:
                return names[0]
        except Exception:
            pass  # then the message may tell
    match = re.search(r"(?:GLOBAL|global:?|class|function) ([\w.]+\.[\w.]+)", str(error))
    return match[1].rstrip(".") if match else ""


def _check_tensors(found: WeightsFile, kind: str) -> None:
    if not found.tensors:
        raise UserError(f"{found.path} holds no weights; give the checkpoint file of {_TITLES[kind]}")
    for key, value in found.tensors.items():
        where = f"under {found.holder!r}" if found.holder else "at its top"
        if not isinstance(key, str):
            raise UserError(f"{found.path} has the name {key!r} {where}, which is no text; give the file of {_TITLES[kind]}")
        if not isinstance(value, Tensor):
            lacking = "" if found.holder else f", and none of {', '.join(HOLDERS)}"
            raise UserError(
                f"{found.path} has {key!r} {where}, which is a {type(value).__name__} and no tensor{lacking}; give "
                f"the checkpoint file of {_TITLES[kind]}"
            )
        if value.layout != torch.strided or value.is_quantized or not value.is_floating_point():
            what = "quantised" if value.is_quantized else f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise UserError(f"the weight {key} in {found.path} is not of plain floating-point numbers ({what}); get the original")


def _check_kind(found: WeightsFile, kind: str) -> None:
    """Refuses the weights of the other model, which its names tell."""
    kinds = [name for name, mark in _MARKS.items() if any(mark.match(key) for key in found.tensors)]
    if kinds and kind not in kinds:
        raise UserError(f"{found.path} is a checkpoint of {_TITLES[kinds[0]]}; use `fvgen convert {kinds[0]} {found.path}`")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
