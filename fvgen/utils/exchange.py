"""Objects from one process to the others: tensors travel as they are, between GPUs by NCCL, and only the rest is pickled.

``torch.distributed`` pickles whole objects, which takes longer for a clip's frames than a GPU takes to make them. What is
unpickled comes from the processes of the same job alone, as there.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Apart(pickle.Pickler):
    """Pickles an object without its tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach().contiguous())
        return len(self.tensors) - 1


class _Together(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, data: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def broadcast(value: Any, source: int, device: torch.device | str = "cpu") -> Any:
    """The ``value`` of process ``source``, in all processes of the default group.

    Args:
        value: of other processes it is ignored. Its tensors are plain and dense.
        source: rank.
        device: where the tensors arrive that are on a GPU in the source; the group needs NCCL for them. Others arrive on the CPU.
    """
    mine = dist.get_rank() == source
    held: list[Any] = [None]
    tensors: list[Tensor] = []
    if mine:
        file = io.BytesIO()
        pickler = _Apart(file)
        pickler.dump(value)
        tensors = pickler.tensors
        held = [(file.getvalue(), [(t.shape, t.dtype, t.is_cuda) for t in tensors])]
    dist.broadcast_object_list(held, src=source, device=torch.device("cpu"))
    data, kinds = held[0]
    if not mine:
        tensors = [torch.empty(shape, dtype=dtype, device=device if on_gpu else "cpu") for shape, dtype, on_gpu in kinds]
    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), source)
    return value if mine else _Together(data, tensors).load()
