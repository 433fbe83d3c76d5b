"""Processes that share the clips of a long path, started by torchrun or accelerate launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fvgen import envs
from fvgen.utils.device import take_gpu
from fvgen.utils.errors import UserError

TIMEOUT = timedelta(minutes=30)  # others wait for the geometry of the first


@dataclass(frozen=True)
class Workers:
    """This process among its equals; alone by default.

    Attributes:
        rank, world: number of this process, and how many there are.
        device: where it computes.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this process reads, estimates and writes."""
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns in the first process, in all of them; tensors of a GPU arrive on the GPU of each.

        Raises:
            SystemExit: in the others, where ``make`` failed in the first, which says why.
        """
        if self.world == 1:
            return make()
        from fvgen.utils.exchange import broadcast

        held = None
        try:
            if self.main:
                held = (make(),)
        finally:
            held = broadcast(held, 0, self.device)
        if held is None:
            raise SystemExit(2)
        return held[0]

    def gather(self, mine: dict[int, Any]) -> dict[int, Any]:
        """The entries of all processes, in all of them; tensors as with :meth:`share`. Returns when all have come here."""
        if self.world == 1:
            return mine
        from fvgen.utils.exchange import broadcast

        parts = [broadcast(mine, source, self.device) for source in range(self.world)]
        return {key: value for part in parts for key, value in part.items()}


@contextmanager
def workers(device: str) -> Iterator[Workers]:
    """Joins the processes that a launcher started; alone without one.

    What is on the CPU they exchange by gloo, and what is on their GPUs by NCCL.

    Args:
        device: "cpu" or "cuda"; each process takes the GPU of its local rank.

    Raises:
        UserError: the launcher's variables do not fit, or more processes than GPUs.
    """
    try:
        launched = envs.launched()
    except ValueError as error:
        raise UserError(f"{error}; unset them or start the processes with torchrun") from None
    if launched is None:
        yield Workers(device=device)
        return
    import torch.distributed as dist

    rank, world, local = launched
    if device.startswith("cuda"):
        device = take_gpu(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    try:
        yield Workers(rank, world, device)
    finally:
        dist.destroy_process_group()
