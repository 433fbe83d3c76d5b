"""Loss and gradients as one CUDA graph per input shape: small networks are otherwise bound by launching their kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class GradientStep:
    """Calls ``loss(*inputs)`` and leaves its gradients in ``module``'s parameters.

    On CUDA the first call with given shapes records a graph that later calls replay; on the CPU it simply runs.

    Args:
        module: the parameters that get gradients.
        loss: a function of tensors without data-dependent shapes.
    """

    def __init__(self, module: nn.Module, loss: Callable[..., Tensor]) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._loss = loss
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._pool: tuple[int, int] | None = None
        for p in self._parameters:
            p.grad = torch.zeros_like(p)  # graphs accumulate into these

    def _run(self, inputs: list[Tensor]) -> Tensor:
        torch._foreach_zero_([p.grad for p in self._parameters])
        loss = self._loss(*inputs)
        loss.backward()
        return loss.detach()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss; valid until the next call."""
        if not inputs[0].is_cuda:
            return self._run(list(inputs))
        key = tuple(x.shape for x in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._record([x.clone() for x in inputs])
        graph, static, loss = self._graphs[key]
        for old, new in zip(static, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return loss

    def _record(self, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries choose their algorithms before the recording
                self._run(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._run(inputs)
        self._pool = graph.pool()
        return graph, inputs, loss
