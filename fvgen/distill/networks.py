"""What a method is given (networks, a batch, random numbers) and what it gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fvgen.diffusion.predict import PredictV
from fvgen.distill.classifier import Trunk
from fvgen.types import Condition


@dataclass(frozen=True)
class Networks:
    """The roles as functions. Those that a method does not use may be None.

    Attributes:
        student: ``v`` of the network that is distilled.
        teacher: ``v`` of the frozen teacher, without guidance; the method adds it.
        fake: ``v`` of the fake score, which follows the student's distribution.
        trunk: features of the frozen teacher, differentiable with respect to the latents.
        head: logits ``[B]`` of such features, in at least float32.
    """

    student: PredictV
    teacher: PredictV | None = None
    fake: PredictV | None = None
    trunk: Trunk | None = None
    head: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Batch:
    """Clips of one training step.

    Attributes:
        clean: ``[B, C, T, h, w]`` latents of real clips.
        condition: theirs; with an unconditional context where the method guides the teacher.
        ode_states: ``[B, S, C, T, h, w]`` the teacher's ODE trajectories at the student's S times; for the regression only.
        ode_clean: ``[B, C, T, h, w]`` where those trajectories end.
    """

    clean: Tensor
    condition: Condition
    ode_states: Tensor | None = None
    ode_clean: Tensor | None = None


@dataclass(frozen=True)
class Update:
    """One update, before any gradient is taken.

    Attributes:
        losses: scalar per network that it trains, weights included. Their sum is to be differentiated; the gradients of all
            trained networks must be zeroed before, since the student's loss also reaches the classifier's head.
        statistics: detached scalars for the log.
        samples: detached values ``[B]`` of every sample, for histograms.
    """

    losses: dict[str, Tensor]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Sum of the losses."""
        return torch.stack(list(self.losses.values())).sum()


def derived_seed(*parts: int | str) -> int:
    """A seed of 62 bits for one purpose, made of a run's seed and whatever tells the purposes apart."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


class Draws:
    """Every random number of a method, from two CPU generators, so that saving both states resumes it exactly.

    Args:
        shared: seed that is the same on all ranks. What decides how often a network is called comes from it: ranks that called it
            unequally often would wait for each other for ever.
        own: seed of this rank, for all the rest.
    """

    def __init__(self, shared: int, own: int) -> None:
        self._shared, self._own = (torch.Generator().manual_seed(s) for s in (shared, own))

    def shared_index(self, count: int) -> int:
        """0 .. count - 1, the same on every rank."""
        return int(torch.randint(count, (), generator=self._shared))

    def seed(self) -> int:
        """Of a noise of this rank."""
        return int(torch.randint(2**62, (), generator=self._own))

    def choice(self, values: Sequence[int], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[batch]`` int64 indices into ``values``, one per sample, and the values themselves; the host does not wait."""
        index = torch.randint(len(values), (batch,), generator=self._own)
        return index.to(device, non_blocking=True), torch.tensor(values)[index].to(device, non_blocking=True)

    def times(self, span: tuple[float, float], steps: int, batch: int, device: torch.device) -> Tensor:
        """``[batch]`` int64 times, uniform in ``span`` (fractions of ``steps``; the upper end excluded), one per sample."""
        low, high = round(span[0] * steps), round(span[1] * steps)
        return torch.randint(low, high, (batch,), generator=self._own).to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Tensor]:
        """States of both generators."""
        return {"shared": self._shared.get_state(), "own": self._own.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._shared.set_state(state["shared"])
        self._own.set_state(state["own"])
