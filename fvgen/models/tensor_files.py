"""Weights as safetensors in diffusers' layout: one file, or several with an index where one would be large.

A file is written tensor by tensor, so that casting needs the memory of one; the library's own writer wants all of them at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fvgen.utils.errors import UserError

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
MAX_SHARD = 2 * 10**9  # bytes
_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Written = Callable[[int], None]


def save_tensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None = None,
    written: Written | None = None,
    limit: int | None = None,
) -> None:
    """Writes a network's weights into a folder.

    Args:
        tensors: any shapes, on any device.
        folder: is made if need be.
        dtype: of the stored floating-point weights, None to keep theirs.
        written: called with the bytes of every tensor that is written.
        limit: most bytes of a file; None = ``MAX_SHARD``.

    Raises:
        UserError: a weight is not finite, or does not fit into ``dtype``.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    planned = {name: _planned(value, dtype) for name, value in tensors.items()}
    split = split_torch_state_dict_into_shards(planned, filename_pattern=_PATTERN, max_shard_size=limit or MAX_SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, dtype, written)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def save_file(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None, written: Written | None = None
) -> None:
    """Writes one file; arguments as of :func:`save_tensors`."""
    # Widest first, as the library does, so that every tensor is aligned.
    planned = {name: _planned(value, dtype) for name, value in tensors.items()}
    names = sorted(planned, key=lambda name: (-planned[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + planned[name].nbytes
        kind = _NAMES.get(planned[name].dtype)
        if kind is None:
            raise UserError(f"the weight {name} is of the type {planned[name].dtype}, which is not stored; cast it to float32")
        header[name] = {"dtype": kind, "shape": list(planned[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = stored(name, tensors[name], dtype)
            stream.write(value.reshape(-1).view(torch.uint8).numpy())
            if written is not None:
                written(value.nbytes)


def stored(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight as it is stored, on the CPU.

    Raises:
        UserError: it is not finite, or is no more in ``dtype``.
    """
    value = value.detach()
    if not value.is_floating_point():
        return value.cpu().contiguous()
    cast = value.to("cpu", dtype or value.dtype).contiguous()
    if not torch.isfinite(cast).all():
        if not torch.isfinite(value).all():
            raise UserError(f"the weight {name} holds values that are not finite; it is damaged, so get it again")
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"the weight {name} holds values that are too large for {kind}; use --dtype bf16 or fp32")
    return cast


def stored_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes that weights take on the disk."""
    return sum(_planned(value, dtype).nbytes for value in tensors.values())


def _planned(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    kept = dtype is None or not value.is_floating_point()
    return torch.empty(value.shape, dtype=value.dtype if kept else dtype, device="meta")


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a folder's weights, and of their index; the single file's where there is none.

    Raises:
        UserError: the index is damaged.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        return [WEIGHTS_FILE]
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not files or any(Path(name).name != name for name in files):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} names no files with weights; convert or save the model again") from None
    return [INDEX_FILE, *files]


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, mapped into memory.

    Raises:
        UserError: the index is damaged.
        OSError, SafetensorError: a file is missing or damaged.
    """
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for name in weight_files(folder):
        if name != INDEX_FILE:
            tensors |= load_file(folder / name)
    return tensors
