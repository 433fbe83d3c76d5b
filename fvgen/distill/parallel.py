"""One process, or several under torchrun: each with a whole copy of the networks, or with its share of them (FSDP2).

Gradients are averaged by hand once per update (``optimiser.py``) rather than by a wrapper around each forward call: a network is
called several times per update, with and without a gradient, and only the sum of what those calls left is to be averaged.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvgen import envs
from fvgen.distill.graphs import forget_graphs
from fvgen.utils.device import take_gpu
from fvgen.utils.errors import UserError

LAYOUTS = ("replicate", "shard")
TIMEOUT = timedelta(minutes=20)  # longer than the slowest thing a rank does alone: its first clips, a checkpoint


def check_layout(layout: str, world: int) -> None:
    """Raises UserError where so many processes cannot share the networks."""
    if layout == "shard" and world == 1:
        raise UserError("sharding needs several processes; start it with torchrun --nproc-per-node N -m fvgen.cli distill ...")


def sharded(x: Tensor) -> bool:
    """Whether a tensor is held in pieces by several ranks."""
    return hasattr(x, "full_tensor")


@dataclass(frozen=True)
class Parallel:
    """This process among its equals.

    Attributes:
        rank, world: number of this process, and how many there are.
        device: where it computes.
        mesh: the ranks that share the trained networks, None where each has a whole copy.
    """

    rank: int
    world: int
    device: torch.device
    mesh: Any = None

    @staticmethod
    def start(device: str, layout: str = "replicate") -> Parallel:
        """Joins the processes that a launcher (torchrun, accelerate launch) started, or stays alone without one.

        Args:
            device: "cpu" or "cuda"; with a launcher, each process takes the GPU of its local rank.
            layout: one of ``LAYOUTS``.

        Raises:
            UserError: unknown layout, more processes than GPUs, or GPUs without a launcher's processes to share them.
        """
        if layout not in LAYOUTS:
            raise UserError(f"the layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        launched = envs.launched()
        if launched is None:
            check_layout(layout, 1)
            alone = torch.device(device)
            if alone.type == "cuda":
                alone = torch.device("cuda", alone.index or 0)
                torch.cuda.set_device(alone)
            return Parallel(0, 1, alone)
        rank, world, local_rank = launched
        where = torch.device(take_gpu(local_rank) if device.startswith("cuda") else "cpu")
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=TIMEOUT)
        mesh = dist.device_mesh.init_device_mesh(where.type, (world,)) if layout == "shard" else None
        return Parallel(rank, world, where, mesh)

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, module: Any, autocast: torch.dtype | None = None) -> nn.Module:
        """Cuts a trained network in pieces, where that is asked for: layer by layer, so that one layer at a time is whole.

        The pieces are float32. Weights that autocast would round are rounded before they are gathered, and their gradients are
        averaged in float32: the arithmetic is that of a single GPU. Norms and biases, one number in a thousand, stay whole on
        every rank, since some are used in float32.

        Args:
            module: float32, in its usual memory format.
            autocast: the dtype under which it computes, None for its own.
        """
        if self.mesh is None:
            return module
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # it warns of outputs that are views, in case they were changed in place; the networks change nothing in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        names = getattr(module, "_no_split_modules", None) or ()
        layers: list[Any] = [part for part in module.modules() if type(part).__name__ in names]
        reduced = None if autocast is None else torch.float32
        how: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": True,
            "mp_policy": MixedPrecisionPolicy(param_dtype=autocast, reduce_dtype=reduced, cast_forward_inputs=False),
            "ignored_params": {p for p in module.parameters() if p.ndim < 2},
        }
        # also the outermost: calls without a gradient would otherwise leave it whole, and stale after the next step
        for layer in [*layers, module]:
            fully_shard(layer, **how)
        # each layer is fetched while the one before it computes, also where the host has not come so far yet
        for layer, following in pairwise([module, *layers]):
            layer.set_modules_to_forward_prefetch([following])
        # on a stream of NCCL's that begins and ends in the caller's: FSDP2's own could not be recorded in a backward pass alone
        module._set_unshard_async_op(True)
        return module

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.world > 1 and x.is_cuda:
            dist.all_reduce(x, dist.ReduceOp.AVG)
        elif self.world > 1:
            x /= self.world  # gloo has no mean
            dist.all_reduce(x)
        return x

    def agree(self, value: bool) -> bool:
        """What the first rank says: decisions that depend on the clock must be alike everywhere."""
        if self.world == 1:
            return value
        flag = torch.tensor([float(value)], device=self.device)
        dist.broadcast(flag, 0)
        return bool(flag.item())

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def stop(self) -> None:
        """Leaves the group; calls that were recorded while it existed are gone afterwards."""
        if self.world > 1 and dist.is_initialized():
            forget_graphs()
            dist.destroy_process_group()


def whole(x: Tensor) -> Tensor:
    """The full tensor of a sharded one; every rank must ask."""
    return x.full_tensor() if sharded(x) else x  # type: ignore[operator]


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copies a full tensor into one that may be sharded; every rank takes its own piece, without communication."""
    if sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]
    target.copy_(value)
