"""Calls of one network as CUDA graphs: forward, and backward where a gradient is wanted.

A small network is otherwise bound by launching its kernels. The methods stay ordinary Python: random numbers, noise and losses
happen between the replays.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    pool: Pool
    output_gradient: Tensor | None = None
    backward: torch.cuda.CUDAGraph | None = None

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The output for these inputs, outside of the pool."""
        torch._foreach_copy_(list(self.inputs), list(inputs))
        self.forward.replay()
        self.pool.last = self
        return self.output.clone()


class Pool:
    """Memory of recorded calls. None may begin between the forward and the backward pass of another, whose activations it takes.

    Attributes:
        last: the call that was replayed last, until its backward pass.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self.last: _Recorded | None = None

    @contextmanager
    def recording(self) -> Iterator[torch.cuda.CUDAGraph]:
        """A graph of what is called inside the block, with its intermediate results here."""
        graph = torch.cuda.CUDAGraph()
        # other threads wait for RECORDING, but for NCCL's, which only looks at events
        with torch.cuda.graph(graph, pool=self._handle, capture_error_mode="thread_local"):
            yield graph
        self._handle = graph.pool()


@dataclass(frozen=True)
class Pools:
    """The memory of all recorded calls of a trainer.

    Attributes:
        trained: calls whose gradient goes to parameters: of the student or of the fake score, never both at a time.
        others: calls that may come between their two passes: those without a gradient, and the frozen trunk, which is
            differentiated before anything else is called.
    """

    trained: Pool = field(default_factory=Pool)
    others: Pool = field(default_factory=Pool)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, _anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.recorded = recorded
        return recorded.replay(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        recorded = ctx.recorded
        if recorded.pool.last is not recorded:
            raise RuntimeError("the activations of this call are gone: another was made before its backward pass")
        recorded.pool.last = None
        recorded.output_gradient.copy_(gradient)
        recorded.backward.replay()
        x = recorded.inputs[0]
        return None, None, None if x.grad is None else x.grad.clone(), *[None] * (len(recorded.inputs) - 1)


_CALLS: weakref.WeakSet[GraphedCall] = weakref.WeakSet()


def forget_graphs() -> None:
    """Destroys all recorded calls of this process, whoever still refers to them.

    NCCL waits for graphs that exchange anything before it leaves a group.
    """
    for call in list(_CALLS):
        call.forget()


class GraphedCall:
    """``call(x, t, condition)`` replayed from a graph per shape and kind of call; on the CPU it simply runs.

    A call with a gradient must be differentiated before the next call in the same pool, whose activations replace its own.
    Gradients are added to those of ``module``'s parameters, which are made here and must stay the same tensors: zero them in
    place.

    Args:
        module: whose parameters get gradients.
        call: of static shapes, without waiting for the GPU; it may be checkpointed, unless it also draws random numbers.
        pools: shared with the other calls of a trainer; None for its own.
        gradients: also replay calls with a gradient; otherwise they simply run.
    """

    def __init__(self, module: nn.Module, call: Call, pools: Pools | None = None, gradients: bool = True) -> None:
        self._gradients = gradients
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._call = call
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._pools = pools or Pools()
        self._anchor: Tensor | None = None
        _CALLS.add(self)

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
            return recorded.replay(inputs)

    def forget(self) -> None:
        """Destroys what was recorded; the next call records anew."""
        for recorded in self._recorded.values():
            recorded.forward.reset()
            if recorded.backward is not None:
                recorded.backward.reset()
        self._recorded.clear()

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        x, t, latents, context, fps = inputs
        return self._call(x, t, Condition(latents, context, None, fps))

    def _record(self, inputs: tuple[Tensor, ...], gradient: bool) -> _Recorded:
        static = tuple(i.detach().clone() for i in inputs)
        if not gradient:
            pool = self._pools.others
            with torch.no_grad():
                self._warm_up(static, gradient)
                with pool.recording() as forward:
                    output = self._run(static)
            return _Recorded(static, output, forward, pool)
        pool = self._pools.trained if self._parameters else self._pools.others
        self._anchor = torch.zeros((), device=inputs[0].device, requires_grad=True)
        if inputs[0].requires_grad:
            static[0].requires_grad_().grad = torch.zeros_like(static[0])
        for p in self._parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self._warm_up(static, gradient)
        with pool.recording() as forward:
            output = self._run(static)
        output_gradient = torch.zeros_like(output)
        with pool.recording() as backward:
            if static[0].grad is not None:
                static[0].grad.zero_()
            torch.autograd.backward(output, output_gradient)
        return _Recorded(static, output.detach(), forward, pool, output_gradient, backward)

    def _warm_up(self, static: tuple[Tensor, ...], gradient: bool) -> None:
        """Libraries choose their algorithms before the recording. What is added to the gradients is zero."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                output = self._run(static)
                if gradient:
                    torch.autograd.backward(output, torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(side)
