"""Device names as users give them."""

from __future__ import annotations

from fvgen.utils.errors import UserError


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
