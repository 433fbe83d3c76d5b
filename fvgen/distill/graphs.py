"""Calls of one network as CUDA graphs: forward, and backward where a gradient is wanted.

A small network is otherwise bound by launching its kernels. The methods stay ordinary Python: random numbers, noise and losses
happen between the replays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.types import Condition

Call = Callable[[Tensor, Tensor, Condition], Tensor]
RECORDING = threading.Lock()  # no other thread may use the GPU while a graph is recorded


@dataclass
class _Recorded:
    """Static tensors and graphs of one kind of call."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    forward: torch.cuda.CUDAGraph
    output_gradient: Tensor | None = None
    backward: torch.cuda.CUDAGraph | None = None


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, _anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.recorded = recorded
        torch._foreach_copy_(list(recorded.inputs), list(inputs))
        recorded.forward.replay()
        return recorded.output.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        recorded = ctx.recorded
        recorded.output_gradient.copy_(gradient)
        recorded.backward.replay()
        x = recorded.inputs[0]
        return None, None, None if x.grad is None else x.grad.clone(), *[None] * (len(recorded.inputs) - 1)


class GraphedCall:
    """``call(x, t, condition)`` replayed from a graph per shape and kind of call; on the CPU it simply runs.

    A call with a gradient must be differentiated before the next call of that kind, whose activations replace its own. Gradients
    are added to those of ``module``'s parameters, which are made here and must stay the same tensors: zero them in place.

    Args:
        module: whose parameters get gradients.
        call: of static shapes, without waiting for the GPU.
        gradients: also replay calls with a gradient; otherwise they simply run, for example checkpointed.
    """

    def __init__(self, module: nn.Module, call: Call, gradients: bool = True) -> None:
        self._gradients = gradients
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._call = call
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._pool: Any = None  # calls without a gradient end before the next begins, so they may share memory
        self._anchor: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if not x.is_cuda:
            return self._call(x, t, condition)
        inputs = (x, t, condition.latents, condition.context, condition.fps)
        gradient = torch.is_grad_enabled() and (x.requires_grad or bool(self._parameters))
        if gradient and not self._gradients:
            return self._call(x, t, condition)
        key = (gradient, gradient and x.requires_grad, *((i.shape, i.dtype) for i in inputs))
        if key not in self._recorded:
            with RECORDING:
                self._recorded[key] = self._record(inputs, gradient)
        recorded = self._recorded[key]
        if gradient:
            return _Replay.apply(recorded, self._anchor, *inputs)
        with torch.no_grad():
            torch._foreach_copy_(list(recorded.inputs), list(inputs))
            recorded.forward.replay()
            return recorded.output.clone()

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        x, t, latents, context, fps = inputs
        return self._call(x, t, Condition(latents, context, None, fps))

    def _record(self, inputs: tuple[Tensor, ...], gradient: bool) -> _Recorded:
        static = tuple(i.detach().clone() for i in inputs)
        if not gradient:
            with torch.no_grad():
                self._warm_up(static, gradient)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool):
                    output = self._run(static)
            self._pool = graph.pool()
            return _Recorded(static, output, graph)
        self._anchor = torch.zeros((), device=inputs[0].device, requires_grad=True)
        if inputs[0].requires_grad:
            static[0].requires_grad_().grad = torch.zeros_like(static[0])
        for p in self._parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        kept = [p.grad.clone() for p in self._parameters]
        self._warm_up(static, gradient)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward):
            output = self._run(static)
        output_gradient = torch.zeros_like(output)
        with torch.cuda.graph(backward, pool=forward.pool()):
            if static[0].grad is not None:
                static[0].grad.zero_()
            torch.autograd.backward(output, output_gradient)
        if self._parameters:
            torch._foreach_copy_([p.grad for p in self._parameters], kept)
        return _Recorded(static, output.detach(), forward, output_gradient, backward)

    def _warm_up(self, static: tuple[Tensor, ...], gradient: bool) -> None:
        """Libraries choose their algorithms before the recording."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                output = self._run(static)
                if gradient:
                    torch.autograd.backward(output, torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(side)
