"""Fast operators of FVGen, one folder per operator: a plain PyTorch reference, a GPU version and a spec.

``FVGEN_KERNELS`` chooses the path: ``auto`` (GPU version where it applies, otherwise the reference with one logged reason),
``reference``, or ``strict`` (an error instead of a fallback).
"""

from __future__ import annotations

if __name__ != "fvgen.kernels":
    # A different package is published under the plain name, and libraries look for it when they are started from the checkout's
    # root. Version 0 makes them pass on; anything else asked of this module is an error.
    __version__ = "0"

    def __getattr__(name: str) -> object:
        raise ImportError(f"this folder is the package fvgen.kernels, not {__name__!r}: no {name!r} here")


import importlib
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvgen.kernels._spec import OpSpec

__all__ = ["iter_specs", "status"]


def iter_specs() -> Iterator[OpSpec]:
    """Every operator's :class:`OpSpec`, in the order of the folder names; each folder's ``spec.py`` holds a tuple ``SPECS``."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        if module.ispkg:
            yield from importlib.import_module(f"{__name__}.{module.name}.spec").SPECS


def status() -> list[tuple[str, str, str]]:
    """``(operator, path, reason)`` on this machine: path is ``"fast"`` or ``"reference"``, reason says why."""
    from fvgen.kernels._dispatch import machine_path

    return [(spec.name, *machine_path(spec)) for spec in iter_specs()]
