"""Running average of the student's weights, float32, in whatever pieces the student itself is held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def local(x: Tensor) -> Tensor:
    """This rank's piece of a tensor that is sharded over ranks; any other tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


class WeightAverage:
    """Exponential moving average of a module's parameters, with a shorter memory at the start.

    Attributes:
        tensors: the averages by parameter name, sharded as the parameters are.
        updates: how often they were updated.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.tensors = {name: p.detach().clone() for name, p in module.named_parameters()}
        self._module = module

    @torch.no_grad()
    def _pieces(self) -> tuple[list[Tensor], list[Tensor]]:
        return [local(x) for x in self.tensors.values()], [local(p).detach() for p in self._module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the module's weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights = self._pieces()
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the averages inside the block, and :attr:`tensors` hold its weights so long."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """One tensor after the other: a copy of all weights would not fit beside a full-size stage 2."""
        for average, weight in zip(*self._pieces(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
