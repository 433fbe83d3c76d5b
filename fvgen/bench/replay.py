"""Calls on tensors that stay where they are, so that a CUDA graph of each can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Call = Callable[..., Any]


class Replays:
    """Functions of tensors, each recorded at its first call for a set of shapes and replayed from then on.

    Without a GPU a replay is the function itself on the same fixed tensors. Results are fixed tensors too: valid until the next
    call, and a later stage reads them where they are, without a copy. The recordings share their memory, so results of a chain of
    stages are right as long as the stages run in the order in which they were first called.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.release()

    def release(self) -> None:
        """Forgets all recordings; what they returned is no longer valid."""
        self._recorded: dict[Any, _Recording] = {}
        self._owned: set[int] = set()
        self._pool: Any = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def own(self, tensor: Tensor) -> Tensor:
        """The tensor, which from now on may be read in place and overwritten."""
        self._owned.add(tensor.data_ptr())
        return tensor

    @torch.inference_mode()
    def __call__(self, name: str, call: Call, *inputs: Any) -> Any:
        """``call(*inputs)``.

        Args:
            name: stands, with the shapes, for what ``call`` computes.
            call: must do the same at every replay, and never wait for the GPU.
            inputs: tensors, or lists and tuples of them and of None.
        """
        key = (name, *(leaf.shape for leaf in _tensors(inputs)))
        if key not in self._recorded:
            fixed = tuple(self._fixed(given) for given in inputs)
            self._recorded[key] = recording = _Recording(call, fixed, self._device, self._pool)
            self._owned |= {leaf.data_ptr() for leaf in _tensors(recording.result)}
        return self._recorded[key](*inputs)

    def _fixed(self, given: Any) -> Any:
        """What is ours already as it is, the rest as a copy."""
        if all(leaf.data_ptr() in self._owned for leaf in _tensors(given)):
            return given
        return tree_map(lambda leaf: leaf.to(self._device, copy=True) if isinstance(leaf, Tensor) else leaf, given)


class _Recording:
    """One call on its inputs, and its result."""

    def __init__(self, call: Call, inputs: tuple, device: torch.device, pool: Any) -> None:
        self._call, self._inputs, self._graph = call, inputs, None
        if device.type != "cuda":
            self.result = call(*inputs)
            return
        main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            call(*inputs)  # kernels are compiled and algorithms chosen before the recording
        main.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.result = call(*inputs)

    def __call__(self, *inputs: Any) -> Any:
        others = [pair for pair in zip(self._inputs, inputs, strict=True) if pair[0] is not pair[1]]
        _copy(_tensors([fixed for fixed, _ in others]), _tensors([given for _, given in others]))
        if self._graph is None:
            _copy(_tensors(self.result), _tensors(self._call(*self._inputs)))
        else:
            self._graph.replay()
        return self.result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Many small copies as few kernels; those from the processor last, because they wait for what runs on the GPU."""
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.data_ptr() != s.data_ptr()]
    near: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for target, source in pairs:
        if source.device == target.device:
            near.setdefault(target.dtype, []).append((target, source))
    for group in near.values():
        torch._foreach_copy_([t for t, _ in group], [s for _, s in group])
    for target, source in pairs:
        if source.device != target.device:
            target.copy_(source)
