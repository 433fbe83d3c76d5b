"""AdamW on one network, whole or in pieces.

Clipping and AdamW work number by number, so each rank runs them on its own piece as on a plain tensor. Only the norm needs the
other ranks. All gradients lie one behind the other in one tensor, which the ranks that hold whole networks average without packing
it, and stay where they are: recorded graphs add to these very tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvgen.distill.ema import local
from fvgen.distill.parallel import Parallel, put, sharded
from fvgen.distill.settings import TrainSettings


class NetworkOptimiser:
    """Updates the parameters of ``module`` from the gradients that its backward passes left.

    Args:
        module: float32; its parameters stay where they are.
        settings: learning rate, betas, decay and clipping.
        parallel: the ranks.
    """

    def __init__(self, module: nn.Module, settings: TrainSettings, parallel: Parallel) -> None:
        self._parameters = dict(module.named_parameters())
        self._settings, self._parallel = settings, parallel
        self._sharded = any(map(sharded, self._parameters.values()))
        self._gradients = _InARow(list(self._parameters.values()))
        self._pieces = {name: nn.Parameter(local(p.detach())) if sharded(p) else p for name, p in self._parameters.items()}
        self._adamw = torch.optim.AdamW(
            self._pieces.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )

    def zero(self) -> None:
        """Sets the gradients to zero, where they are."""
        self._gradients.zero()

    @torch.no_grad()  # also spares each piece of a sharded tensor its way through autograd
    def step(self, rate: float) -> Tensor:
        """One update at the learning rate ``rate``, none at 0; the norm of the gradient over all ranks, before it is clipped."""
        for name, p in self._parameters.items():
            if sharded(p):
                assert local(p).data_ptr() == self._pieces[name].data_ptr(), "the network's pieces were moved"
                self._pieces[name].grad = None if p.grad is None else local(p.grad)
        self._gradients.check()
        if not self._sharded:  # what is sharded was averaged by its backward pass
            self._parallel.mean(self._gradients.memory)
        gradients = [p.grad for p in self._pieces.values() if p.grad is not None]
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self._sharded:
            dist.all_reduce(square)
        norm = square.sqrt()
        if not rate:
            return norm
        torch._foreach_mul_(gradients, (self._settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """What AdamW remembers of each parameter, as ``NAME/exp_avg`` and so on, in the layout of the parameters."""
        found = {}
        for name, p in self._parameters.items():
            for key, x in self._adamw.state.get(self._pieces[name], {}).items():
                found[f"{name}/{key}"] = _like(p, x) if sharded(p) and key != "step" else x
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`, from full tensors."""
        for stored, x in tensors.items():
            name, _, key = stored.rpartition("/")
            p = self._parameters[name]
            target = torch.zeros_like(x, device=p.device) if key == "step" else torch.zeros_like(p)
            put(target, x)
            self._adamw.state[self._pieces[name]][key] = local(target)


class _InARow:
    """Gradients of parameters or of this rank's pieces, with the strides of these, each from a multiple of 256 bytes on.

    Attributes:
        memory: what holds all of them.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        pieces = [local(p.detach()) for p in self._parameters]
        sizes = [-(-piece.numel() // 64) * 64 for piece in pieces]
        self.memory = torch.zeros(sum(sizes), dtype=pieces[0].dtype, device=pieces[0].device)
        self._places = [
            part.as_strided(piece.shape, piece.stride(), part.storage_offset())
            for piece, part in zip(pieces, self.memory.split(sizes), strict=True)
        ]
        held = zip(self._parameters, self._places, strict=True)
        self._gradients = [_like(p, place) if sharded(p) else place for p, place in held]
        self.zero()

    def zero(self) -> None:
        """Sets all to zero, and backward passes will add to them."""
        self.memory.zero_()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient

    def check(self) -> None:
        """That nobody has replaced one."""
        held = zip(self._parameters, self._places, strict=True)
        assert all(p.grad is not None and local(p.grad).data_ptr() == place.data_ptr() for p, place in held), (
            "a gradient was replaced instead of added to"
        )


def _like(p: Tensor, piece: Tensor) -> Tensor:
    """A piece as part of a tensor that is cut as ``p`` is."""
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())
