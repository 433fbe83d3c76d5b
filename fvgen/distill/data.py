"""Where training clips come from, and in which order.

A sample is a pure function of its source and its index, and the order is a pure function of the seed. So a run that is continued
sees the same clips, also on another number of GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fvgen.data.shards import ShardSet
from fvgen.distill.networks import Batch, derived_seed
from fvgen.types import Condition
from fvgen.utils.errors import UserError


class Source(Protocol):
    """Training clips by number.

    Attributes:
        count: how many there are; None for an endless source, whose indices are never repeated.
    """

    @property
    def count(self) -> int | None: ...

    def read(self, indices: Sequence[int]) -> Batch:
        """These clips as one batch; the same index gives the same clip in any batch."""
        ...


class Order:
    """Which sample comes when: a new permutation per epoch, or 0, 1, 2, ... of an endless source.

    Args:
        count: samples of the source, None for endless.
        seed: of the permutations.

    Raises:
        UserError: an empty source.
    """

    def __init__(self, count: int | None, seed: int) -> None:
        if count == 0:
            raise UserError("the data holds no clip; give a folder with clips")
        self._count, self._seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, start: int, number: int) -> list[int]:
        """The samples at positions ``start .. start + number - 1`` of the run, which may cross epochs."""
        if self._count is None:
            return list(range(start, start + number))
        found = []
        for position in range(start, start + number):
            epoch, place = divmod(position, self._count)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(derived_seed(self._seed, "order", epoch))
                self._epoch, self._permutation = epoch, torch.randperm(self._count, generator=generator)
            found.append(int(self._permutation[place]))
        return found


def batch_tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    condition = (getattr(batch.condition, f.name) for f in fields(Condition))
    return [x for x in (batch.clean, batch.ode_states, batch.ode_clean, *condition) if x is not None]


def check_data(data: str) -> None:
    """Raises UserError unless ``data`` is "synthetic" or a folder with a whole set of clips."""
    if data == "synthetic":
        return
    if not Path(data).is_dir():
        raise UserError(f"there is no data folder {data}; give synthetic or a folder of shards")
    ShardSet(data)


class ShardSource:
    """Encoded clips of ``fvgen.data.shards``.

    Args:
        directory: of the shards.
        device: where the batches are wanted.
        latent_shapes: ``(C, T, h, w)`` that the networks take: landscape and, where the model knows it, portrait. The clips of a
            set have one of them.
        context_shape: ``(L, D)`` of the context they take.

    Raises:
        UserError: the clips have another size.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        device: torch.device,
        latent_shapes: Sequence[tuple[int, ...]],
        context_shape: tuple[int, int],
    ) -> None:
        self._set, self._device = ShardSet(directory), device
        self._text = self._set.constants["text_tokens"].float()
        self._uncond = self._set.constants["uncond_context"].float()
        if len(self._set) == 0:
            return
        first = self._set[0]
        for name in ("clean", "render"):
            found = tuple(first[name].shape)
            if found not in latent_shapes:
                needed = " or ".join(map(str, latent_shapes))
                raise UserError(f"the clips in {directory} have {name} latents {found}, the model needs {needed}")
        tokens = (len(self._text) + len(first["image_tokens"]), first["image_tokens"].shape[-1])
        if tokens != tuple(context_shape):
            raise UserError(f"the clips in {directory} have a context of {tokens}, the model needs {tuple(context_shape)}")

    @property
    def count(self) -> int:
        return len(self._set)

    @property
    def info(self) -> dict[str, Any]:
        """What the set was made with."""
        return self._set.info

    def read(self, indices: Sequence[int]) -> Batch:
        samples = [self._set[i] for i in indices]
        clean, render, image = (torch.stack([s[k] for s in samples]).float() for k in ("clean", "render", "image_tokens"))
        fps = torch.stack([s["fps"].reshape(()) for s in samples]).long()
        context = torch.cat([self._text.expand(len(samples), -1, -1), image], 1)
        uncond = self._uncond.expand(len(samples), -1, -1).contiguous()
        clean, render, context, uncond, fps = (self._move(x) for x in (clean, render, context, uncond, fps))
        return Batch(clean, Condition(render, context, uncond, fps))

    def _move(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else x
