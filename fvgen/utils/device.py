"""Device names as users give them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from fvgen.utils.errors import UserError

if TYPE_CHECKING:
    import torch

Module = TypeVar("Module", bound="torch.nn.Module")


def choose_device(name: str) -> str:
    """``auto`` becomes ``cuda`` where there is a GPU, otherwise ``cpu``.

    Raises:
        UserError: a device that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; use auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no usable GPU on this machine (see `fvgen doctor`); use --device cpu")
    if name.startswith("cuda:") and not (name[5:].isdigit() and int(name[5:]) < torch.cuda.device_count()):
        raise UserError(f"there is no device {name}; this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return name


def take_gpu(number: int) -> str:
    """Makes a GPU the current one of this process and returns its name.

    Before anything else that needs CUDA: a call that names no device would open a context on the first GPU, in every process of
    the machine.

    Raises:
        UserError: there are not so many.
    """
    import torch

    count = torch.cuda.device_count()
    if number >= count:
        raise UserError(f"process {number} of this machine has no GPU: there are {count}; start fewer")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


@contextmanager
def lent(module: Module, device: torch.device | str) -> Iterator[Module]:
    """A module with its weights on ``device`` inside the block, without gradients; afterwards they are what they were."""
    from torch.nn import Parameter

    stores = [store for part in module.modules() for store in (part._parameters, part._buffers)]
    kept = [dict(store) for store in stores]
    try:
        for store, old in zip(stores, kept, strict=True):
            for name, tensor in old.items():
                if tensor is not None:
                    moved = tensor.detach().to(device)
                    store[name] = Parameter(moved, requires_grad=False) if isinstance(tensor, Parameter) else moved
        yield module
    finally:
        for store, old in zip(stores, kept, strict=True):
            store.update(old)
