"""AdamW on one network, whole or in pieces.

Clipping and AdamW work number by number, so each rank runs them on its own piece as on a plain tensor. Only the norm needs the
other ranks. Gradients lie one behind the other in one tensor and stay there, since recorded graphs add to these very tensors;
so those that every rank has in whole are averaged without packing them.
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
        parameters = list(self._parameters.values())
        self._whole = _InARow([p for p in parameters if not sharded(p)])
        self._cut = _InARow([p for p in parameters if sharded(p)])
        self._pieces = {name: nn.Parameter(local(p.detach())) if sharded(p) else p for name, p in self._parameters.items()}
        self._adamw = torch.optim.AdamW(
            self._pieces.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )

    def zero(self) -> None:
        """Sets the gradients to zero, where they are."""
        self._whole.zero()
        self._cut.zero()

    @torch.no_grad()  # also spares each piece of a sharded tensor its way through autograd
    def step(self, rate: float) -> Tensor:
        """One update at the learning rate ``rate``, none at 0; the norm of the gradient over all ranks, before it is clipped."""
        for name, p in self._parameters.items():
            if sharded(p):
                assert local(p).data_ptr() == self._pieces[name].data_ptr(), "the network's pieces were moved"
                self._pieces[name].grad = None if p.grad is None else local(p.grad)
        self._whole.check()
        self._cut.check()
        if self._whole.gradients:
            self._parallel.mean(self._whole.memory)  # what is cut was averaged by its backward pass
        square = self._whole.square()
        if self._cut.gradients:
            others = self._cut.square()
            dist.all_reduce(others)
            square = square + others
        norm = square.sqrt()
        if not rate:
            return norm
        gradients = [p.grad for p in self._pieces.values() if p.grad is not None]
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
        gradients: one per parameter or piece that is trained.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        pieces = [local(p.detach()) for p in self._parameters]
        sizes = [-(-piece.numel() // 64) * 64 for piece in pieces]
        options = {"dtype": pieces[0].dtype, "device": pieces[0].device} if pieces else {}
        self.memory = torch.zeros(sum(sizes), **options)
        self.gradients = [
            part.as_strided(piece.shape, piece.stride(), part.storage_offset())
            for piece, part in zip(pieces, self.memory.split(sizes) if sizes else (), strict=True)
        ]
        pairs = zip(self._parameters, self.gradients, strict=True)
        self._held = [_like(p, gradient) if sharded(p) else gradient for p, gradient in pairs]
        self.zero()

    def zero(self) -> None:
        """Sets all to zero, and backward passes will add to them."""
        self.memory.zero_()
        for p, held in zip(self._parameters, self._held, strict=True):
            p.grad = held

    def check(self) -> None:
        """That nobody has replaced one."""
        for p, gradient in zip(self._parameters, self.gradients, strict=True):
            there = p.grad is not None and local(p.grad).data_ptr() == gradient.data_ptr()
            assert there, "a gradient was replaced instead of added to"

    def square(self) -> Tensor:
        """The sum of their squares."""
        return torch.stack(torch._foreach_norm(self.gradients)).square().sum() if self.gradients else self.memory.sum()


def _like(p: Tensor, piece: Tensor) -> Tensor:
    """A piece as part of a tensor that is cut as ``p`` is."""
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())
